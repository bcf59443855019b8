"""An objective and a source of targets, added here from outside, in whole distillations."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import pytest
import torch
from torch.nn import functional as F

from kdscale.config.distill import objectives as objective_table
from kdscale.config.distill import targets as source_table
from kdscale.config.distill.objective import ObjectiveConfig, Term
from kdscale.config.distill.targets import Needs, Source
from kdscale.data.batches import PackedLoader
from kdscale.data.heldout import eval_batches
from kdscale.data.token_store import TokenStore
from kdscale.distill.load_models import Folders
from kdscale.distill.objectives.base import StudentOutput
from kdscale.distill.replay import replay
from kdscale.errors import ConfigError
from kdscale.models.head import final_hidden, head_of
from kdscale.models.loading import load_model
from kdscale.runtime.progress import Reporter
from kdscale.teacher import online
from kdscale.teacher.source import MicroBatch, OpenedSource, SourceRequest
from kdscale.teacher.targets import Targets, TopKTargets
from kdscale_kernels import linear_topk_lse

CPU, K = torch.device("cpu"), 16


class HiddenMatchConfig(ObjectiveConfig):
    """Squared distance of the final hidden states, as a mean over sequences."""

    implementation = f"{__name__}:HiddenMatch"
    terms = (Term("cosine", "cosine of the hidden states", headline=True),)
    count: ClassVar[Literal["tokens", "sequences"]] = "sequences"

    name: Literal["hidden_match"] = "hidden_match"
    scale: float = 1.0

    @property
    def needs(self) -> Needs:
        return Needs(full=True)


class HiddenMatch:
    def __init__(self, settings: HiddenMatchConfig):
        self._scale = settings.scale

    def __call__(self, student: StudentOutput, targets: Targets, batch: MicroBatch) -> Any:
        assert targets.full is not None
        distance = (student.hidden_NH.float() - targets.full.hidden_NG.float()).square().sum() * self._scale
        cosine = F.cosine_similarity(student.hidden_NH.detach().float(), targets.full.hidden_NG.float()).sum()
        return distance, cosine.reshape(1)


@pytest.fixture
def hidden_match(monkeypatch):
    monkeypatch.setitem(objective_table.OBJECTIVES, "hidden_match", HiddenMatchConfig)
    return {"name": "hidden_match", "scale": 0.01}


def test_an_objective_is_added_by_a_row_and_a_class(
    distil, hidden_match, make_config, tiny_llama_dir, student_dir, data_dir, tmp_path
):
    """With another one beside it, at another weight; micro-batches do not change what it is a mean over."""
    divergence = {"name": "token_divergence", "targets": "full", "weight": 0.5}
    settings = {"objectives": [divergence, hidden_match], "tokens": 16 * 4 * 48, "optimizer": {"lr": 5e-4}}
    rows = distil(tmp_path / "run", **settings)
    train, validation = ([row for row in rows if row["kind"] == kind] for kind in ("train", "validation"))
    names = ["loss", "token_divergence", "hidden_match"]
    names += ["kd", "ce", "teacher_mass", "tail_mass", "top1_agree", "cosine"]
    assert [name for name in train[0] if name in names] == names
    assert {*names, "perplexity"} <= validation[0].keys()
    for row in rows:
        assert row["loss"] == pytest.approx(0.5 * row["token_divergence"] + row["hidden_match"], rel=1e-12)
    assert validation[-1]["hidden_match"] < 0.9 * validation[0]["hidden_match"]
    assert validation[-1]["cosine"] > validation[0]["cosine"]
    again = distil(tmp_path / "small", **settings, micro_batch=1)
    assert [r["loss"] for r in again] == pytest.approx([r["loss"] for r in rows], rel=2e-4)
    card = (tmp_path / "run" / "student" / "README.md").read_text()
    assert "0.5 × (0·CE + 1·T²·forward_kl, T = 1, whole vocabulary) + 1 × (hidden_match)" in card
    found = replay(
        make_config(**settings), Folders(tiny_llama_dir, student_dir, data_dir, tmp_path / "run"), 16,
        max_steps=1, nearest=False, reporter=Reporter(quiet=True),
    )  # fmt: skip
    assert found["same_bits"]
    assert found["hidden_match"] == train[-1]["hidden_match"]


RECORDED: dict[tuple[str, int], TopKTargets] = {}


class RecordedTargets:
    """Top-K targets that were computed before, sequence by sequence; no teacher is there any more."""

    model = torch.nn.Module()

    def __init__(self, gives: Needs):
        self.gives, self.prefetched = gives, 0

    def prefetch(self, batch: MicroBatch) -> None:
        assert all(key in RECORDED for key in batch.sequences)

    def targets(self, batch: MicroBatch) -> Targets:
        length, rows = batch.input_ids_BS.shape[1], batch.rows_N.tolist()
        stored = [(RECORDED[batch.sequences[row // length]], row % length) for row in rows]
        parts = [[getattr(entry, name)[at] for entry, at in stored] for name in ("ids_NK", "logits_NK", "lse_N")]
        ids_NK, logits_NK, lse_N = map(torch.stack, parts)
        return Targets(rows=batch.rows, top_k=TopKTargets(ids_NK, logits_NK, lse_N, 1.0, 320))

    def close(self) -> None:
        pass


def open_recorded(request: SourceRequest) -> OpenedSource:
    """Holds K entries, whatever is asked for."""
    return OpenedSource(320, lambda vocab_size: RecordedTargets(Needs(top_k=K)))


@pytest.fixture
def recorded(monkeypatch, make_config, tiny_llama_dir, data_dir):
    row = Source(name="recorded", gives=Needs(top_k=64), placements=("recorded",), open=f"{__name__}:open_recorded",
                 in_process=False)  # fmt: skip
    monkeypatch.setitem(source_table.SOURCES, "recorded", row)
    cfg, store = make_config().distill, TokenStore.open(data_dir)
    loader = PackedLoader(store.split("train"), cfg.seq_len, cfg.global_batch, cfg.micro_batch, 5)
    batches = [batch for step in range(8) for batch in loader.step(step)]
    batches += eval_batches(store.split("heldout"), cfg.seq_len, cfg.micro_batch, cfg.validate_tokens)
    model = load_model(tiny_llama_dir, dtype=torch.float32, device=CPU)
    with torch.no_grad():
        for batch in batches:
            hidden_BSH = final_hidden(model, batch.input_ids_BS, batch.position_ids_BS)
            for key, hidden_SH in zip(batch.sequences, hidden_BSH, strict=True):
                top = linear_topk_lse(hidden_SH, head_of(model).weight_VH, K)
                RECORDED[key] = TopKTargets(top.ids_NK, top.logits_NK, top.lse_N, 1.0, 320)
    yield
    RECORDED.clear()


def test_a_source_is_added_by_a_row_and_a_function(distil, recorded, tmp_path, monkeypatch):
    """Batches say which sequences they hold, and no weight of the teacher is read."""
    online_rows = distil(tmp_path / "online")
    monkeypatch.setattr(online, "place_teacher", lambda *_, **__: pytest.fail("the teacher was loaded"))
    rows = distil(tmp_path / "recorded", teacher_placement="recorded")
    assert [row["loss"] for row in rows] == pytest.approx([row["loss"] for row in online_rows], abs=1e-5)
    assert "mfu" not in rows[1]


def test_a_source_that_holds_less_than_its_row_says_is_refused_before_training(distil, recorded, tmp_path):
    wanted = {"objectives": [{"name": "token_divergence", "top_k": 32}]}
    with pytest.raises(ConfigError, match=r"the top 32 tokens \(it gives 16\)"):
        distil(tmp_path / "more", teacher_placement="recorded", **wanted)
    with pytest.raises(ConfigError, match=r"whole vocabulary; use replicated"):
        distil(tmp_path / "full", teacher_placement="recorded", objectives=[
            {"name": "token_divergence", "targets": "full"}
        ])  # fmt: skip
