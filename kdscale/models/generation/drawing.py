"""Token ids that a model goes on with after prompts, through transformers' `generate`, each prompt by its own draws.

Which token is drawn depends on the distribution and on the prompt's own random numbers: up to rounding, what is written
depends neither on the other prompts of a batch nor on the ranks that share them.

B prompts of a batch, T new tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Drawing:
    """How tokens are drawn: at most `new_tokens`, of the first `vocab_size`; `temperature` 0: the most likely one."""

    new_tokens: int
    temperature: float
    top_p: float
    vocab_size: int
    end_ids: tuple[int, ...]
    pad_id: int


@dataclass(frozen=True)
class Drawn:
    """What followed one prompt: ids, with the one that ended it, if any did.

    `logprobs`: of each id, at temperature 1, over the whole vocabulary. `entropies`: of the distribution at its place.
    """

    ids: list[int]
    logprobs: list[float]
    entropies: list[float]
    ended: bool


def end_ids(generation: Any, tokenizer: Any) -> list[int]:
    """The ids that end an answer: those of a generation config, and the tokenizer's."""
    configured = generation.eos_token_id
    listed = configured if isinstance(configured, list | tuple) else [configured]
    return sorted({int(token) for token in (*listed, tokenizer.eos_token_id) if token is not None})


@torch.no_grad()
def draw_answers(model: Any, prompts: Sequence[Sequence[int]], uniforms_BT: Tensor, drawing: Drawing) -> list[Drawn]:
    """What `model` goes on with after each prompt; `uniforms_BT` (fp64, in [0, 1)) choose its tokens.

    The checkpoint's generation config counts for nothing: it may penalise repetition.
    """
    from transformers import GenerationConfig, LogitsProcessorList

    longest, device = max(map(len, prompts)), model.device
    ids_BS = torch.full((len(prompts), longest), drawing.pad_id)
    mask_BS = torch.zeros_like(ids_BS)
    for row, prompt in enumerate(prompts):  # padded on the left, so that all answers begin at one place
        ids_BS[row, longest - len(prompt) :] = torch.tensor(prompt)
        mask_BS[row, longest - len(prompt) :] = 1
    chooser = _Chooser(uniforms_BT.to(device), drawing)
    settings = GenerationConfig(
        max_new_tokens=drawing.new_tokens, do_sample=False, pad_token_id=drawing.pad_id,
        eos_token_id=list(drawing.end_ids),
    )  # fmt: skip
    before, model.generation_config = model.generation_config, settings
    try:
        made_BS = model.generate(
            input_ids=ids_BS.to(device), attention_mask=mask_BS.to(device), generation_config=settings,
            logits_processor=LogitsProcessorList([chooser]),
        )  # fmt: skip
    finally:
        model.generation_config = before
    made_BT, logprobs_BT, entropies_BT = made_BS[:, longest:].tolist(), *chooser.told()
    return [_until_end(*told, drawing.end_ids) for told in zip(made_BT, logprobs_BT, entropies_BT, strict=True)]


def _until_end(ids: list[int], logprobs: list[float], entropies: list[float], ends: Sequence[int]) -> Drawn:
    end = next((i for i, token in enumerate(ids) if token in ends), None)
    size = len(ids) if end is None else end + 1
    return Drawn(ids[:size], logprobs[:size], entropies[:size], end is not None)


class _Chooser:
    """A logits processor that draws the next tokens and leaves `generate` no other choice.

    `generate` takes the most likely token of what this returns, so that it draws no random numbers of its own.
    """

    def __init__(self, uniforms_BT: Tensor, drawing: Drawing):
        self._uniforms_BT, self._drawing = uniforms_BT, drawing
        self._logprobs: list[Tensor] = []
        self._entropies: list[Tensor] = []

    def __call__(self, _ids_BS: Tensor, scores_BV: Tensor) -> Tensor:
        """Scores of −∞ but for the token that is drawn."""
        scores_BV = scores_BV[:, : self._drawing.vocab_size].float()
        logprobs_BV = scores_BV.log_softmax(1)
        chosen_B1 = draw_tokens(
            logprobs_BV, self._uniforms_BT[:, len(self._logprobs)], self._drawing.temperature, self._drawing.top_p
        )
        self._logprobs.append(logprobs_BV.gather(1, chosen_B1)[:, 0])
        self._entropies.append(torch.special.entr(logprobs_BV.exp()).sum(1))
        return torch.full_like(scores_BV, -torch.inf).scatter(1, chosen_B1, 0.0)

    def told(self) -> tuple[list[list[float]], list[list[float]]]:
        """Log-probabilities and entropies, [B][T]."""
        return torch.stack(self._logprobs, 1).tolist(), torch.stack(self._entropies, 1).tolist()


def draw_tokens(logits_BV: Tensor, uniforms_B: Tensor, temperature: float, top_p: float) -> Tensor:
    """One id a row, [B, 1], by the inverse of the distribution function.

    `top_p` keeps the most likely tokens whose probabilities, at this temperature, first sum to it.
    """
    if temperature == 0.0:
        return logits_BV.argmax(1, keepdim=True)
    p_BV = torch.softmax(logits_BV / temperature, 1).double()
    order_BV = None
    if top_p < 1.0:
        p_BV, order_BV = p_BV.sort(dim=1, descending=True, stable=True)
        p_BV = torch.where(p_BV.cumsum(1) - p_BV < top_p, p_BV, 0.0)  # the first one is always kept
    cdf_BV = p_BV.cumsum(1)
    places_B1 = torch.searchsorted(cdf_BV, uniforms_B[:, None].double() * cdf_BV[:, -1:], right=True)
    # a product that was rounded up to the whole sum is beyond the last token that has any probability
    last_B1 = torch.searchsorted(cdf_BV, cdf_BV[:, -1:].contiguous())
    places_B1 = torch.minimum(places_B1, last_B1)
    return places_B1 if order_BV is None else order_BV.gather(1, places_B1)
