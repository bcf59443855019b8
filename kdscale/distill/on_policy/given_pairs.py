"""Pairs of answers from files, in place of some of the run's text; nothing is written.

Which pair stands where depends on nothing but the seed, so that a resumed run has the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from kdscale.config.distill.on_policy import PreferencesConfig
from kdscale.data.batches import Batch, WrittenSequence
from kdscale.data.packing import seeded_order
from kdscale.data.readers.chat import ChatTemplate
from kdscale.distill.on_policy.packed_answers import Answer, held_out_batch, pack_answers
from kdscale.distill.on_policy.samples import Share
from kdscale.errors import DataError
from kdscale.responses.pairs import SECTION, Pair, Pairs

_HELD_OUT = 20  # of so many pairs one is held out
TokenPair = tuple[Answer, Answer]  # the chosen one first


class GivenPairs:
    """The sequences of pairs of a run; data.batches.OwnSequences for the loader, as on_policy.samples.Samples is."""

    def __init__(
        self, settings: PreferencesConfig, share: Share, pairs: Sequence[TokenPair], *, seed: int, pad_id: int
    ):
        held_out = range(0, len(pairs), _HELD_OUT) if len(pairs) >= _HELD_OUT else range(0)
        self._held_out = [pairs[number] for number in held_out] or list(pairs)
        self._pairs = [pair for number, pair in enumerate(pairs) if number not in held_out]
        self._settings, self._share, self._seed, self._pad_id = settings, share, seed, pad_id
        self._a_sequence = settings.prompts_a_sequence(share.seq_len)
        self._order: tuple[int, np.ndarray] = (-1, np.zeros(0, np.int64))

    def takes(self, number: int, step: int) -> bool:
        """Whether sequence `number`, which belongs to step `step`, is one of pairs."""
        return self._share.takes(self._settings, number, step)

    def lengths(self) -> list[int]:
        """Positions of each document in a sequence, about."""
        answers = self._a_sequence * self._settings.answers
        used = answers * self._settings.answers_a_sequence
        return [self._settings.answers_a_sequence] * answers + [self._share.seq_len - used] * (
            used < self._share.seq_len
        )

    def holds(self, step: int) -> bool:
        """All is there."""
        return True

    def prepare(self, step: int, look: Callable[[], None] = lambda: None) -> bool:
        """Nothing has to be found."""
        return False

    def sequence(self, number: int, step: int) -> WrittenSequence:
        """The pairs in place of sequence `number`."""
        first = number * self._a_sequence
        return self._packed([self._pair(place) for place in range(first, first + self._a_sequence)])

    def held_out_batches(self, look: Callable[[], None] = lambda: None) -> list[Batch]:
        """The pairs that no sequence has, at most validate_prompts, this rank's share; as many batches on all ranks."""
        share, size = self._share, self._a_sequence
        pairs = self._held_out[: self._settings.validate_prompts]
        rows = [self._packed(pairs[first : first + size]) for first in range(0, len(pairs), size)]
        own = [(number, rows[number]) for number in range(share.rank, len(rows), share.ranks)]
        most = math.ceil(len(rows) / share.ranks)
        return [
            held_out_batch(own[first : first + share.micro_batch] or [(-1, self._packed([]))])
            for first in range(0, most, share.micro_batch)
        ]

    def close(self) -> None:
        """Do nothing."""

    def _pair(self, place: int) -> TokenPair:
        turn, number = divmod(place, len(self._pairs))
        if self._order[0] != turn:
            self._order = turn, seeded_order(len(self._pairs), self._seed, turn)
        return self._pairs[int(self._order[1][number])]

    def _packed(self, pairs: Sequence[TokenPair]) -> WrittenSequence:
        answers = [answer for pair in pairs for answer in pair]
        numbered = [answer._replace(number=number) for number, answer in enumerate(answers)]
        return pack_answers(numbered, self._share.seq_len, self._pad_id)


def read_pairs(
    settings: PreferencesConfig, tokenizer: Any, template: ChatTemplate, prefix: Sequence[int], eos_id: int,
    say: Callable[[str], None],
) -> list[TokenPair]:  # fmt: skip
    """The pairs of files as token ids: by the chat template, or as plain text where there is none.

    Those that are too long are left out, which `say` tells. Raises DataError where none is left, and for messages
    without a template.
    """
    tokenise = _as_chat if template.text else _as_text
    found, left_out = list[TokenPair](), 0
    for pair in Pairs(settings):
        answers = tuple(
            tokenise(pair, text, tokenizer, template, prefix, eos_id) for text in (pair.chosen, pair.rejected)
        )
        if all(_fits(answer, settings) for answer in answers):
            found.append((answers[0], answers[1]))
        else:
            left_out += 1
    limits = f"{settings.prompt_tokens:,} tokens of prompt or {settings.max_new_tokens:,} of an answer"
    if not found:
        raise DataError(
            SECTION, expected=f"at least one pair of at most {limits}", got=f"{left_out:,} longer ones",
            hint="raise distill.preferences.prompt_tokens or max_new_tokens",
        )  # fmt: skip
    if left_out:
        say(f"{left_out:,} of {left_out + len(found):,} pairs are left out, as they have more than {limits}")
    return found


def _fits(answer: Answer, settings: PreferencesConfig) -> bool:
    return 1 <= len(answer.prompt) <= settings.prompt_tokens and 1 <= len(answer.ids) <= settings.max_new_tokens


def _as_chat(
    pair: Pair, text: str, tokenizer: Any, template: ChatTemplate, prefix: Sequence[int], eos_id: int
) -> Answer:
    """What the template makes of the chat; the special token that ends the answer belongs to it."""
    chat = template.chat([*pair.messages, {"role": "assistant", "content": text}], pair.where)
    begin, end = chat.answers[-1]
    prompt, answer = (_ids(tokenizer, part) for part in (chat.text[:begin], chat.text[begin:end]))
    return _answer(prompt, answer)


def _as_text(
    pair: Pair, text: str, tokenizer: Any, template: ChatTemplate, prefix: Sequence[int], eos_id: int
) -> Answer:
    if len(pair.messages) > 1:
        raise DataError(
            f"{pair.where}: messages", expected="a plain prompt, as the tokenizer has no chat template",
            hint="name a template in data.chat_template",
        )  # fmt: skip
    return _answer([*prefix, *_ids(tokenizer, pair.messages[0]["content"])], [*_ids(tokenizer, text), eos_id])


def _ids(tokenizer: Any, text: str) -> list[int]:
    found: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return found


def _answer(prompt: Sequence[int], ids: Sequence[int]) -> Answer:
    """Four bytes a token, as all pairs are held in memory."""
    return Answer(0, np.asarray(prompt, np.int32), np.asarray(ids, np.int32))
