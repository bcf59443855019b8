"""Slices, compensation and the checks that guard them, on tiny models of several kinds."""

from __future__ import annotations

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from kdscale.config.prune import PruneConfig
from kdscale.errors import CheckpointError, DataError, SelfCheckError
from kdscale.models.loading import load_model
from kdscale.prune import apply, self_check
from kdscale.prune.apply import apply_plan
from kdscale.prune.search.planning import make_plan
from kdscale.prune.slicing import Slicer
from kdscale.weights import Checkpoint

CUTS = {
    "ffn": {"ffn": 64},
    "heads": {"heads": 4},
    "kv_heads": {"kv_heads": 1},
    "hidden": {"hidden": 72},
    "layers": {"layers": 2},
    "all": {"ffn": 96, "heads": 2, "kv_heads": 1, "hidden": 64, "layers": 3},
}


def test_a_plan_that_cuts_nothing_copies_every_byte(teacher, tmp_path):
    plan = teacher.prune(tmp_path / "same", ffn=128)
    assert plan.cut_axes() == []
    before = load_file(teacher.checkpoint.path / "model.safetensors")
    after = load_file(tmp_path / "same" / "model.safetensors")
    assert before.keys() == after.keys()
    for name, value in before.items():
        assert torch.equal(value.view(torch.uint8), after[name].view(torch.uint8)), name
    assert (tmp_path / "same" / "tokenizer.json").read_bytes() == (
        teacher.checkpoint.path / "tokenizer.json"
    ).read_bytes()


@pytest.mark.parametrize("compensate", ["none", "ridge", "two_stream"])
@pytest.mark.parametrize("cut", CUTS)
def test_every_axis_passes_the_self_check(teacher, tmp_path, cut, compensate):
    plan = teacher.prune(tmp_path / "student", **CUTS[cut], compensate=compensate)
    figures = self_check.self_check(teacher.checkpoint, teacher.family, plan, tmp_path / "student", teacher.ids)
    assert max(figures.values()) < 1e-5
    config = load_model(tmp_path / "student", dtype=torch.float32, device=torch.device("cpu")).config
    assert (config.hidden_size, config.intermediate_size) == (plan.student.hidden, plan.student.ffn)
    assert (config.num_attention_heads, config.num_key_value_heads) == (plan.student.heads, plan.student.kv_heads)
    assert config.tie_word_embeddings
    if compensate == "none" and cut != "hidden":
        assert "lm_head.weight" not in load_file(tmp_path / "student" / "model.safetensors")


@pytest.mark.parametrize("kind", ["qwen3", "biased"])
@pytest.mark.parametrize("cut", [{"ffn": 32, "heads": 3, "hidden": 48, "layers": 2}, {"kv_heads": 2, "hidden": 64}])
def test_other_families_pass_it_too(other_teachers, tmp_path, kind, cut):
    teacher = other_teachers(kind)
    plan = teacher.prune(tmp_path / "student", **cut, max_shard_bytes=100_000)
    figures = self_check.self_check(teacher.checkpoint, teacher.family, plan, tmp_path / "student", teacher.ids)
    assert max(figures.values()) < 1e-5
    assert (tmp_path / "student" / "model.safetensors.index.json").is_file()


@pytest.mark.parametrize(
    ("axis", "named"),
    [("ffn", "ffn"), ("heads*head_dim", "heads"), ("kv_heads*head_dim", "heads"), ("hidden", "hidden")],
)
def test_an_off_by_one_slice_is_caught(teacher, tmp_path, monkeypatch, axis, named):
    plan = teacher.prune(tmp_path / "student", ffn=64, kv_heads=1, heads=2, hidden=64, compensate="none")
    right = Slicer.kept

    def wrong(self, name, position, expert=None):
        kept = right(self, name, position, expert)
        if name != axis or kept is None or position not in (1, None):
            return kept
        limit = self.plan.teacher.dims().axis_size(axis)
        return [*kept[:-1], kept[-1] + 1 if kept[-1] + 1 < limit else kept[-2] + 1 if kept[-2] + 1 < kept[-1] else 0]

    monkeypatch.setattr(Slicer, "kept", wrong)
    with pytest.raises(SelfCheckError) as caught:
        self_check.masked_equals_sliced(teacher.checkpoint, teacher.family, plan, teacher.ids)
    where = "the embedding" if axis == "hidden" else "teacher layer 1 "
    assert where in str(caught.value)
    assert f"axis: {named}" in str(caught.value)


def test_a_forgotten_norm_factor_is_caught(teacher, tmp_path, monkeypatch):
    plan = teacher.prune(tmp_path / "student", hidden=72)
    monkeypatch.setattr("kdscale.prune.slicing.is_hidden_norm", lambda spec: False)
    with pytest.raises(SelfCheckError, match="teacher layer 0"):
        self_check.masked_equals_sliced(teacher.checkpoint, teacher.family, plan, teacher.ids)


def test_a_damaged_file_is_caught(teacher, tmp_path):
    plan = teacher.prune(tmp_path / "student", ffn=64)
    path = tmp_path / "student" / "model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.2.input_layernorm.weight"][3] += 0.5  # two_stream rewrites every projection
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(SelfCheckError, match=r"layers\.2\.input_layernorm"):
        self_check.self_check(teacher.checkpoint, teacher.family, plan, tmp_path / "student", teacher.ids)


def test_a_model_that_does_not_load_cleanly_is_caught(teacher, tmp_path):
    teacher.prune(tmp_path / "student", ffn=64)
    path = tmp_path / "student" / "model.safetensors"
    tensors = load_file(path)
    del tensors["model.layers.1.input_layernorm.weight"]
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(SelfCheckError, match="missing_keys"):
        self_check.reload_parity(tmp_path / "student", teacher.family, teacher.ids)


@pytest.mark.parametrize("kind", ["biased", "qwen3"])
def test_a_student_too_large_to_load_whole_is_reloaded_from_its_files(other_teachers, tmp_path, monkeypatch, kind):
    teacher = other_teachers(kind)
    teacher.prune(tmp_path / "student", ffn=32, hidden=48, max_shard_bytes=100_000)
    whole = self_check.reload_parity(tmp_path / "student", teacher.family, teacher.ids)
    monkeypatch.setattr(self_check, "_IN_MEMORY_BYTES", 0)
    seen: list = []
    load = self_check.plain_load

    def spy(*args, **settings):
        seen.append(load(*args, **settings))
        return seen[-1]

    monkeypatch.setattr(self_check, "plain_load", spy)
    figures = self_check.reload_parity(tmp_path / "student", teacher.family, teacher.ids)
    assert all(parameter.is_meta for parameter in seen[0].model.layers.parameters())
    assert figures.keys() == whole.keys()
    assert max(figures.values()) < 1e-5
    path = next(path for path in (tmp_path / "student").glob("*.safetensors") if "model.norm.weight" in load_file(path))
    tensors = load_file(path)
    del tensors["model.norm.weight"]
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises((SelfCheckError, CheckpointError)):
        self_check.reload_parity(tmp_path / "student", teacher.family, teacher.ids)


def test_the_same_plan_gives_the_same_bytes(teacher, tmp_path):
    for name in ("one", "two"):
        teacher.prune(tmp_path / name, **CUTS["all"])
    one = {path.name: path.read_bytes() for path in (tmp_path / "one").iterdir()}
    assert one == {path.name: path.read_bytes() for path in (tmp_path / "two").iterdir()}


@pytest.mark.parametrize("rows", [1, 3, 7])
@pytest.mark.parametrize("kind", ["tiny", "biased", "qwen3"])
def test_large_tensors_pass_in_blocks_of_rows(teacher, other_teachers, tmp_path, monkeypatch, kind, rows):
    one = teacher if kind == "tiny" else other_teachers(kind)
    monkeypatch.setattr(apply, "_BLOCK_BYTES", rows * 4 * one.family.dims(one.config).hidden)
    plan = one.prune(tmp_path / "student", ffn=32, kv_heads=1, heads=2, hidden=48, layers=2, compensate="none")
    student = Checkpoint.open(tmp_path / "student")
    self_check.files_equal_slices(one.checkpoint, one.family, plan, student)


@pytest.mark.parametrize("cut", [{"ffn": 64}, {"heads": 2}, {"ffn": 64, "heads": 4, "hidden": 64, "layers": 3}])
def test_compensation_brings_each_projection_nearer_to_the_teachers(teacher, tmp_path, cut):
    plan = teacher.prune(tmp_path / "ridge", **cut, compensate="ridge", layer_repair="none")
    inputs = _teacher_inputs(teacher)
    slicer = Slicer(teacher.config, teacher.family, plan)
    student = load_file(tmp_path / "ridge" / "model.safetensors")
    for position in range(plan.student.layers):
        for source, target, spec, _ in slicer.layer(position):
            if spec.role not in ("down", "o") or slicer.kept(spec.axes[1], position) is None:
                continue
            kept, rows = slicer.kept(spec.axes[1], position), slicer.kept("hidden", None)
            whole = teacher.checkpoint.tensor(source)
            whole = whole if rows is None else whole[rows]
            x = inputs[source]
            wanted = x @ whole.T
            sliced_error = (x[:, kept] @ whole[:, kept].T - wanted).square().sum()
            ridge_error = (x[:, kept] @ student[target].T - wanted).square().sum()
            assert ridge_error < 0.95 * sliced_error, target


def test_the_regression_is_the_stated_minimum(teacher, tmp_path):
    """The gradient of ‖x_K W'ᵀ − x Wᵀ‖² + λ‖W' − W_K‖² vanishes at the written weight."""
    plan = teacher.prune(tmp_path / "ridge", ffn=64, ridge_lambda=0.05, compensate="ridge")
    name, kept = "model.layers.2.mlp.down_proj.weight", plan.kept.ffn[2]
    x = _teacher_inputs(teacher)[name].double()
    whole = teacher.checkpoint.tensor(name).double()
    written = load_file(tmp_path / "ridge" / "model.safetensors")[name].double()
    penalty = 0.05 * x[:, kept].square().sum(0).mean()
    gradient = (x[:, kept] @ written.T - x @ whole.T).T @ x[:, kept] + penalty * (written - whole[:, kept])
    assert gradient.abs().max() < 1e-4 * (x @ whole.T).T.matmul(x[:, kept]).abs().max()
    assert (written - whole[:, kept]).abs().max() > 1e-3


def test_compensation_without_calibration_is_refused(teacher, tmp_path):
    cfg = PruneConfig(ffn=64)
    plan = make_plan(teacher.config, teacher.family, None, cfg)
    with pytest.raises(DataError, match="calibration"):
        apply_plan(teacher.checkpoint, teacher.family, plan, tmp_path, cfg)
    assert not list(tmp_path.glob("*.safetensors"))


def test_a_pruned_folder_can_be_pruned_again(teacher, tmp_path):
    teacher.prune(tmp_path / "first", **CUTS["all"], compensate="none")
    again = type(teacher)(tmp_path / "first")
    plan = again.prune(tmp_path / "second", ffn=32, compensate="none")
    self_check.self_check(again.checkpoint, again.family, plan, tmp_path / "second", teacher.ids)
    shutil.rmtree(tmp_path / "first")
    load_model(tmp_path / "second", dtype=torch.float32, device=torch.device("cpu"))


def _teacher_inputs(teacher) -> dict[str, torch.Tensor]:
    """What every down_proj and o_proj of the whole teacher reads: weight name → [N, U]."""
    model = load_model(teacher.checkpoint.path, dtype=torch.float32, device=torch.device("cpu"))
    seen: dict[str, list[torch.Tensor]] = {}

    def keep(name):
        return lambda _module, args: seen.setdefault(f"{name}.weight", []).append(args[0].flatten(0, 1))

    for name, module in model.named_modules():
        if name.endswith(("down_proj", "o_proj")):
            module.register_forward_pre_hook(keep(name))
    with torch.inference_mode():
        for batch in teacher.batches:
            model(input_ids=batch.input_ids_BS, position_ids=batch.position_ids_BS, use_cache=False)
    return {name: torch.cat(parts) for name, parts in seen.items()}
