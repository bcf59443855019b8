"""Targets from any server with vLLM's `prompt_logprobs`: it scores the training text, and its top K are the targets.

The server's `/completions` takes token ids as prompts and gives the K most likely tokens at every position with their
log-probabilities. It knows no packed windows, so each document of a window is a prompt of its own; positions begin at
0 in both. A position's entry is about the token that stands there, given those before it: the targets of row r of a
document are entry r + 1, and the prompt ends with the label of the document's last row.

B sequences, S positions, N rows, K entries.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

from kdscale.config.distill.targets import Needs
from kdscale.config.endpoint import EndpointConfig
from kdscale.errors import ConfigError, FileError, LostRankError, ServiceError
from kdscale.files import parse_json
from kdscale.models.documents import Documents
from kdscale.runtime.http_status import wrong_setting
from kdscale.teacher.services import Services, make_client, post_limited
from kdscale.teacher.source import MicroBatch, OpenedSource, SourceRequest
from kdscale.teacher.targets import LabelTargets, Targets, TopKTargets

if TYPE_CHECKING:
    import httpx

SECTION = "distill.endpoint"
_ENTRY_BYTES = 256  # of an answer, at most: a token with its log-probability, rank and text
_MASS_SLACK = 1e-2  # by which the probabilities of a server that computes in bf16 may sum to more than one
_PROBE = "The quick brown fox jumps over the lazy dog."


class Scored(NamedTuple):
    """A question: prompts of token ids, and for each the positions in it whose targets are wanted."""

    prompts: list[list[int]]
    positions: list[list[int]]


class EndpointTeacher:
    """A source of targets that has a server score the text; it holds no weights.

    At temperature 1 the targets are those of the teacher: log-probabilities are logits whose log-sum-exp is 0. At any
    other, what lies outside the top K is not known: the log-sum-exp is that of the K entries, which is right only where
    their probabilities are scaled to sum to one (`tail: renormalised`; the config refuses any other use).
    """

    def __init__(self, endpoint: EndpointConfig, gives: Needs, *, vocab_size: int):
        self.model, self.gives = nn.Module(), gives  # no layers to search for a NaN
        self._endpoint, self._vocab_size = endpoint, vocab_size
        self._top_k = min(max(gives.top_k, 1), vocab_size)
        key = endpoint.key(SECTION)
        client = make_client(endpoint.base_url, key, endpoint.timeout, through_proxy=not endpoint.on_this_machine)
        self._services = Services[bytes](
            [client], lambda client, body: _post(client, body, self._top_k), _refused, key=key,
            section=SECTION, timeout=endpoint.timeout, hint=f"check the server at {endpoint.base_url}",
        )  # fmt: skip

    def prefetch(self, batch: MicroBatch) -> None:
        """Ask now for targets that will be needed later."""
        if batch.rows:
            self._services.ask_ahead(self._body(split_documents(batch)))

    def targets(self, batch: MicroBatch) -> Targets:
        """Targets of the batch's rows, on their device. Raises LostRankError when the server does not answer.

        ServiceError when it refuses, or its answer is not what was asked for.
        """
        scored = split_documents(batch)
        ids_NK = torch.empty(batch.rows, self._top_k, dtype=torch.int64)
        logits_NK = torch.empty(batch.rows, self._top_k)
        label = LabelTargets(torch.empty(batch.rows)) if self.gives.label else None
        if batch.rows:
            answer = self._services.answer(self._body(scored))
            entries = read_entries(answer, scored, self._top_k, self._vocab_size)
            # documents and their rows are in order, and so are the batch's rows
            ids_NK[:] = torch.tensor([[token for token, _ in row] for row in entries])
            logits_NK[:] = torch.tensor([[logprob for _, logprob in row] for row in entries])
            if label is not None:
                label.logprobs_N[:] = torch.tensor(read_labels(answer, scored))
        temperature = self.gives.temperature_at(batch.step)
        lse_N = torch.zeros(batch.rows) if temperature == 1.0 else (logits_NK / temperature).logsumexp(1)
        ids_NK, logits_NK, lse_N = (tensor.to(batch.rows_N.device) for tensor in (ids_NK, logits_NK, lse_N))
        if label is not None:
            label = LabelTargets(label.logprobs_N.to(lse_N.device))
        top_k = TopKTargets(ids_NK, logits_NK, lse_N, temperature, self._vocab_size) if self.gives.top_k else None
        return Targets(rows=batch.rows, top_k=top_k, label=label)

    def close(self) -> None:
        """Cancel the questions that nobody waits for, and close the connections."""
        self._services.close()

    def check(self, text_ids: Sequence[int], tokens: Sequence[str]) -> None:
        """Ask about one text, whose tokens are `tokens`: the server knows the model, gives K entries, in these ids.

        Raises ConfigError or ServiceError.
        """
        scored = Scored([list(text_ids)], [list(range(1, len(text_ids)))])
        try:
            answer = self._services.answer(self._body(scored))
        except LostRankError as error:
            raise ConfigError(
                f"{SECTION}.base_url", expected="a server that answers", got=error.got, hint=error.hint
            ) from error
        read_entries(answer, scored, self._top_k, self._vocab_size)
        _check_tokens(answer, text_ids, tokens)

    def _body(self, scored: Scored) -> bytes:
        asked = {
            "model": self._endpoint.model, "prompt": scored.prompts, "prompt_logprobs": self._top_k,
            "max_tokens": 1, "temperature": 0.0,
        }  # fmt: skip
        return json.dumps(asked, separators=(",", ":")).encode()


def split_documents(batch: MicroBatch) -> Scored:
    """The documents of a micro-batch that have rows, each up to its last row and that row's label."""
    ids_M = batch.input_ids_BS.reshape(-1).tolist()
    labels = dict(zip(batch.rows_N.tolist(), batch.labels_N.tolist(), strict=True))
    documents = batch.documents or Documents.of(batch.position_ids_BS)
    scored, begin = Scored([], []), 0
    for length in documents.lengths:
        rows = [row for row in range(begin, begin + length) if row in labels]
        if rows:
            scored.prompts.append([*ids_M[begin : rows[-1] + 1], labels[rows[-1]]])
            scored.positions.append([row - begin + 1 for row in rows])
        begin += length
    return scored


def read_entries(answer: bytes, scored: Scored, top_k: int, vocab_size: int) -> list[list[tuple[int, float]]]:
    """The K most likely (token id, log-probability) of every wanted position, the most likely first.

    Raises ServiceError for an answer that is not about this question, or holds what is no probability.
    """
    rows = []
    for prompt, positions, entries in zip(scored.prompts, scored.positions, _scores(answer, scored), strict=True):
        if len(entries) != len(prompt):
            raise _unusable(f"{len(prompt)} entries of prompt_logprobs", str(len(entries)))
        rows += [_most_likely(entries[position], top_k, vocab_size) for position in positions]
    return rows


def read_labels(answer: bytes, scored: Scored) -> list[float]:
    """The log-probability of the token that stands at every wanted position. Raises ServiceError where there is none.

    `read_entries` has checked the answer.
    """
    found = []
    for prompt, positions, entries in zip(scored.prompts, scored.positions, _scores(answer, scored), strict=True):
        for position in positions:
            told = entries[position].get(str(prompt[position]))
            if told is None:
                raise _unusable(f"the text's own token, {prompt[position]}", repr(entries[position])[:200])
            found.append(float(told["logprob"]))
    return found


def _scores(answer: bytes, scored: Scored) -> list[list[Any]]:
    """The prompt_logprobs of each prompt, in the order of the prompts."""
    tree = _parse(answer)
    choices = tree.get("choices")
    if not isinstance(choices, list) or not all(isinstance(choice, dict) for choice in choices):
        raise _unusable("a list of choices", type(choices).__name__)
    by_index = {choice.get("index"): choice.get("prompt_logprobs") for choice in choices}
    if set(by_index) != set(range(len(scored.prompts))) or len(choices) != len(by_index):
        raise _unusable(f"choices 0 to {len(scored.prompts) - 1}", f"{sorted(map(str, by_index))[:20]}")
    scores = [by_index[index] for index in range(len(by_index))]
    if not all(isinstance(entries, list) for entries in scores):
        raise _unusable("prompt_logprobs, as vLLM gives them", "none", "use a server that supports prompt_logprobs")
    return scores


def _most_likely(entry: Any, top_k: int, vocab_size: int) -> list[tuple[int, float]]:
    """The server also gives the token that stands in the text, where it is not one of the K."""
    try:
        found = [(float(value["logprob"]), int(token)) for token, value in entry.items()]
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise _unusable("token ids with their logprob at every position", repr(entry)[:200]) from error
    if not all(logprob <= _MASS_SLACK and math.isfinite(logprob) for logprob, _ in found):
        raise _unusable("log-probabilities", repr([logprob for logprob, _ in found])[:200])
    found = sorted(found, reverse=True)[:top_k]
    if len(found) < top_k:
        raise _unusable(f"the {top_k} most likely tokens", f"{len(found)}")
    if not all(0 <= token < vocab_size for _, token in found):
        raise _unusable(f"token ids below {vocab_size}, the student's", str(max(token for _, token in found)))
    if (mass := math.fsum(math.exp(logprob) for logprob, _ in found)) > 1.0 + _MASS_SLACK:
        raise _unusable("log-probabilities of one distribution", f"probabilities that sum to {mass:.3f}")
    return [(token, logprob) for logprob, token in found]


def _check_tokens(answer: bytes, text_ids: Sequence[int], tokens: Sequence[str]) -> None:
    """Raises ConfigError when the server reads an id of the text as another token than this run's tokenizer.

    Servers write a token as text, with what cannot be shown left out, so only those that are plain words are compared.
    """
    entries = _parse(answer)["choices"][0]["prompt_logprobs"]
    for token_id, own, entry in zip(text_ids[1:], tokens[1:], entries[1:], strict=True):
        theirs = entry.get(str(token_id), {}).get("decoded_token")
        if isinstance(theirs, str) and own.strip().isalpha() and theirs.strip() != own.strip():
            raise ConfigError(
                f"{SECTION}: the model's tokenizer", expected=f"this run's, in which {token_id} is {own!r}",
                got=f"one in which it is {theirs!r}", hint="serve the teacher of this run, or one with its tokenizer",
            )  # fmt: skip


def _parse(answer: bytes) -> dict[str, Any]:
    try:
        tree: dict[str, Any] = parse_json(answer.decode("utf-8"), "the answer", expect=dict)
    except (UnicodeDecodeError, FileError) as error:
        raise _unusable("a JSON object", str(error)) from error
    return tree


def _unusable(expected: str, got: str, hint: str = "") -> ServiceError:
    return ServiceError(f"{SECTION}: an answer of the server", expected=expected, got=got, hint=hint)


def _post(client: httpx.Client, body: bytes, top_k: int) -> httpx.Response:
    """An id takes at least two bytes of a question, and its entries at most so many of the answer."""
    return post_limited(client, "completions", body, (1 << 20) + len(body) // 2 * (top_k + 1) * _ENTRY_BYTES)


def _refused(answer: httpx.Response, words: str) -> ConfigError | ServiceError:
    status = answer.status_code
    if (error := wrong_setting(SECTION, status, words, answer.headers.get("location"))) is not None:
        return error
    hint = "a smaller top_k, or a server started with a larger --max-logprobs" if "logprobs" in words else ""
    return ServiceError(f"{SECTION}: {answer.url.host} refused ({status})", got=words, hint=hint)


def open_endpoint(request: SourceRequest) -> OpenedSource:
    """The server of distill.endpoint, once it has scored a text as expected. Raises ConfigError or ServiceError."""
    from kdscale.families import load_family
    from kdscale.models.loading import load_tokenizer
    from kdscale.weights import read_config

    config = read_config(request.teacher_dir)
    rows = load_family(config, str(request.teacher_dir)).dims(config).vocab
    tokenizer = load_tokenizer(request.teacher_dir, request.cfg.teacher.trust_remote_code)
    text_ids = list(tokenizer(_PROBE, add_special_tokens=False)["input_ids"])

    def start(vocab_size: int) -> EndpointTeacher:
        source = EndpointTeacher(request.cfg.distill.endpoint, request.needs, vocab_size=vocab_size)
        source.check(text_ids, [str(tokenizer.decode([token])) for token in text_ids])
        return source

    return OpenedSource(rows, start)
