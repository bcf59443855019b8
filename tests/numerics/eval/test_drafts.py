"""Acceptance of a draft against naive sums, the tokens it is worth against draws, and generated text against both."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from transformers import AutoModelForCausalLM

from kdscale.config.evaluation.draft import DraftConfig
from kdscale.config.evaluation.settings import EvalConfig
from kdscale.eval.draft.expected import speed_up, tokens_per_call, tokens_per_call_along
from kdscale.eval.draft.generating import Rounds, generate
from kdscale.eval.draft.measure import drafts, measure_drafts
from kdscale.eval.summary import Scores, summarise
from kdscale.eval.token_stats import TokenStats, token_stats
from kdscale.models.head import OutputHead
from kdscale.runtime.progress import Reporter

PROMPTS = [torch.tensor([[5, 6, 7]]), torch.tensor([[9, 8, 7, 6]])]


def noisy(model: Any, noise: float) -> Any:
    student = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(noise * torch.randn(parameter.shape, generator=generator))
    return student


@pytest.fixture(scope="module")
def teacher(tiny_llama_dir: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(tiny_llama_dir).eval()


def test_acceptance_is_the_overlap_of_the_distributions_whatever_the_chunks() -> None:
    """Σ min(p, q) is 1 − total variation; also where a head has −inf, and never above 1."""
    generator = torch.Generator().manual_seed(0)
    heads = [OutputHead(torch.randn(50, 8, generator=generator)) for _ in range(2)]
    hidden = [torch.randn(23, 8, generator=generator) for _ in range(2)]
    labels_N = torch.randint(0, 50, (23,), generator=generator)
    p, q = (head.logits(states).double().softmax(-1) for head, states in zip(heads, hidden, strict=True))
    expected_N = 1 - (p - q).abs().sum(-1) / 2
    for chunk_bytes in (1 << 20, 4 * 50 * 4):
        _, (found,) = token_stats(heads[0], hidden[0], [(heads[1], hidden[1])], labels_N, chunk_bytes)
        assert found.overlap_N is not None
        assert found.overlap_N.double() == pytest.approx(expected_N, abs=1e-6)
    _, (same,) = token_stats(heads[0], hidden[0], [(heads[0], hidden[0])], labels_N)
    assert same.overlap_N is not None and same.overlap_N.min() > 1 - 1e-5 and same.overlap_N.max() <= 1
    figures = summarise(Scores(found, labels_N.numpy(), np.arange(23) // 5), 100)
    assert figures["acceptance"] == pytest.approx(float(expected_N.mean()), abs=1e-6)
    assert figures["acceptance_standard_error"] > 0
    columns = found.as_columns(compared=True)
    assert torch.equal(TokenStats.from_columns(columns).overlap_N, found.overlap_N), "as other ranks get it"


def test_tokens_of_a_call_are_those_of_simulated_rounds() -> None:
    rng = np.random.default_rng(1)
    accepted = (rng.random((200_000, 3)) < 0.7).cumprod(1).sum(1)
    assert tokens_per_call(0.7, 3) == pytest.approx(1 + accepted.mean(), rel=5e-3)
    assert (tokens_per_call(0.0, 5), tokens_per_call(1.0, 5)) == (1.0, 6.0)
    assert speed_up(3.0, 4, 0.25, 1.0) == pytest.approx(1.5), "equation 1 of the paper"


def test_tokens_along_a_text_stay_within_its_documents() -> None:
    accepted_N = np.array([1.0, 0.5, 0.25, 1.0, 1.0, 0.0])
    pieces_N = np.array([0, 0, 0, 1, 1, 2])
    rounds = [1 + 1.0 + 0.5, 1 + 0.5 + 0.125, 1 + 1.0 + 1.0]  # a third start at 2 or 4 would run into another document
    assert tokens_per_call_along(accepted_N, pieces_N, 2) == pytest.approx(np.mean(rounds))
    assert tokens_per_call_along(accepted_N, pieces_N, 1) == pytest.approx(1 + accepted_N.mean())
    assert tokens_per_call_along(accepted_N, pieces_N, 4) is None
    assert tokens_per_call_along(accepted_N, pieces_N, 7) is None
    constant = np.full(50, 0.6)
    assert tokens_per_call_along(constant, np.zeros(50), 4) == pytest.approx(tokens_per_call(0.6, 4))


def test_generated_text_accepts_everything_of_the_teacher_itself(teacher: Any) -> None:
    for sampled in (True, False):
        rounds, *seconds = generate(teacher, copy.deepcopy(teacher), PROMPTS, new_tokens=11, length=3, sampled=sampled)
        assert (rounds.acceptance, rounds.tokens_per_call) == (1.0, 4.0)
        assert sum(rounds.grown) == 22 and min(seconds) > 0


@pytest.mark.long
def test_generated_text_is_the_teachers_and_is_accepted_as_predicted(teacher: Any) -> None:
    """Greedy: the very tokens that the teacher alone writes. Sampled: the overlap of the distributions on what was
    written, within four standard errors."""
    draft = noisy(teacher, 0.06)
    written: list[torch.Tensor] = []
    original = type(teacher).generate

    def keep(self: Any, *args: Any, **more: Any) -> Any:
        out = original(self, *args, **more)
        if self is teacher:
            written.append(out)
        return out

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(teacher), "generate", keep)
        generate(teacher, draft, PROMPTS[:1], new_tokens=24, length=2, sampled=False)
        assert torch.equal(*written), "alone and with the draft"
        written.clear()
        rounds, *_ = generate(teacher, draft, PROMPTS * 3, new_tokens=60, length=2, sampled=True)
    with torch.no_grad():
        p, q = (
            torch.cat([model(ids).logits[0, prompt.shape[1] - 1 : -1].softmax(-1)
                       for ids, prompt in zip(written[1::2], PROMPTS * 3, strict=True)])
            for model in (teacher, draft)
        )  # fmt: skip
    overlap = float(torch.minimum(p, q).sum(-1).mean())
    assert rounds.acceptance is not None
    tried = sum(min(grown, rounds.length) for grown in rounds.whole)
    assert rounds.acceptance == pytest.approx(overlap, abs=4 * (0.25 / tried) ** 0.5)
    assert 0.2 < overlap < 0.95, "a draft that tells nothing"


def test_rounds_that_the_end_cuts_short_do_not_count() -> None:
    rounds = Rounds(2, drafted=[2, 2, 2, 1], grown=[3, 1, 2, 2])
    assert rounds.tokens_per_call == 2.0
    assert rounds.acceptance == pytest.approx(3 / 5)  # two, none and one accepted; two refused
    assert (Rounds(2).tokens_per_call, Rounds(2).acceptance) == (None, None)


def test_a_student_is_measured_as_a_draft(
    teacher: Any, tiny_llama_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = {"teacher": teacher, "pruned": noisy(teacher, 0.06), "padded": noisy(teacher, 0.06)}
    loaded["padded"].resize_token_embeddings(328, mean_resizing=False)
    loaded["recurrent"] = noisy(teacher, 0.06)
    loaded["recurrent"]._is_stateful = True
    monkeypatch.setattr("kdscale.eval.draft.measure.load_model", lambda path, **_: loaded[path.name])
    monkeypatch.setattr("kdscale.eval.draft.measure.quantization_of", lambda path: path.name == "int8" or None)
    models = {name: tmp_path / name for name in ("teacher", "corrected", "pruned", "padded", "recurrent", "int8")}
    assert drafts(models) == ["pruned", "padded", "recurrent"]
    accepted_N = torch.tensor([0.5, 1.0, 0.25, 0.75] * 5)
    stats = TokenStats(accepted_N, accepted_N, accepted_N > 0, accepted_N, accepted_N > 0.3, accepted_N)
    scores = dict.fromkeys(models, Scores(stats, np.zeros(20), np.zeros(20, int)))
    settings = DraftConfig(lengths=(1, 3), generate_length=3, new_tokens=8, repeats=2)
    found = measure_drafts(
        models, scores, PROMPTS, settings, Reporter(quiet=True), device=torch.device("cpu"), dtype=torch.float32
    )
    one, padded = found["pruned"], found["padded"]
    cost = one["draft_step_seconds"] / one["teacher_step_seconds"]
    for row in one["lengths"]:
        sampled = row["sampled"]
        assert sampled["tokens_per_call"] == pytest.approx(tokens_per_call(0.625, row["length"]))
        assert sampled["speed_up"] == pytest.approx(
            sampled["tokens_per_call"] / (row["length"] * cost + row["check_cost"])
        )
        assert row["greedy"]["tokens_per_call"] == pytest.approx(tokens_per_call(0.75, row["length"]))
    best = max(one["lengths"], key=lambda row: row["sampled"]["speed_up"])
    assert (one["best_length"], one["speed_up"]) == (best["length"], best["sampled"]["speed_up"])
    assert one["generated"]["tokens"] == 16 and one["generated"]["greedy"]["rounds"] > 0
    assert padded["generated"] is None and "320 and 328 rows" in padded["generated_left_out"]
    assert "a recurrent state" in found["recurrent"]["generated_left_out"]


def test_settings_that_measure_nothing_are_refused() -> None:
    with pytest.raises(ValidationError, match="ascending order"):
        DraftConfig(lengths=(4, 2))
    with pytest.raises(ValidationError, match=r"new_tokens \(4\) must be above generate_length \(4\)"):
        DraftConfig(new_tokens=4)
    with pytest.raises(ValidationError, match="prompts: expected at least one with draft"):
        EvalConfig(draft=DraftConfig(), prompts=())
