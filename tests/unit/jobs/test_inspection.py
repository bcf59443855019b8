"""`kdscale inspect`: what a folder or a file is, what can be cut, how large the outcome is, what is in the way."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from kdscale.cli.main import make_app
from kdscale.errors import CheckpointError, ConfigError
from kdscale.families import load_family, supported_types
from kdscale.jobs.inspection import inspect_path
from kdscale.jobs.inspection.cuts import axes_of, typical_cuts
from kdscale.packaging.gguf_writer import write_gguf
from kdscale.runtime.progress import Reporter
from tests.integration.prune.family_table import VARIANTS, tiny_config


def test_a_plain_checkpoint(tiny_llama_dir: Path) -> None:
    facts = inspect_path(tiny_llama_dir)
    on_disk = sum(value.numel() for value in load_file(tiny_llama_dir / "model.safetensors").values())
    assert facts["kind"] == "checkpoint"
    assert facts["family"] == "llama"
    assert facts["tied"] is True
    assert facts["parameters"]["total"] == on_disk == facts["parts"][0]["parameters"]
    assert facts["weights"]["dtypes"] == {"F32": on_disk}
    assert facts["problems"] == []
    assert facts["axes"]["ffn"] == {"size": 128, "cuttable": True, "together_with": []}
    assert facts["axes"]["experts"]["why"] == "a dense model has none"
    cuts = {cut["cut"]: cut for cut in facts["cuts"]}
    assert cuts["as it is"]["bf16_bytes"] == 2 * on_disk
    assert cuts["ffn to 1/2"]["sizes"] == {"ffn": 64}
    assert cuts["ffn to 1/2"]["parameters"] == on_disk - 4 * 3 * 64 * 96
    assert cuts["kv heads to 1/2"]["sizes"] == {"kv_heads": 1}


@pytest.mark.parametrize("model_type", [*supported_types(), *VARIANTS])
def test_every_typical_cut_is_a_model_that_its_family_allows(model_type: str) -> None:
    config = tiny_config(model_type)
    family = load_family(config, "config.json")
    dims = family.dims(config)
    cuts = typical_cuts(family, config, dims, lambda _: 0)
    assert len(cuts) > 3
    sizes = [cut["parameters"] for cut in cuts]
    assert max(sizes[1:]) < sizes[0] == family.count_params(config).total
    for cut in cuts:
        assert family.violations(dims.replace(**cut["sizes"])) == []
    axes = axes_of(family, dims)
    assert axes["ffn"]["cuttable"], axes["ffn"]
    for axis, fact in axes.items():
        assert fact["cuttable"] or fact["why"], axis


def test_what_is_in_the_way_is_said_and_nothing_of_the_folder_is_run(tiny_llama_dir: Path, tmp_path: Path) -> None:
    folder = tmp_path / "odd"
    shutil.copytree(tiny_llama_dir, folder)
    (folder / "tokenizer.json").unlink()
    (folder / "modeling_evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    config = json.loads((folder / "config.json").read_text())
    config |= {"auto_map": {"AutoModelForCausalLM": "modeling_evil.Evil"}}
    (folder / "config.json").write_text(json.dumps(config))
    tensors = load_file(folder / "model.safetensors")
    save_file({**tensors, "extra.weight": torch.zeros(2)}, folder / "model.safetensors")
    answer = CliRunner().invoke(make_app(), ["inspect", str(folder), "--json"])
    assert answer.exit_code == 0, answer.output
    facts = json.loads(answer.output)
    assert facts["own_code"] is True
    assert not (tmp_path / "ran").exists()
    assert any("1 unexpected: extra.weight" in problem for problem in facts["problems"])
    assert any("no tokenizer" in problem for problem in facts["problems"])
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "\x1b[2Jevil"}))
    shown = CliRunner().invoke(make_app(), ["inspect", str(folder)])
    assert shown.exit_code == 0, shown.output
    assert "in the way" in shown.output
    assert "\x1b[2J" not in shown.output


def test_a_terminal_shows_it(tiny_llama_dir: Path) -> None:
    shown = CliRunner().invoke(make_app(), ["inspect", str(tiny_llama_dir)], env={"COLUMNS": "120"})
    assert shown.exit_code == 0, shown.output
    for text in ("llama", "What can be cut", "ffn to 1/2", "Nothing stands in the way", "tied to the embedding"):
        assert text in shown.output


def test_an_adapter(tmp_path: Path) -> None:
    settings = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "base_model_name_or_path": "org/base"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    names = [f"base_model.model.model.layers.0.mlp.up_proj.lora_{part}.weight" for part in "AB"]
    save_file(
        dict(zip(names, (torch.ones(4, 8), torch.ones(6, 4)), strict=True)), tmp_path / "adapter_model.safetensors"
    )
    facts = inspect_path(tmp_path)
    assert facts["adapter"] == {"type": "LORA", "of": "org/base", "rank": "4", "modules": 1, "replaced": 0}
    assert facts["problems"] == []
    (tmp_path / "adapter_config.json").write_text(json.dumps({**settings, "use_qalora": True}))
    assert "QALoRA" in inspect_path(tmp_path)["problems"][0]


def test_a_gguf_file(tiny_llama_dir: Path, tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    path = tmp_path / "tiny.gguf"
    write_gguf(tiny_llama_dir, path, "f16", Reporter(quiet=True), name="tiny")
    facts, checkpoint = inspect_path(path), inspect_path(tiny_llama_dir)
    assert (facts["kind"], facts["family"], facts["quantization"]) == ("gguf", "llama", "F16")
    for same in ("sizes", "parameters", "tied", "context", "axes", "cuts"):
        assert facts[same] == checkpoint[same], same
    assert facts["problems"] == []
    path.write_bytes(b"GGUF" + b"\xff" * 64)
    with pytest.raises(CheckpointError, match="not a readable GGUF file"):
        inspect_path(path)


def test_what_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"a model's folder, or a \.gguf file"):
        inspect_path(tmp_path / "absent")
    with pytest.raises(CheckpointError, match=r"config\.json is missing"):
        inspect_path(tmp_path)
