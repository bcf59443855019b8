"""Masked scores are the losses of the students that apply would write, and each teacher tensor is read once."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM

from kdscale.config.prune import PruneConfig
from kdscale.errors import DataError
from kdscale.models.hidden_states import HiddenStates, Scratch
from kdscale.prune.apply import apply_plan
from kdscale.prune.search.masked import score_masked
from kdscale.prune.search.planning import make_plan
from kdscale.runtime.progress import Reporter
from tests.integration.prune.family_table import save_teacher

SHAPES = [
    {"ffn": 64}, {"heads": 4, "ffn": 96}, {"kv_heads": 1}, {"hidden": 48},
    {"layers": 2, "ffn": 96, "layer_repair": "none"}, {"ffn": 128},
]  # fmt: skip


@pytest.fixture
def labelled(teacher):
    """Rows of one document each: what plain transformers computes without being told of positions."""
    generator = torch.Generator().manual_seed(8)
    out = []
    for _ in range(2):
        ids = torch.randint(0, 320, (2, 40), generator=generator)
        labels = torch.cat([ids[:, 1:], torch.full((2, 1), -100)], dim=1)
        labels[0, 5:9] = -100
        out.append(SimpleNamespace(input_ids_BS=ids, position_ids_BS=torch.arange(40).expand(2, -1), labels_BS=labels))
    return out


def logits_of(folder: Path, batch: SimpleNamespace) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        return torch.log_softmax(model(input_ids=batch.input_ids_BS, use_cache=False).logits, dim=-1)


@pytest.mark.parametrize("compensate", [pytest.param("none", marks=pytest.mark.long), "ridge"])
def test_masked_loss_is_the_written_students_loss(teacher, labelled, tmp_path, compensate):
    plans = []
    for number, shape in enumerate(SHAPES):
        cfg = PruneConfig(**shape, compensate=compensate)
        scores = teacher.scores(tmp_path / f"scores-{number}", **shape)
        plans.append(make_plan(teacher.config, teacher.family, scores, cfg))
    found = score_masked(
        teacher.checkpoint, teacher.family, plans, labelled, calibration=teacher.batches, ridge=cfg.ridge_lambda,
        acceptance=compensate == "ridge",
    )  # fmt: skip
    for number, (plan, masked) in enumerate(zip(plans, found, strict=True)):
        folder = tmp_path / str(number)
        folder.mkdir()
        apply_plan(
            teacher.checkpoint,
            teacher.family,
            plan,
            folder,
            cfg,
            batches=teacher.batches,
            reporter=Reporter(quiet=True),
        )
        losses, divergences, teachers, overlaps = [], [], [], []
        for batch in labelled:
            ours, theirs = logits_of(folder, batch), logits_of(teacher.checkpoint.path, batch)
            valid = batch.labels_BS >= 0
            targets = batch.labels_BS[valid].unsqueeze(1)
            losses.append(-ours[valid].gather(1, targets))
            teachers.append(-theirs[valid].gather(1, targets))
            divergences.append((theirs[valid].exp() * (theirs[valid] - ours[valid])).sum(-1))
            overlaps.append(1 - (theirs[valid].exp() - ours[valid].exp()).abs().sum(-1) / 2)
        assert masked.loss == pytest.approx(float(torch.cat(losses).mean()), abs=2e-5)
        assert masked.kl == pytest.approx(float(torch.cat(divergences).mean()), abs=2e-5)
        assert masked.teacher_loss == pytest.approx(float(torch.cat(teachers).mean()), abs=2e-5)
        accepted = None if compensate == "none" else pytest.approx(float(torch.cat(overlaps).mean()), abs=2e-5)
        assert masked.acceptance == accepted
        assert masked.tokens == sum(len(row) for row in losses)
    assert found[-1].kl < 1e-6  # nothing cut: the teacher itself
    assert found[0].kl > 1e-3


def test_each_tensor_is_read_once_for_all_candidates(teacher, labelled, monkeypatch):
    plans = [make_plan(teacher.config, teacher.family, None, PruneConfig(ffn=size)) for size in (32, 64, 96)]
    reads: Counter[str] = Counter()
    read = type(teacher.checkpoint).tensor
    monkeypatch.setattr(
        type(teacher.checkpoint), "tensor", lambda self, name: (reads.update([name]), read(self, name))[1]
    )
    score_masked(teacher.checkpoint, teacher.family, plans, labelled, calibration=teacher.batches, ridge=1e-2)
    layered = {name: count for name, count in reads.items() if ".layers." in name}
    assert layered
    assert set(layered.values()) == {1}


@pytest.mark.parametrize("experts", [False, True])
def test_states_on_the_disk_give_the_same_scores_and_go_away(
    teacher, teacher_class, labelled, tmp_path, monkeypatch, experts
):
    if experts:
        teacher = teacher_class(save_teacher("mixtral", tmp_path / "mixture"))
        for batch in labelled:
            batch.input_ids_BS, batch.labels_BS = batch.input_ids_BS % 64, batch.labels_BS.clamp_max(63)
    cuts = [{"ffn": 24, "heads": 2}, {"ffn": 40}]
    plans = [make_plan(teacher.config, teacher.family, None, PruneConfig(**cut)) for cut in cuts]
    folders = set()
    put = HiddenStates._put
    monkeypatch.setattr(
        HiddenStates, "_put", lambda self, *given: (folders.add(self._spool.parent.name), put(self, *given))
    )
    given = (teacher.checkpoint, teacher.family, plans, labelled)
    settings = {"calibration": teacher.batches, "ridge": 1e-2}
    plain = score_masked(*given, **settings)
    assert not folders
    assert score_masked(*given, **settings, scratch=Scratch(tmp_path / "masked", activation_bytes=1)) == plain
    assert folders == {"teacher", "calibration", "candidate-0", "candidate-1", *(["experts"] if experts else [])}
    assert not (tmp_path / "masked").exists()


def test_nothing_to_score_or_to_calibrate_on_is_refused(teacher, labelled):
    plan = make_plan(teacher.config, teacher.family, None, PruneConfig(ffn=64))
    with pytest.raises(DataError, match="calibration"):
        score_masked(teacher.checkpoint, teacher.family, [plan], labelled)
    for batch in labelled:
        batch.labels_BS.fill_(-100)
    with pytest.raises(DataError, match="no tokens"):
        score_masked(teacher.checkpoint, teacher.family, [plan], labelled, calibration=teacher.batches)
