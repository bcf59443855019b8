"""Every form of a tiny student, as plain transformers loads it from its folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from kdscale.config.quantize import FormConfig, Fp8Config, Int4Config, Int8Config
from kdscale.errors import CheckpointError
from kdscale.eval.sizes import model_sizes, weight_bytes
from kdscale.files import read_json, write_json
from kdscale.models.loading import load_model, open_teacher, quantization_of
from kdscale.quantize.forms import Quantized, make_form
from kdscale.quantize.write import finish_folder, open_writer, quantized_names, write_weights
from kdscale.runtime.progress import Reporter

CPU = torch.device("cpu")
FORMS = [Int8Config(), Int4Config(method="rtn"), Fp8Config()]
# how far logits may be: random weights carry every error on
WITHIN = {"int8": 0.1, "fp8": 0.5, "int4": 0.7}
IDS = torch.arange(24).view(2, 12) * 7 % 320


@pytest.fixture(scope="module")
def bf16_student(tiny_llama_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bf16")
    model = AutoModelForCausalLM.from_pretrained(tiny_llama_dir, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    (folder / "tokenizer.json").write_bytes((tiny_llama_dir / "tokenizer.json").read_bytes())
    return folder


def write(student: Path, settings: FormConfig, out: Path, max_shard_bytes: int = 1 << 30) -> Callable[[str], Quantized]:
    """Write a form of the student; returns what each of its maps became."""
    checkpoint, family = open_teacher(student)
    form = make_form(settings)
    with open_writer(checkpoint, family, form, out, max_shard_bytes) as writer:
        write_weights(writer, checkpoint, family, form, None, CPU, Reporter(quiet=True))
    finish_folder(checkpoint, family, form, out, "card", code=False)
    return lambda name: form.round(checkpoint.tensor(name))


def with_values(student: Path, made: Callable[[str], Quantized], dtype: torch.dtype) -> Any:
    """The student's model with the weights that we say the form has."""
    checkpoint, family = open_teacher(student)
    model = load_model(student, dtype=dtype, device=CPU)
    parameters = dict(model.named_parameters())
    for name in quantized_names(checkpoint, family):
        parameters[name].data = made(name).values().to(dtype)
    return model


@pytest.mark.parametrize("settings", FORMS, ids=lambda form: form.label)
def test_what_transformers_loads_is_what_we_say_is_written(settings: FormConfig, bf16_student: Path, tmp_path) -> None:
    made = write(bf16_student, settings, tmp_path)
    ours = with_values(bf16_student, made, torch.float32)
    loaded = load_model(tmp_path, dtype=torch.float32, device=CPU)
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(loaded.get_parameter(name), parameter, rtol=0, atol=0)
    with torch.inference_mode():
        torch.testing.assert_close(loaded(IDS).logits, ours(IDS).logits, rtol=0, atol=0)
        original = load_model(bf16_student, dtype=torch.float32, device=CPU)(IDS).logits
        assert 0 < (original - ours(IDS).logits).norm() / original.norm() < WITHIN[settings.name]


@pytest.mark.parametrize("settings", FORMS, ids=lambda form: form.label)
def test_plain_from_pretrained_runs_it(settings: FormConfig, bf16_student: Path, tmp_path: Path) -> None:
    made = write(bf16_student, settings, tmp_path)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    with torch.inference_mode():
        got, expected = plain(IDS).logits, with_values(bf16_student, made, torch.bfloat16)(IDS).logits
    # fp8 rounds activations too, as no other form does
    assert (got - expected).float().norm() / expected.float().norm() < (
        WITHIN["fp8"] if settings.name == "fp8" else 0.02
    )


def test_sizes_are_of_the_parameters_and_of_the_packed_bytes(bf16_student: Path, tmp_path: Path) -> None:
    write(bf16_student, Int4Config(method="rtn"), tmp_path, max_shard_bytes=20_000)
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 3
    models = {path: load_model(path, dtype=torch.float32, device=CPU) for path in (bf16_student, tmp_path)}
    before, after = (model_sizes(model, path) for path, model in models.items())
    assert {**before, "weight_bytes": 0} == {**after, "weight_bytes": 0}
    maps = 4 * (96 * 96 * 2 + 2 * 32 * 96 + 3 * 96 * 128)
    heads = before["weight_bytes"] - 2 * before["parameters"]  # of the file
    expected = 2 * (before["parameters"] - maps) + maps // 2 + 2 * maps // 32
    assert expected < weight_bytes(tmp_path) < expected + 28 * 3 * 200 + 16 * 500 + heads


def test_config_json_says_what_is_quantised(bf16_student: Path, tmp_path: Path) -> None:
    write(bf16_student, Int4Config(method="rtn"), tmp_path)
    said = read_json(tmp_path / "config.json")["quantization_config"]
    assert said["quant_method"] == "compressed-tensors" and said["format"] == "pack-quantized"
    assert said["ignore"] == ["lm_head"]
    weights = said["config_groups"]["group_0"]["weights"]
    assert (weights["num_bits"], weights["group_size"], weights["strategy"]) == (4, 32, "group")
    assert quantization_of(bf16_student) is None and quantization_of(tmp_path) == said
    assert (tmp_path / "tokenizer.json").is_file()


@pytest.mark.parametrize("said", [7, [], {}, {"quant_method": "hqq"}, {"quant_method": None}, "compressed-tensors"])
def test_other_quantised_models_are_refused_by_name(tiny_llama_dir: Path, tmp_path: Path, said: Any) -> None:
    write_json(tmp_path / "config.json", {**read_json(tiny_llama_dir / "config.json"), "quantization_config": said})
    with pytest.raises(CheckpointError, match=r"quantization_config\n  expected: .*compressed-tensors"):
        load_model(tmp_path, dtype=torch.float32, device=CPU)


def test_a_config_that_says_another_group_than_the_scales_have_is_refused(bf16_student: Path, tmp_path: Path) -> None:
    write(bf16_student, Int4Config(method="rtn"), tmp_path)
    config = read_json(tmp_path / "config.json")
    config["quantization_config"]["config_groups"]["group_0"]["weights"]["group_size"] = 48
    write_json(tmp_path / "config.json", config)
    with pytest.raises(CheckpointError):
        load_model(tmp_path, dtype=torch.float32, device=CPU)
