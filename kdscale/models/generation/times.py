"""How long a model takes to the first token of an answer, and from each token to the next.

This is the one definition of decode speed: the evaluation and the timings of the pruning search both measure with it.
A time ends when the tokens of all sequences are on the host, as a user gets them.

B sequences · S tokens of a prompt
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class GenerationTimes:
    """Seconds from the prompts to the first token of each, and from each token to the next."""

    first_token: float
    gaps: tuple[float, ...]


class Decoder(Protocol):
    """Greedy decoding of B sequences, a token of each at a time."""

    def first(self, prompt_BS: Tensor) -> list[int]:
        """Run the prompts; returns the token after each."""

    def following(self) -> list[int]:
        """The next token of each sequence."""


class PlainDecoder:
    """Calls the model once a token, with the model's own KV cache.

    The checkpoint's generation config is ignored on purpose: it may sample or penalise repetition.
    """

    def __init__(self, model: PreTrainedModel):
        self._model: Any = model
        self._cache: Any = None
        self._ids_B1: Any = None

    @torch.inference_mode()
    def first(self, prompt_BS: Tensor) -> list[int]:
        """Run the prompts into a new cache; returns the token after each."""
        return self._run(prompt_BS, None)

    @torch.inference_mode()
    def following(self) -> list[int]:
        """The next token of each sequence."""
        return self._run(self._ids_B1, self._cache)

    @torch.inference_mode()
    def go_on_from(self, other: PlainDecoder, sequences: int, ids_B1: Tensor) -> None:
        """Be B sequences that have all read the one prompt of `other`, and go on with different tokens.

        Decoding then costs what it costs after B prompts, without the time to read them. Sequences that went on alike
        would be sent to the same experts of a mixture.
        """
        self._cache = copy.deepcopy(other._cache)
        # the first sequence so many times over; a mixer's states know no batch_repeat_interleave
        self._cache.reorder_cache(torch.zeros(sequences, dtype=torch.long, device=ids_B1.device))
        self._ids_B1 = ids_B1

    def _run(self, ids_BS: Tensor, cache: Any) -> list[int]:
        output = self._model(input_ids=ids_BS, past_key_values=cache, use_cache=True, logits_to_keep=1)
        self._cache = output.past_key_values
        self._ids_B1 = output.logits[:, -1].argmax(-1, keepdim=True)
        return [int(token) for token in self._ids_B1.flatten().tolist()]


class Reader:
    """Reads some tokens at once after a prompt, again and again: one is a step of decoding, more what a draft wrote."""

    @torch.inference_mode()
    def __init__(self, model: PreTrainedModel, prompt_1S: Tensor):
        self._model: Any = model
        self._token_11 = prompt_1S[:, -1:]
        self._cache = self._model(input_ids=prompt_1S, use_cache=True, logits_to_keep=1).past_key_values

    @torch.inference_mode()
    def seconds(self, tokens: int) -> float:
        """Until the most likely token after each of the `tokens` is on the host; they stay in the cache."""
        ids_1S = self._token_11.expand(1, tokens)
        start = time.perf_counter()
        output = self._model(input_ids=ids_1S, past_key_values=self._cache, use_cache=True, logits_to_keep=tokens)
        output.logits[0].argmax(-1).tolist()
        self._cache = output.past_key_values
        return time.perf_counter() - start


def time_generation(
    decoder: Decoder, prompt_BS: Tensor, new_tokens: int, after_first: Callable[[], None] = lambda: None
) -> GenerationTimes:
    """Read the prompts and decode `new_tokens` tokens after the first; `after_first` is called between the two."""
    if prompt_BS.is_cuda:
        torch.cuda.synchronize()
    start = time.perf_counter()
    decoder.first(prompt_BS)
    first_token = time.perf_counter() - start
    after_first()
    return GenerationTimes(first_token, time_decoding(decoder, new_tokens))


def time_decoding(decoder: Decoder, new_tokens: int) -> tuple[float, ...]:
    """Seconds from each token to the next, for a decoder that has read its prompts."""
    gaps, before = [], time.perf_counter()
    for _ in range(new_tokens):
        decoder.following()
        now = time.perf_counter()
        gaps.append(now - before)
        before = now
    return tuple(gaps)
