"""Models of several modalities: their language model is pruned in its place, and the whole still loads."""

from __future__ import annotations

import json
import re
import shutil
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from kdscale.config.load import build_config
from kdscale.config.prune import PruneConfig
from kdscale.errors import CheckpointError, ConfigError
from kdscale.families import load_family, nested_types
from kdscale.models.loading import load_model, open_teacher
from kdscale.models.parameter_map import ParameterReader, assemble
from kdscale.models.skeleton import build_skeleton
from kdscale.pipeline.stage import StageContext
from kdscale.pipeline.stages.registry import STAGES
from kdscale.prune import self_check
from kdscale.prune.apply import apply_plan
from kdscale.prune.rotation import rotated_teacher
from kdscale.prune.search.planning import make_plan
from kdscale.prune.stream_cut import StreamBasis
from kdscale.runs.folder import RunFolder
from kdscale.runtime.progress import Reporter
from tests.integration.prune.family_table import random_scores
from tests.integration.prune.nested_table import WHOLE, load_whole, save_whole

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def whole(tmp_path_factory, teacher_class):
    made: dict[str, Any] = {}

    def get(model_type: str) -> Any:
        if model_type not in made:
            made[model_type] = teacher_class(save_whole(model_type, tmp_path_factory.mktemp(model_type)))
        return made[model_type]

    return get


def cut_of(family: Any) -> dict[str, int]:
    """All axes at once; the hidden one too where the file says how."""
    cut = {"ffn": 32, "heads": 2, "kv_heads": 1, "layers": 2}
    if family.nested.constraints:  # heads * head_dim is hidden
        return {**cut, "hidden": 16}
    cut = cut if family.nested.hidden_fixed else {**cut, "hidden": 24}
    return {axis: size for axis, size in cut.items() if axis not in family.data.uncut}


def test_every_shipped_file_is_in_this_table():
    assert set(nested_types()) == set(WHOLE)


@pytest.mark.parametrize("model_type", sorted(WHOLE))
def test_the_language_model_is_cut_in_its_place_and_the_whole_loads(whole, tmp_path, model_type):
    teacher, out = whole(model_type), tmp_path / "student"
    before = load_file(teacher.checkpoint.path / "model.safetensors")
    plan = teacher.prune(
        out, **cut_of(teacher.family), compensate="none", hidden_method="activation", layer_repair="none"
    )
    figures = self_check.self_check(teacher.checkpoint, teacher.family, plan, out, teacher.ids)
    assert max(figures.values()) < 1e-5
    after = load_file(out / "model.safetensors")
    assert len(teacher.checkpoint.carried) > 10
    for name in teacher.checkpoint.carried:
        expected = before[name]
        for dimension, axis in enumerate(teacher.family.carried_axes(name)):
            if axis is not None:
                expected = expected.index_select(dimension, torch.tensor(plan.kept.hidden))
        assert torch.equal(after[name], expected), name
    student = load_whole(out)
    text = load_model(out, dtype=torch.float32, device=CPU)
    assert torch.equal(student(input_ids=teacher.ids).logits, text(input_ids=teacher.ids).logits)
    config = json.loads((out / "config.json").read_text())
    assert config["architectures"] == teacher.config["architectures"]
    assert config["vision_config"].keys() == teacher.config["vision_config"].keys()
    assert config["text_config"]["head_dim"] == 8
    assert config["text_config"].get("rope_parameters") == teacher.config["text_config"].get("rope_parameters")


def test_images_enter_the_cut_stream_as_the_kept_channels(whole, tmp_path):
    teacher, out = whole("gemma3"), tmp_path / "student"
    plan = teacher.prune(out, hidden=24, compensate="none", hidden_method="activation")
    pixels = torch.randn(1, 3, 28, 28, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        before, after = (
            load_whole(folder).get_image_features(pixels).pooler_output for folder in (teacher.checkpoint.path, out)
        )
    assert before.abs().mean() > 0.01
    assert torch.allclose(before[..., plan.kept.hidden], after, atol=1e-6)


@pytest.mark.parametrize(("model_type", "method"), [("smolvlm", "pca"), ("gemma3", "refit")])
def test_a_projector_writes_the_combinations_that_the_stream_is_cut_to(whole, tmp_path, model_type, method):
    teacher, out, cfg = whole(model_type), tmp_path / "student", PruneConfig(hidden=24, hidden_method=method)
    scores = teacher.scores(tmp_path / "scores", hidden=24, hidden_method=method)
    checkpoint, basis = teacher.checkpoint, None
    if method == "pca":
        checkpoint = rotated_teacher(checkpoint, teacher.family, scores)
        rows_HD = torch.from_numpy(scores["hidden.rotation"])[:24]
    else:
        basis = StreamBasis.of(scores, 24)
        rows_HD = basis.rows_HD
    plan = make_plan(checkpoint.config, teacher.family, scores, cfg)
    out.mkdir()
    quiet = Reporter(quiet=True)
    apply_plan(checkpoint, teacher.family, plan, out, cfg, batches=teacher.batches, reporter=quiet, basis=basis)
    self_check.self_check(checkpoint, teacher.family, plan, out, teacher.ids)
    load_whole(out)
    (name,) = [name for name in checkpoint.carried if teacher.family.carried_axes(name)]
    before, after = teacher.checkpoint.tensor(name).double(), load_file(out / "model.safetensors")[name].double()
    rows_HD = rows_HD.double()
    expected = rows_HD @ before if teacher.family.carried_axes(name)[0] else before @ rows_HD.T
    assert torch.allclose(after, expected, atol=1e-5)
    assert len(checkpoint.carried) > 10


@pytest.mark.parametrize("model_type", ["gemma3", "qwen2_5_vl"])
def test_names_of_other_versions_are_read(whole, tmp_path, model_type):
    """transformers 4.52 to 4.57 wrote the modules' own names; what is written is what transformers writes now."""
    teacher, other = whole(model_type), tmp_path / "other"
    other.mkdir()
    now = load_file(teacher.checkpoint.path / "model.safetensors")
    then = {
        re.sub(r"^(language_model\.model|model)\.", "model.language_model.", name)
        if teacher.family.carried(name) is False
        else f"model.{name}": value
        for name, value in now.items()
    }
    then = {name.replace("model.language_model.lm_head", "lm_head"): value for name, value in then.items()}
    assert then.keys() != now.keys()
    save_file(then, other / "model.safetensors", {"format": "pt"})
    (other / "config.json").write_text((teacher.checkpoint.path / "config.json").read_text())
    checkpoint, _ = open_teacher(other)
    assert set(checkpoint.names) == set(teacher.checkpoint.names)
    assert set(checkpoint.carried) == set(teacher.checkpoint.carried)
    logits = [
        load_model(folder, dtype=torch.float32, device=CPU)(input_ids=teacher.ids).logits
        for folder in (other, teacher.checkpoint.path)
    ]
    assert torch.equal(*logits)


def test_the_flat_config_of_older_qwen_files_is_read_and_written(whole, tmp_path):
    teacher = whole("qwen2_5_vl")
    config = json.loads((teacher.checkpoint.path / "config.json").read_text())
    text = config.pop("text_config")
    del text["model_type"]
    text["rope_scaling"] = {"type": "mrope", "mrope_section": [1, 1, 2]}
    text["rope_theta"] = text.pop("rope_parameters")["rope_theta"]
    flat = tmp_path / "flat"
    flat.mkdir()
    (flat / "config.json").write_text(json.dumps({**text, **config}))
    save_file(load_file(teacher.checkpoint.path / "model.safetensors"), flat / "model.safetensors", {"format": "pt"})
    reference = load_whole(flat)(input_ids=teacher.ids).logits
    assert torch.equal(load_model(flat, dtype=torch.float32, device=CPU)(input_ids=teacher.ids).logits, reference)
    student = type(teacher)(flat)
    student.prune(tmp_path / "student", ffn=32, layers=2, compensate="none", layer_repair="none")
    written = json.loads((tmp_path / "student" / "config.json").read_text())
    assert written["intermediate_size"] == 32
    assert written["num_hidden_layers"] == 2
    assert written["rope_scaling"] == text["rope_scaling"]
    assert written["model_type"] == "qwen2_5_vl"
    assert load_whole(tmp_path / "student").config.text_config.intermediate_size == 32


def test_a_projector_whose_inner_layer_is_as_wide_keeps_the_hidden_size(whole):
    teacher = whole("llava")
    scores = random_scores(teacher.config, teacher.family)
    with pytest.raises(ConfigError, match="projector's inner layer"):
        make_plan(teacher.config, teacher.family, scores, PruneConfig(hidden=24))


def test_parts_of_the_language_model_are_read_by_rank(whole):
    """What ZeRO-3 and sharded teachers read: ranges of parameters, without a whole model."""
    teacher = whole("qwen3_vl")
    weights = ParameterReader.open(teacher.checkpoint.path)
    skeleton = build_skeleton(weights, dtype=torch.float32)
    name = "model.layers.1.mlp.down_proj.weight"
    assert name in dict(skeleton.named_parameters())
    values = torch.empty(32 * 48)
    weights.fill(name, 0, values)
    on_disk = load_file(teacher.checkpoint.path / "model.safetensors")
    assert torch.equal(values.view(32, 48), on_disk["model.language_model.layers.1.mlp.down_proj.weight"])


def test_a_whole_model_that_is_not_described_is_refused(whole, tmp_path):
    config = whole("llava").config
    with pytest.raises(CheckpointError, match="text_config"):
        load_family({**config, "text_config": "llama"}, "config.json")
    with pytest.raises(CheckpointError, match="language model's model_type"):
        load_family({**config, "text_config": {**config["text_config"], "model_type": "strange"}}, "config.json")
    with pytest.raises(CheckpointError, match="several modalities"):
        load_family({"model_type": "strange", "text_config": {"model_type": "llama"}}, "config.json")
    extra = tmp_path / "extra"
    extra.mkdir()
    tensors = load_file(whole("llava").checkpoint.path / "model.safetensors")
    save_file({**tensors, "audio_tower.weight": torch.zeros(2)}, extra / "model.safetensors", {"format": "pt"})
    (extra / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"1 unexpected: audio_tower\.weight"):
        open_teacher(extra)


def test_the_disk_check_counts_what_goes_along(whole, tmp_path):
    tree = {"name": "t", "run_dir": str(tmp_path / "run"), "teacher": {"path": "t"}, "prune": {"ffn": 32}}
    needed = {}
    for name in ("gemma3", "text alone"):
        teacher = whole("gemma3").checkpoint.path if name == "gemma3" else tmp_path
        context = StageContext(build_config(tree, "here"), RunFolder(tmp_path / "run"), teacher, Reporter(quiet=True))
        needed[name] = [stage.disk_bytes(context, 1000) for stage in (STAGES["prune"], STAGES["distill"])]
    carried = sum(whole("gemma3").checkpoint.tensor(name).nbytes for name in whole("gemma3").checkpoint.carried)
    assert carried > 0
    assert needed["gemma3"] == [size + carried for size in needed["text alone"]]


def test_stacked_experts_of_a_language_model_are_read_as_single_ones(whole, tmp_path):
    """Qwen3.5 mixtures have them so on the hub; transformers writes one by one."""
    single = whole("qwen3_5_moe").checkpoint
    family = load_family(single.config, "config.json")
    tensors = {name: single.tensor(name) for name in (*single.names, *single.carried)}
    specs = {name: spec for name, spec in family.tensors(single.config).items() if spec.expert is not None}
    stacked = {
        name.replace("model.", "model.language_model.", 1): t for name, t in assemble(specs, single.tensor).items()
    }
    folder = tmp_path / "stacked"
    shutil.copytree(single.path, folder)
    rest = {name: tensor for name, tensor in tensors.items() if name not in specs}
    save_file({**rest, **{name: t.contiguous() for name, t in stacked.items()}}, folder / "model.safetensors")
    read, _ = open_teacher(folder)
    assert set(read.names) == set(single.names)
    assert all(torch.equal(read.tensor(name), single.tensor(name)) for name in specs)
    load_whole(folder)
