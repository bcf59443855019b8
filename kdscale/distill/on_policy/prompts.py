"""What the student goes on from: pieces of the run's own text, or the prompts of files.

Prompts are numbered: sequence `number` of the global order has prompts in slots 0, 1, ... Which prompt stands where
depends on nothing else but the seed, so that a resumed run has the same.

S positions of a sequence.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple, Protocol

import numpy as np

from kdscale.config.distill.on_policy import OnPolicyConfig
from kdscale.data.packing import PackedSequence, seeded_order
from kdscale.data.readers.chat import ChatTemplate
from kdscale.data.token_store import TokenSplit
from kdscale.errors import DataError
from kdscale.responses.prompts import Prompts

SECTION = "distill.on_policy.prompts"
_SHORTEST = 8  # tokens of a piece; where the text ends sooner, it begins sooner
_HELD_OUT = 20  # of so many prompts of files, one is held out


class Prompt(NamedTuple):
    """Token ids, and the tag of the text that they come from, as the token store numbers it."""

    ids: list[int]
    tag: int = 0


class PromptBook(Protocol):
    """All prompts of a run."""

    def of(self, number: int, slot: int) -> Prompt:
        """The prompt in a slot of sequence `number` of the global order."""

    def held_out(self, count: int) -> list[Prompt]:
        """At most `count` prompts that no sequence has, always the same."""


class TextPrompts:
    """Pieces of the text that would stand in the sequence, at equal distances; of a chat what comes before an answer.

    A piece goes on to `most` tokens or to the end of its document in the sequence. `sequence` gives the packed sequence
    of a number. A chat whose question is longer than `most` gives a piece like any other text.
    """

    def __init__(
        self, train: TokenSplit, heldout: TokenSplit, sequence: Callable[[int], PackedSequence], most: int, slots: int
    ):
        self._train, self._heldout, self._most, self._slots = train, heldout, most, slots
        self._sequence = lru_cache(maxsize=16)(sequence)  # its slots ask one after the other

    def of(self, number: int, slot: int) -> Prompt:
        """The piece in a slot of sequence `number`."""
        packed = self._sequence(number)
        start = slot * len(packed.input_ids_S) // self._slots
        starts = np.flatnonzero(packed.position_ids_S == 0)
        which = int(np.searchsorted(starts, start, side="right")) - 1
        tag = int(packed.tags_S[start])
        if (question := self._question(self._train, packed.document_ids[which])) is not None:
            return Prompt(question, tag)
        end = int(starts[which + 1]) if which + 1 < len(starts) else len(packed.input_ids_S)
        begin = int(starts[which])
        ids = _without_end(packed.input_ids_S[start:end], self._train.eos_id)
        prefix = list(self._train.prefix_ids)
        if start == begin or len(ids) < _SHORTEST:
            ids, prefix = _without_end(packed.input_ids_S[begin:end], self._train.eos_id), []
        return Prompt((prefix + ids)[: self._most] or [self._train.eos_id], tag)

    def held_out(self, count: int) -> list[Prompt]:
        """The beginnings of held-out documents."""
        split, prompts = self._heldout, []
        for document in seeded_order(split.documents, 0, 0)[:count].tolist():
            ids = self._question(split, document)
            if ids is None:
                tokens = _without_end(split.document_tokens(document), split.eos_id)
                ids = [*split.prefix_ids, *tokens][: self._most] or [split.eos_id]
            prompts.append(Prompt(ids, int(split.tags_D[document])))
        return prompts

    def _question(self, split: TokenSplit, document: int) -> list[int] | None:
        """Of a chat, all that comes before its last answer that leaves no more than `most` tokens; else None."""
        is_label = split.document_is_label(document)
        if is_label is None:
            return None
        begins = np.flatnonzero(is_label[1:] & ~is_label[:-1]) + 1
        fitting = begins[begins <= self._most - len(split.prefix_ids)]
        if not len(fitting):
            return None
        return [*split.prefix_ids, *split.document_tokens(document)[: int(fitting[-1])].tolist()]


def _without_end(ids: np.ndarray, eos_id: int) -> list[int]:
    """The ids, without an end of text as the last one, which nothing follows."""
    found = ids.tolist()
    return found[:-1] if found and found[-1] == eos_id else found


class FilePrompts:
    """The prompts of files, in an order of their own each time round; each twentieth is held out."""

    def __init__(self, prompts: Sequence[list[int]], slots: int, seed: int):
        held_out = range(0, len(prompts), _HELD_OUT) if len(prompts) >= _HELD_OUT else range(0)
        self._held_out = [prompts[number] for number in held_out] or list(prompts)
        self._prompts = [ids for number, ids in enumerate(prompts) if number not in held_out]
        self._slots, self._seed = slots, seed
        self._order: tuple[int, np.ndarray] = (-1, np.zeros(0, np.int64))

    def of(self, number: int, slot: int) -> Prompt:
        """The prompt in a slot of sequence `number`."""
        turn, place = divmod(number * self._slots + slot, len(self._prompts))
        if self._order[0] != turn:
            self._order = turn, seeded_order(len(self._prompts), self._seed, turn)
        return Prompt(self._prompts[int(self._order[1][place])])

    def held_out(self, count: int) -> list[Prompt]:
        """The first ones of those that are held out."""
        return [Prompt(ids) for ids in self._held_out[:count]]


def read_prompts(
    settings: OnPolicyConfig, tokenizer: Any, template: ChatTemplate, prefix: Sequence[int]
) -> list[list[int]]:
    """The prompts of files as token ids: by the chat template, or as plain text where there is none.

    Raises DataError, with file and line, for one that is longer than distill.on_policy.prompt_tokens, and for messages
    without a template.
    """
    found = []
    for prompt in Prompts(settings, SECTION):
        if template.text:
            text, begins = template.prompt(prompt.messages, prompt.where), []
        elif len(prompt.messages) == 1:
            text, begins = prompt.messages[0]["content"], list(prefix)
        else:
            raise DataError(
                f"{prompt.where}: messages", expected="a plain prompt, as the tokenizer has no chat template",
                hint="name a template in data.chat_template",
            )  # fmt: skip
        ids = [*begins, *tokenizer(text, add_special_tokens=False)["input_ids"]]
        if not 1 <= len(ids) <= settings.prompt_tokens:
            raise DataError(
                f"{prompt.where}: a prompt of {len(ids):,} tokens", expected=f"1 to {settings.prompt_tokens:,}",
                hint="raise distill.on_policy.prompt_tokens, or shorten the prompt",
            )  # fmt: skip
        found.append(ids)
    return found
