"""Tokens that a model goes on with: drawn from its distribution, each prompt by its own numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from kdscale.models.generation.drawing import Drawing, Drawn, draw_answers, draw_tokens
from kdscale.models.loading import load_model

DRAWING = Drawing(new_tokens=10, temperature=1.0, top_p=1.0, vocab_size=300, end_ids=(0,), pad_id=0)
PROMPTS = [[5, 9, 200], [17], [40, 41, 42, 43, 44, 45]]


@pytest.fixture(scope="module")
def model(tiny_llama_dir: Path) -> Any:
    return load_model(tiny_llama_dir, dtype=torch.float32, device=torch.device("cpu"))


def uniforms(rows: int) -> torch.Tensor:
    return torch.rand(3, 10, generator=torch.Generator().manual_seed(1), dtype=torch.float64)[:rows]


def test_what_is_drawn_has_the_probabilities_of_the_model_and_depends_on_no_other_prompt(model: Any) -> None:
    together = draw_answers(model, PROMPTS, uniforms(3), DRAWING)
    for row, (prompt, drawn) in enumerate(zip(PROMPTS, together, strict=True)):
        (alone,) = draw_answers(model, [prompt], uniforms(3)[row : row + 1], DRAWING)
        assert alone.ids == drawn.ids and max(drawn.ids) < 300
        with torch.no_grad():
            logits_SV = model(torch.tensor([prompt + drawn.ids])).logits[0, len(prompt) - 1 : -1, :300]
        logp_SV = logits_SV.log_softmax(1)
        expected = logp_SV.gather(1, torch.tensor(drawn.ids)[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(drawn.logprobs), expected, atol=1e-4, rtol=1e-4)
        entropy = -(logp_SV.exp() * logp_SV).sum(1)
        torch.testing.assert_close(torch.tensor(drawn.entropies), entropy, atol=1e-4, rtol=1e-4)


def test_an_answer_ends_with_the_token_that_ends_it(model: Any) -> None:
    (long,) = draw_answers(model, PROMPTS[:1], uniforms(1), DRAWING)
    end = long.ids[4]
    settings = Drawing(10, 1.0, 1.0, 300, (end,), 0)
    cut, other = draw_answers(model, PROMPTS[:2], uniforms(2), settings)
    size = long.ids.index(end) + 1
    assert cut == Drawn(
        long.ids[:size], pytest.approx(long.logprobs[:size]), pytest.approx(long.entropies[:size]), True
    )
    assert len(other.ids) == 10 or other.ended


def test_the_checkpoints_own_generation_config_counts_for_nothing(model: Any) -> None:
    before = model.generation_config
    plain = draw_answers(model, PROMPTS, uniforms(3), DRAWING)
    model.generation_config = type(before)(repetition_penalty=9.0, do_sample=True, top_k=1, eos_token_id=7)
    try:
        assert draw_answers(model, PROMPTS, uniforms(3), DRAWING) == plain
        assert model.generation_config.repetition_penalty == 9.0
    finally:
        model.generation_config = before


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.5, 1.0), (1.0, 0.6)])
def test_draws_are_shares_of_the_distribution(temperature: float, top_p: float) -> None:
    logits_V = torch.tensor([0.3, 2.0, -1.0, 1.2, 0.0])
    p_V = torch.softmax(logits_V / temperature, 0).double()
    if top_p < 1.0:
        kept = torch.tensor([0, 1, 0, 1, 0])  # 0.57 and 0.26
        p_V = p_V * kept / (p_V * kept).sum()
    grid = (torch.arange(4000, dtype=torch.float64) + 0.5) / 4000
    drawn = draw_tokens(logits_V.expand(4000, 5), grid, temperature, top_p)
    shares = torch.bincount(drawn[:, 0], minlength=5) / 4000
    torch.testing.assert_close(shares.double(), p_V, atol=5e-4, rtol=0)


def test_no_number_draws_outside_of_the_distribution() -> None:
    logits_BV = torch.tensor([[5.0, -torch.inf, 4.0, -torch.inf]]).expand(2, 4)
    drawn = draw_tokens(logits_BV, torch.tensor([0.0, 1.0 - 2**-53]), 1.0, 1.0)
    assert drawn[:, 0].tolist() == [0, 2]
    assert draw_tokens(logits_BV, torch.tensor([0.9, 0.9]), 0.0, 1.0)[:, 0].tolist() == [0, 0]
