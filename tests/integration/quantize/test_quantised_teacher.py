"""A quantised teacher and the plain model that it stands for are one and the same to every stage."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from kdscale.config.load import load_config
from kdscale.distill.parallel.tensor_parallel import fill_slice
from kdscale.distill.parallel.tensor_slices import TensorSlice
from kdscale.errors import CheckpointError
from kdscale.files import read_json, write_json
from kdscale.models.loading import load_model, open_teacher
from kdscale.models.lora.adapter_files import open_adapter
from kdscale.models.lora.merging import MergePlan, merge_adapters
from kdscale.models.parameter_map import ParameterReader
from kdscale.pipeline.checks import plan_shapes
from kdscale.pipeline.runner import run_until
from kdscale.runs.folder import RunFolder
from kdscale.runtime.progress import Reporter
from kdscale.teacher.placement.placed import place_teacher
from kdscale.weights import Checkpoint
from tests.unit.weights import quantising

CPU = torch.device("cpu")
QUIET = Reporter(quiet=True)
IDS = torch.arange(3, 35).reshape(2, 16)
SETTINGS = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": True, "lm_head": False}


@pytest.fixture(scope="module")
def twins(tiny_llama_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The tiny Llama with random matrices in its layers: as GPTQ writes them, and plain."""
    folders = [
        Path(shutil.copytree(tiny_llama_dir, tmp_path_factory.mktemp("twins") / name)) for name in ("gptq", "plain")
    ]
    stored, plain = dict[str, torch.Tensor](), dict[str, torch.Tensor]()
    for number, (name, value) in enumerate(load_file(tiny_llama_dir / "model.safetensors").items()):
        stored[name] = plain[name] = value
        if name.endswith("proj.weight") and ".layers.0." not in name:  # as with modules_in_block_to_quantize
            tensors, matrix = quantising.gptq(
                name.removesuffix(".weight"), tuple(value.shape), bits=4, group=32, version=1, ordered=True, seed=number
            )
            del stored[name]
            stored, plain[name] = stored | tensors, matrix.float()
    config = {**read_json(tiny_llama_dir / "config.json"), "dtype": "float32"}
    for folder, tensors, more in zip(folders, (stored, plain), ({"quantization_config": SETTINGS}, {}), strict=True):
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        write_json(folder / "config.json", config | more)
    return folders[0], folders[1]


def test_every_tensor_and_every_logit_is_the_plain_one(twins: tuple[Path, Path]) -> None:
    (quantised, family), (plain, _) = open_teacher(twins[0]), open_teacher(twins[1])
    assert quantised.config == plain.config
    assert sorted(quantised.names) == sorted(plain.names)
    assert all(torch.equal(quantised.tensor(name), plain.tensor(name)) for name in plain.names)
    assert quantised.quantised is not None and quantised.quantised.matrices == 21
    assert quantised.quantised.bytes_on_disk < plain.nbytes
    with torch.inference_mode():
        expected = load_model(twins[1], dtype=torch.float32, device=CPU)(IDS).logits
        loaded = load_model(twins[0], dtype=torch.float32, device=CPU)
        assert torch.equal(loaded(IDS).logits, expected)
        assert not hasattr(loaded.config, "quantization_config")
        placed = place_teacher(twins[0], "offloaded", dtype=torch.float32, device=CPU)
        hidden = placed.model.get_submodule(family.sites.layers.rpartition(".")[0])(IDS).last_hidden_state
        with placed.head() as head:
            assert torch.equal(head.logits(hidden), expected)


def test_biases_of_zeros_that_a_quantiser_added_are_left_out(twins: tuple[Path, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(twins[0], tmp_path / "biased"))
    tensors, name = load_file(folder / "model.safetensors"), "model.layers.2.mlp.up_proj.bias"
    save_file({**tensors, name: torch.zeros(128)}, folder / "model.safetensors", {"format": "pt"})
    checkpoint, family = open_teacher(folder)
    assert name not in checkpoint.names
    save_file({**tensors, name: torch.ones(128)}, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"1 unexpected: model\.layers\.2\.mlp\.up_proj\.bias"):
        Checkpoint.open(folder).verify_against(family)


def test_an_adapter_of_it_is_merged_into_the_plain_model(twins: tuple[Path, Path], tmp_path: Path) -> None:
    name, adapter = "model.layers.1.self_attn.q_proj", tmp_path / "adapter"
    adapter.mkdir()
    rng = torch.Generator().manual_seed(1)
    low_rank = {"lora_A": torch.randn(4, 96, generator=rng), "lora_B": torch.randn(96, 4, generator=rng)}
    tensors = {f"base_model.model.{name}.{part}.weight": value for part, value in low_rank.items()}
    save_file(tensors, adapter / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": 4, "lora_alpha": 6, "target_modules": ["q_proj"]}
    write_json(adapter / "adapter_config.json", settings)
    merged = []
    for folder in twins:
        plan, out = MergePlan.of(*open_teacher(folder), [open_adapter(adapter)]), tmp_path / folder.name
        merge_adapters(plan, out, max_shard_bytes=1 << 30, journal=tmp_path / f"{folder.name}.json")
        merged.append(Checkpoint.open(out))
    quantised, plain = merged
    assert quantised.quantised is None and quantised.config == plain.config
    assert all(torch.equal(quantised.tensor(name), plain.tensor(name)) for name in plain.names)


def test_ranks_read_their_slices_of_it(twins: tuple[Path, Path]) -> None:
    """What tensor parallelism and ZeRO-3 load a model with."""
    readers = [ParameterReader.open(folder) for folder in twins]
    name = "model.layers.1.mlp.down_proj.weight"
    shape = (96, 128)
    for part, begin, length in (
        (TensorSlice(1, 32, 64), 40, 96 * 32 - 40),
        (TensorSlice(0, 24, 48), 5, 24 * 128 - 5),
        (None, 3, 7),
    ):
        got, expected = torch.empty(length), torch.empty(length)
        for weights, out in zip(readers, (got, expected), strict=True):
            fill_slice(weights, name, part, shape, begin, out)
        assert torch.equal(got, expected)


def test_a_plan_says_so(twins: tuple[Path, Path], tiny_config: Path) -> None:
    for folder in twins:
        (plan,) = plan_shapes(load_config(tiny_config, [f"teacher.path={folder}"]), folder)
        said = [warning for warning in plan.warnings if "quantised (GPTQ, 4 bits" in warning]
        assert len(said) == (folder == twins[0])


@pytest.mark.long
def test_a_run_prunes_it_and_says_so(twins: tuple[Path, Path], tiny_config: Path) -> None:
    config = load_config(tiny_config, [f"teacher.path={twins[0]}"])
    run_until(config, "prune", QUIET)
    run = RunFolder(Path(config.run_dir))
    assert any("quantised (GPTQ, 4 bits" in warning for warning in read_json(run.plan)["warnings"])
    assert "quantization_config" not in read_json(run.pruned / "config.json")
    plain, kept = Checkpoint.open(twins[1]), read_json(run.plan)["kept"]["ffn"]
    for layer, rows in enumerate(kept):
        name = f"model.layers.{layer}.mlp.gate_proj.weight"
        assert torch.equal(Checkpoint.open(run.pruned).tensor(name), plain.tensor(name)[rows])
