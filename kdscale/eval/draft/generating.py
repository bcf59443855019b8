"""Speculative decoding really done, by the assisted generation of transformers, in turn with the teacher alone.

Texts have a fixed number of tokens: they go on where a model would end them, as in the measurements of speed.
S tokens of a prompt, one sequence.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_SEED = 0


@dataclass
class Rounds:
    """One entry a call of the teacher: how many tokens the draft had written, and how many the text has grown by."""

    length: int
    drafted: list[int] = field(default_factory=list)
    grown: list[int] = field(default_factory=list)

    @property
    def whole(self) -> list[int]:
        """How much the text has grown in each round that the end of the text has not cut short."""
        pairs = zip(self.drafted, self.grown, strict=True)
        return [grown for drafted, grown in pairs if drafted == self.length]

    @property
    def tokens_per_call(self) -> float | None:
        """The mean over the whole rounds; None where there are none."""
        return sum(self.whole) / len(self.whole) if self.whole else None

    @property
    def acceptance(self) -> float | None:
        """Accepted tokens / (accepted and refused ones), those after a refused one not counted; None without any."""
        accepted = sum(self.whole) - len(self.whole)
        refused = sum(grown <= self.length for grown in self.whole)
        return accepted / (accepted + refused) if self.whole else None


class _Counter:
    """A streamer of transformers that notes what each round has written."""

    def __init__(self, draft: PreTrainedModel, rounds: Rounds):
        self._rounds, self._written, self._is_prompt = rounds, 0, True
        self._hook = draft.register_forward_hook(self._count)

    def _count(self, *_: Any) -> None:
        self._written += 1

    def put(self, tokens: Tensor) -> None:
        """The prompt first, then what the text has grown by."""
        if not self._is_prompt:
            self._rounds.drafted.append(self._written)
            self._rounds.grown.append(tokens.numel())
        self._is_prompt, self._written = False, 0

    def end(self) -> None:
        """No more tokens come."""

    def close(self) -> None:
        """Count no more."""
        self._hook.remove()


def generate(
    teacher: PreTrainedModel,
    draft: PreTrainedModel,
    prompts: Sequence[Tensor],
    *,
    new_tokens: int,
    length: int,
    sampled: bool,
) -> tuple[Rounds, float, float]:
    """Each prompt [1, S] continued by `new_tokens` tokens, by the teacher alone and with the draft, in turn.

    Returns the rounds with the draft, and the seconds without it and with it. `length`: how many tokens the draft
    writes before each call of the teacher; `sampled`: at temperature 1 from the whole vocabulary, seeded, else
    greedily. The generation configs of both models are replaced: those of checkpoints may penalise, cut off or end a
    text.
    """
    from transformers import GenerationConfig

    whole_vocabulary = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
    settings: dict[str, Any] = {"max_new_tokens": new_tokens, **(whole_vocabulary if sampled else {"do_sample": False})}
    teacher.generation_config = GenerationConfig(**settings)
    # neither more tokens after a good round nor fewer where the draft is not sure: each round has `length`
    draft.generation_config = GenerationConfig(
        **settings, num_assistant_tokens=length, num_assistant_tokens_schedule="constant",
        assistant_confidence_threshold=0.0,
    )  # fmt: skip
    rounds, alone, together = Rounds(length), 0.0, 0.0
    devices = [teacher.device] if teacher.device.type == "cuda" else []
    with torch.random.fork_rng(devices), torch.inference_mode(), _without_warnings():
        torch.manual_seed(_SEED)
        for prompt_1S in prompts:  # in turn, so that other work of the machine slows down both
            alone += _seconds(teacher, prompt_1S)
            counter = _Counter(draft, rounds)
            together += _seconds(teacher, prompt_1S, assistant_model=draft, streamer=counter)
            counter.close()
    return rounds, alone, together


def _seconds(teacher: Any, prompt_1S: Tensor, **options: Any) -> float:
    start = time.perf_counter()
    teacher.generate(prompt_1S, attention_mask=torch.ones_like(prompt_1S), **options)
    return time.perf_counter() - start


@contextmanager
def _without_warnings() -> Iterator[None]:
    """Assisted generation calls the draft in a way that transformers itself warns of."""
    logger = logging.getLogger("transformers.generation")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)
