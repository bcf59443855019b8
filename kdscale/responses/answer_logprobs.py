"""Targets from the log-probabilities that an endpoint gave with its answers: no server and no teacher is asked again.

Each kept answer is rendered and tokenised as the data stage does it. Where a token of the endpoint and one of this
run's tokenizer are the same text at the same place of the answer, the endpoint's most likely tokens there are the
targets of the position before; a position without such a token has none and takes no part in the training. A row of a
batch is found by the last tokens before it, and counts only where all of its document in the batch is that of the
answer.

B sequences, S positions, N rows, K entries, T tokens of all answered conversations, M positions that have targets.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from kdscale.config.data import SourceConfig
from kdscale.config.distill.targets import Needs
from kdscale.data.mixing import mix64
from kdscale.data.packing import IGNORED_LABEL
from kdscale.data.readers import jsonl
from kdscale.data.readers.chat import ChatTemplate, chat_template
from kdscale.data.token_store import TokenStore
from kdscale.errors import DataError
from kdscale.models.loading import load_tokenizer
from kdscale.models.tokenizer.tokenizing import BatchEncoder
from kdscale.runs.folder import DATA, KEPT_RESPONSES
from kdscale.teacher.source import LabelledText, MicroBatch, OpenedSource, SourceRequest
from kdscale.teacher.targets import Targets, TopKTargets

PLACEMENT = "distill.teacher_placement: responses"
_GRAM = 8  # tokens by which a place is looked for, before its whole document is compared


class Place(NamedTuple):
    """A position of an answer, and what the endpoint said of the token after it: (token id, log-probability) pairs."""

    position: int
    entries: list[tuple[int, float]]


def places_of(text: str, said: Sequence[Any], start: int, bytes_T: np.ndarray, ids: Mapping[str, int]) -> list[Place]:
    """The positions of a conversation that have targets.

    `said` is [[token, [[token, log-probability], ...]], ...] of an answer `text` that begins at byte `start` of the
    conversation, whose tokens have `bytes_T` bytes each; `ids` has the id of each token's text. None where what the
    endpoint said is not about this text.
    """
    tokens = [str(token) for token, _ in said]
    if not "".join(tokens).startswith(text):  # a token that ends the answer may follow
        return []
    end_of = np.cumsum([len(token.encode("utf-8")) for token in tokens]) + start
    own_ends_T = np.cumsum(bytes_T)
    spans = zip((own_ends_T - bytes_T).tolist(), own_ends_T.tolist(), strict=True)
    number_of = {span: number for number, span in enumerate(spans)}
    places, before = [], start
    for (_, likely), end in zip(said, end_of.tolist(), strict=True):
        number = number_of.get((before, end), 0)
        before = end
        entries: dict[int, float] = {}
        for token, logprob in likely:
            if token in ids:
                entries.setdefault(ids[token], float(logprob))
        if number and entries and math.fsum(map(math.exp, entries.values())) <= 1.01:
            places.append(Place(number - 1, list(entries.items())))
    return places


def texts_of_tokens(tokenizer: Any) -> dict[str, int]:
    """The id of each text that one token stands for, the lowest where there are several."""
    from tokenizers import decoders

    vocabulary: dict[str, int] = tokenizer.get_vocab()
    byte_level = BatchEncoder.of(tokenizer).is_byte_level
    added = {str(token): number for number, token in tokenizer.added_tokens_decoder.items()}
    decoder, out = decoders.ByteLevel(), {}
    for token, number in sorted(vocabulary.items(), key=lambda item: -item[1]):
        text = token if token in added else decoder.decode([token]) if byte_level else token.replace("▁", " ")
        if "\ufffd" not in text:  # part of a character
            out[text] = number
    return out


def with_rest(entries: Sequence[tuple[int, float]], top_k: int, vocab_size: int) -> list[tuple[int, float]]:
    """`top_k` entries: the most likely, and where fewer are known others with an even share of the probability left.

    The even share is the distribution of the most entropy with the known probabilities.
    """
    chosen = sorted(entries, key=lambda entry: -entry[1])[:top_k]
    if len(chosen) == top_k:
        return chosen
    known = {token for token, _ in chosen}
    left = max(1.0 - math.fsum(math.exp(logprob) for _, logprob in chosen), 1e-9)
    share = math.log(left / max(vocab_size - len(known), 1))
    others = (token for token in range(vocab_size) if token not in known)
    return [*chosen, *((token, share) for token, _ in zip(others, range(top_k - len(chosen)), strict=False))]


@dataclass(frozen=True)
class AnswerIndex:
    """All answered conversations one after another, and the positions of them that have targets.

    `target_T` numbers the targets of the token after each position, −1 where there are none; `begin_T` is where the
    conversation of each token begins. `keys_M`, ascending, are hashes of the tokens up to `position_M`.
    """

    ids_T: np.ndarray
    begin_T: np.ndarray
    target_T: np.ndarray
    keys_M: np.ndarray
    position_M: np.ndarray
    ids_MK: np.ndarray
    logits_MK: np.ndarray

    @classmethod
    def of(cls, chats: Sequence[tuple[np.ndarray, list[Place]]], top_k: int, vocab_size: int) -> AnswerIndex:
        """The index of conversations, each its token ids and its places."""
        lengths = [len(ids) for ids, _ in chats]
        begins = np.cumsum([0, *lengths])[:-1]
        ids_T = np.concatenate([ids for ids, _ in chats]).astype(np.int64)
        position_M = np.concatenate(
            [
                np.asarray([place.position for place in places], np.int64) + begin
                for (_, places), begin in zip(chats, begins, strict=True)
            ]
        )
        rows = [with_rest(place.entries, top_k, vocab_size) for _, places in chats for place in places]
        ids_MK, logits_MK = (np.asarray([[entry[part] for entry in row] for row in rows]) for part in (0, 1))
        target_T = np.full(ids_T.size, -1, np.int64)
        target_T[position_M] = np.arange(position_M.size)
        keys_M = gram_keys(ids_T)[position_M]
        order = np.argsort(keys_M, kind="stable")
        return cls(
            ids_T, np.repeat(begins, lengths), target_T, keys_M[order], position_M[order],
            ids_MK.astype(np.int32), logits_MK.astype(np.float32),
        )  # fmt: skip

    def targets_of(self, ids_L: np.ndarray, labels_L: np.ndarray) -> np.ndarray:
        """The number of the targets of each position of a document, or of a part of one, (L,); −1 without."""
        out_L = np.full(ids_L.size, -1, np.int64)
        keys_L = gram_keys(ids_L)
        first_L = np.searchsorted(self.keys_M, keys_L)
        found_L = (first_L < self.keys_M.size) & (labels_L != IGNORED_LABEL)
        found_L[: _GRAM - 1] = False
        found_L &= self.keys_M[np.minimum(first_L, self.keys_M.size - 1)] == keys_L
        for here in np.flatnonzero(found_L).tolist():
            begin = self._begin(ids_L, here, int(first_L[here]), keys_L[here])
            if begin is None:
                continue
            # all of the document is this conversation's, so this place decides for every position of it
            span = slice(begin, min(begin + ids_L.size, self.ids_T.size - 1))
            size = span.stop - begin
            is_label_L = labels_L[:size] == self.ids_T[span.start + 1 : span.stop + 1]
            out_L[:size] = np.where(is_label_L, self.target_T[span], -1)
            break
        return out_L

    def _begin(self, ids_L: np.ndarray, here: int, first: int, key: np.uint64) -> int | None:
        """Where in `ids_T` `ids_L` stands, with position `here` at one of the places with this key.

        What ends a document may follow the conversation.
        """
        for at in range(first, self.keys_M.size):
            if self.keys_M[at] != key:
                return None
            position = int(self.position_M[at])
            begin, conversation = position - here, int(self.begin_T[position])
            end = min(begin + ids_L.size, int(np.searchsorted(self.begin_T, conversation, side="right")))
            if begin >= conversation and np.array_equal(self.ids_T[begin:end], ids_L[: end - begin]):
                return begin
        return None


def gram_keys(ids_T: np.ndarray) -> np.ndarray:
    """A hash (uint64) of the last tokens up to each position; of fewer than those at the first ones."""
    mixed_T = mix64(ids_T.astype(np.uint64))
    out_T = np.zeros(ids_T.size, np.uint64)
    for back in range(min(_GRAM, ids_T.size)):
        out_T[back:] = mix64(out_T[back:] ^ mixed_T[: ids_T.size - back])
    return out_T


class AnswerLogprobs:
    """A source of the top K of answered positions, at temperature 1; at another they are renormalised."""

    def __init__(self, index: AnswerIndex, prefix: int, gives: Needs, vocab_size: int):
        self.model, self.gives = nn.Module(), gives  # no layers to search for a NaN
        self._index, self._prefix, self._vocab_size = index, prefix, vocab_size
        self._coming: dict[tuple[tuple[str, int], ...], np.ndarray] = {}

    def prefetch(self, batch: MicroBatch) -> None:
        """Find the rows of a batch that is on the CPU, so that later nothing waits for a device."""
        if batch.rows:
            self._coming[batch.sequences] = self._numbers(batch)

    def targets(self, batch: MicroBatch) -> Targets:
        """The targets of the batch's rows, on their device. Raises DataError for a row that has none."""
        coming = self._coming.pop(batch.sequences, None)
        numbers_N = self._numbers(batch) if coming is None else coming
        device, temperature = batch.rows_N.device, self.gives.temperature_at(batch.step)
        ids_NK = torch.from_numpy(self._index.ids_MK[numbers_N].astype(np.int64))
        logits_NK = torch.from_numpy(self._index.logits_MK[numbers_N])
        lse_N = torch.zeros(len(numbers_N)) if temperature == 1.0 else (logits_NK / temperature).logsumexp(1)
        ids_NK, logits_NK, lse_N = (part.to(device, non_blocking=True) for part in (ids_NK, logits_NK, lse_N))
        return Targets(rows=batch.rows, top_k=TopKTargets(ids_NK, logits_NK, lse_N, temperature, self._vocab_size))

    def _numbers(self, batch: MicroBatch) -> np.ndarray:
        """The number of the targets of each row, (N,)."""
        rows_N, labels_N = batch.rows_N.cpu(), batch.labels_N.cpu()
        labels_M = torch.full((batch.input_ids_BS.numel(),), IGNORED_LABEL)
        labels_M[rows_N] = labels_N
        labels_BS = labels_M.view_as(batch.input_ids_BS)
        numbers_M = target_numbers(self._index, self._prefix, batch.input_ids_BS, batch.position_ids_BS, labels_BS)
        numbers_N = numbers_M[rows_N.numpy()]
        if (numbers_N < 0).any():
            raise DataError(
                f"{PLACEMENT}: {int((numbers_N < 0).sum())} rows of a batch have no log-probabilities",
                expected="rows that were chosen because they have some",
            )
        return numbers_N

    def close(self) -> None:
        """Nothing is open."""


def target_numbers(
    index: AnswerIndex, prefix: int, ids_BS: torch.Tensor, positions_BS: torch.Tensor, labels_BS: torch.Tensor
) -> np.ndarray:
    """The number of the targets of each flat position, (B·S,); −1 where there are none.

    `prefix`: how many tokens begin each document, and each window that continues one.
    """
    ids_M, positions_M, labels_M = (t.reshape(-1).cpu().numpy() for t in (ids_BS, positions_BS, labels_BS))
    out_M = np.full(ids_M.size, -1, np.int64)
    begins = np.append(np.flatnonzero(positions_M == 0), ids_M.size)
    for begin, end in zip(begins[:-1].tolist(), begins[1:].tolist(), strict=True):
        own = slice(begin + prefix, end)
        if (labels_M[own] != IGNORED_LABEL).any():
            out_M[own] = index.targets_of(ids_M[own], labels_M[own])
    return out_M


def read_index(chats: ChatTemplate, encoder: BatchEncoder, file: Path, top_k: int, vocab_size: int) -> AnswerIndex:
    """The index of the kept answers in `file`. Raises DataError where none has log-probabilities of this text."""
    ids, found, answers = texts_of_tokens(chats.tokenizer), [], 0
    source = SourceConfig(path=str(file), chat=True)
    for where, record in jsonl.read(str(file), source):
        answers += 1
        chat = chats.chat(record.get("messages"), where)
        start, end = chat.answers[-1]
        answer = str(record["messages"][-1]["content"])
        if not record.get("logprobs") or not chat.text[start:end].startswith(answer):
            continue
        encoded = encoder.encode([chat.text])[0]
        begin = len(chat.text[:start].encode("utf-8"))
        if places := places_of(answer, record["logprobs"], begin, encoded.bytes, ids):
            found.append((encoded.ids, places))
    if not found:
        raise DataError(
            f"{PLACEMENT}: {file}", expected="answers with log-probabilities of tokens of this run's tokenizer",
            got=f"{answers:,} answers, none with any",
            hint="set responses.sampling.top_logprobs, and ask a model that has this tokenizer",
        )  # fmt: skip
    return AnswerIndex.of(found, top_k, vocab_size)


def open_responses(request: SourceRequest) -> OpenedSource:
    """The log-probabilities of the run's kept answers. Raises DataError where there are none for this text."""
    settings = request.cfg.responses
    assert settings is not None, "the config has checked that there is a section"
    tokenizer = load_tokenizer(request.student_dir, request.cfg.teacher.trust_remote_code)
    prefix = len(TokenStore.open(request.run_dir / DATA.path).split("train").prefix_ids)
    index = read_index(
        chat_template(request.cfg.data, tokenizer), BatchEncoder.of(tokenizer), request.run_dir / KEPT_RESPONSES.path,
        request.needs.top_k, len(tokenizer),
    )  # fmt: skip

    def start(vocab_size: int) -> AnswerLogprobs:
        return AnswerLogprobs(index, prefix, request.needs, vocab_size)

    def choose(text: LabelledText, keys: Sequence[tuple[str, int]]) -> torch.Tensor:
        numbers_M = target_numbers(index, prefix, text.input_ids_BS, text.position_ids_BS, text.labels_BS)
        without_BS = torch.from_numpy(numbers_M < 0).view_as(text.labels_BS)
        return text.labels_BS.masked_fill(without_BS, IGNORED_LABEL)

    return OpenedSource(None, start, choose)
