"""What one loaded model says of items: log-likelihoods of given texts, or texts that it writes.

B texts of a batch, S positions, N scored tokens, H hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from kdscale.config.evaluation.bias import GeneratingConfig, MeasureConfig, RefusalsConfig
from kdscale.errors import CheckpointError, ConfigError, DataError
from kdscale.eval.bias.items import Item
from kdscale.eval.token_stats import checked_head, token_stats
from kdscale.models.attention import documents_apart
from kdscale.models.head import final_hidden
from kdscale.responses.generating import Generator, chat_ids

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_TOKENIZED_AT_ONCE = 1024  # items


class Scorer:
    """Log-likelihoods by one model, a batch of texts of like lengths at a time."""

    def __init__(self, model: PreTrainedModel, name: str, tokenizer: Any, micro_batch: int):
        """Raises CheckpointError for a head that does more than can be computed here."""
        self._model, self._name, self._tokenizer, self._micro_batch = model, name, tokenizer, micro_batch
        self._head = checked_head(model, name)
        # The first token is predicted from what begins a text; as in lm-evaluation-harness, the end of one will do.
        first = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
        self._prefix = [] if first is None else [int(first)]

    def __call__(self, items: Sequence[Item], done: Callable[[int], None]) -> list[list[tuple[float, int]]]:
        """For each item the log-likelihood of each choice, in nats, and its tokens; `done` counts items.

        Raises DataError for a text that is too long for the model or has no tokens.
        """
        answers: list[list[tuple[float, int]]] = []
        for start in range(0, len(items), _TOKENIZED_AT_ONCE):
            part = items[start : start + _TOKENIZED_AT_ONCE]
            texts = [self._encoded(item, choice) for item in part for choice in item.choices]
            scores = self._score(texts, done, len(part) / max(len(texts), 1))
            own = iter(scores)
            answers += [[next(own) for _ in item.choices] for item in part]
        return answers

    def _encoded(self, item: Item, choice: tuple[str, str]) -> tuple[np.ndarray, int]:
        """Token ids with what comes before, and how many of them are scored."""
        context, text = choice
        before = self._ids(context) if context else []
        whole = self._ids(context + text)
        # where a token spans the end of the context, it is scored
        shared = next((at for at, (a, b) in enumerate(zip(before, whole, strict=False)) if a != b), len(before))
        ids = [*self._prefix, *whole]
        scored = min(len(whole) - shared, len(ids) - 1)
        limit = getattr(self._model.config.get_text_config(), "max_position_embeddings", None)
        if scored < 1 or (isinstance(limit, int) and len(ids) > limit):
            got = "none to score" if scored < 1 else f"{len(ids):,}"
            raise DataError(item.where, expected=f"1 to {limit or 'any number of'} tokens, as the model has", got=got)
        if max(ids) >= self._head.vocab:
            raise DataError(item.where, expected=f"token ids below {self._head.vocab}", got=str(max(ids)))
        return np.array(ids, dtype=np.int32), scored

    def _ids(self, text: str) -> list[int]:
        return list(self._tokenizer(text, add_special_tokens=False)["input_ids"])

    def _score(
        self, texts: Sequence[tuple[np.ndarray, int]], done: Callable[[int], None], items_a_text: float
    ) -> list[tuple[float, int]]:
        totals, finished, told = [0.0] * len(texts), 0, 0
        order = sorted(range(len(texts)), key=lambda at: len(texts[at][0]), reverse=True)  # the largest batch first
        for start in range(0, len(order), self._micro_batch):
            batch = order[start : start + self._micro_batch]
            for at, total in zip(batch, self._batch([texts[i] for i in batch]), strict=True):
                totals[at] = total
            finished += len(batch)
            done(int(finished * items_a_text) - told)
            told = int(finished * items_a_text)
        return [(total, scored) for total, (_, scored) in zip(totals, texts, strict=True)]

    @torch.inference_mode()
    def _batch(self, texts: Sequence[tuple[np.ndarray, int]]) -> list[float]:
        """The log-likelihood of each text. What pads is on the right, where a causal model does not see it."""
        device, longest = self._model.device, max(len(ids) for ids, _ in texts)
        ids_BS = torch.zeros(len(texts), longest, dtype=torch.long)
        labels_BS = torch.full((len(texts), longest), -1)
        for row, (ids, scored) in enumerate(texts):
            ids_BS[row, : len(ids)] = torch.from_numpy(ids.astype(np.int64))
            labels_BS[row, len(ids) - 1 - scored : len(ids) - 1] = ids_BS[row, len(ids) - scored : len(ids)]
        with documents_apart(self._model):
            positions_BS = torch.arange(longest, device=device).expand_as(ids_BS)
            hidden_BSH = final_hidden(self._model, ids_BS.to(device), positions_BS)
        chosen_BS = labels_BS >= 0
        stats, _ = token_stats(
            self._head, hidden_BSH[chosen_BS.to(device)], (), labels_BS[chosen_BS].to(device)
        )  # fmt: skip
        if not bool(torch.isfinite(stats.ce_N).all()):
            raise CheckpointError(
                f"the {self._name} model gives a loss that is not finite",
                hint="its weights hold NaN or Inf, or bias.dtype is too narrow for it: try --set bias.dtype=float32",
            )
        parts = stats.ce_N.double().split([scored for _, scored in texts])
        return [-float(part.sum()) for part in parts]


def check_template(entry: MeasureConfig, tokenizer: Any) -> None:
    """Raises ConfigError where a measure of answers has no chat template to ask with."""
    if isinstance(entry, RefusalsConfig) and not tokenizer.chat_template:
        raise ConfigError(
            f"bias.measures: {entry.key}", expected="a teacher whose tokenizer has a chat template", got="none",
            hint="measure refusals of a chat model, or name a template in data.chat_template",
        )  # fmt: skip


def write_texts(
    model: PreTrainedModel, tokenizer: Any, items: Sequence[Item], entry: GeneratingConfig, seed: int, *,
    rank: int, ranks: int, done: Callable[[int], None],
) -> dict[int, list[str]]:  # fmt: skip
    """What the model writes to this rank's batches of the prompts: the texts of an item, by its number.

    A batch is the same on any number of ranks. Raises DataError for a prompt without tokens, or too long.
    """
    section = f"bias.measures: {entry.key}.tokens"
    generator = Generator(model, tokenizer, entry.sampling, seed, section)
    texts: dict[int, list[str]] = {}
    for batch in list(_batches(len(items), entry.micro_batch))[rank::ranks]:
        ids = [_prompt_ids(tokenizer, items[at], entry) for at in batch]
        for at, own in zip(batch, ids, strict=True):
            generator.check_room(own, items[at].where)
        for at, record in zip(batch, generator.write(ids), strict=True):
            texts[at] = [answer["text"] for answer in record["answers"]]
        done(len(batch))
    return texts


def _batches(count: int, size: int) -> Iterator[range]:
    return (range(start, min(start + size, count)) for start in range(0, count, size))


def _prompt_ids(tokenizer: Any, item: Item, entry: GeneratingConfig) -> list[int]:
    if isinstance(entry, RefusalsConfig):
        return _rendered(tokenizer, item)
    text = item.messages[-1]["content"]
    ids = list(tokenizer(text, add_special_tokens=False)["input_ids"])
    if not ids:
        raise DataError(item.where, expected="some text to continue", got=f"{text!r}, which has no tokens")
    begun = list(tokenizer(text)["input_ids"])[:1]
    return [*(begun if begun == [tokenizer.bos_token_id] and ids[:1] != begun else []), *ids]


def _rendered(tokenizer: Any, item: Item) -> list[int]:
    try:
        return chat_ids(tokenizer, item.messages)
    except Exception as error:  # a template is a program, which may raise anything
        text = " ".join(str(error).split())[:300]
        raise DataError(
            f"{item.where}: the chat template refuses this prompt", got=f"{type(error).__name__}: {text}",
            hint="correct the order of the roles, or name another template in data.chat_template",
        ) from error  # fmt: skip
