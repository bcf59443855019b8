"""Opening checkpoints: good ones read exactly, every kind of bad one is refused and named."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from kdscale.errors import CheckpointError
from kdscale.families import load_family
from kdscale.models.parameter_map import assemble
from kdscale.weights import Checkpoint, read_config

_INDEX = "model.safetensors.index.json"
_EMBED = "model.embed_tokens.weight"


def _verified(folder: Path) -> tuple[Checkpoint, list[str]]:
    checkpoint = Checkpoint.open(folder)
    return checkpoint, checkpoint.verify_against(load_family(checkpoint.config, str(folder / "config.json")))


@pytest.mark.parametrize("shards", [1, 3])
def test_reads_what_is_there(model_dir: Callable[..., Path], shards: int) -> None:
    folder = model_dir(shards)
    checkpoint, notices = _verified(folder)
    assert notices == []
    assert len(checkpoint.files) == shards
    whole: dict[str, torch.Tensor] = {}
    for file in checkpoint.files:
        whole |= load_file(file)
    assert set(checkpoint.names) == set(whole)
    assert all(torch.equal(checkpoint.tensor(name), whole[name]) for name in whole)
    assert checkpoint.spec(_EMBED) == ((16, 8), "F32")
    assert checkpoint.nbytes == sum(value.nbytes for value in whole.values())
    with pytest.raises(CheckpointError, match="no tensor nonsense"):
        checkpoint.tensor("nonsense")


def test_real_transformers_checkpoint_passes(tiny_llama_dir: Path) -> None:
    checkpoint, notices = _verified(tiny_llama_dir)
    assert notices == []
    assert checkpoint.spec(_EMBED).shape == (320, 96)


def test_file_that_shrinks_after_it_was_opened_is_an_error(model_dir: Callable[..., Path]) -> None:
    folder = model_dir()
    checkpoint = Checkpoint.open(folder)
    with (folder / "model.safetensors").open("r+b") as stream:
        stream.truncate(1200)
    with pytest.raises(CheckpointError, match="changed while it was open"):
        checkpoint.tensor("model.norm.weight")


def _f32(offsets: list[int], shape: list[int] | None = None, dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": [2] if shape is None else shape, "data_offsets": offsets}


@pytest.mark.parametrize(
    ("header", "payload", "length", "message"),
    [
        ({"a": _f32([0, 8])}, bytes(8), 10**15, "header length"),
        ({"a": _f32([0, 8])}, bytes(8), 200, "header length"),
        (b'{"a": nonsense', b"", None, "not valid JSON"),
        (b"\xff\xfe\x00", b"", None, "not JSON in UTF-8"),
        (b"[1, 2]", b"", None, "expected: an object"),
        (b'{"a":{"dtype":"F32","shape":[0],"data_offsets":[0,0]},"a":1}', b"", None, "twice"),
        ({"a": _f32([0, 8])}, bytes(5), None, "truncated"),
        ({"a": _f32([0, 8]), "b": _f32([8, 16])}, bytes(8), None, "tensor b ends beyond"),
        ({"a": _f32([0, 8]), "b": _f32([4, 12])}, bytes(12), None, "overlaps"),
        ({"a": _f32([0, 8]), "b": _f32([12, 20])}, bytes(20), None, "leaves a hole"),
        ({"a": _f32([0, 8])}, bytes(9), None, "belong to no tensor"),
        ({"a": _f32([0, 12])}, bytes(12), None, "expected: 8 bytes"),
        ({"a": _f32([8, 0])}, bytes(8), None, "-8 bytes"),
        ({"a": _f32([-8, 0])}, bytes(8), None, "two byte offsets"),
        ({"a": _f32([0, 8], [-2])}, bytes(8), None, "non-negative"),
        ({"a": _f32([0, 8], [True, 2])}, bytes(8), None, "non-negative"),
        ({"a": _f32([0, 2], dtype="I8")}, bytes(2), None, "dtype F64, F32, F16, BF16"),
        ({"a": _f32([0, 2], dtype="F8_E4M3")}, bytes(2), None, "quantised"),
        ({"a": {"dtype": "F32"}}, b"", None, "shape and data_offsets"),
        ({"a": [1]}, b"", None, "shape and data_offsets"),
    ],
)
def test_damaged_files_are_refused_when_opened(
    model_dir: Callable[..., Path],
    raw_safetensors: Callable[..., bytes],
    header: Any,
    payload: bytes,
    length: int | None,
    message: str,
) -> None:
    folder = model_dir()
    (folder / "model.safetensors").write_bytes(raw_safetensors(header, payload, length))
    with pytest.raises(CheckpointError, match=message):
        Checkpoint.open(folder)


def test_real_file_cut_at_any_place_is_refused(model_dir: Callable[..., Path]) -> None:
    folder = model_dir()
    whole = (folder / "model.safetensors").read_bytes()
    for size in [0, 3, 7, 8, 9, 100, len(whole) // 2, len(whole) - 1]:
        (folder / "model.safetensors").write_bytes(whole[:size])
        with pytest.raises(CheckpointError):
            Checkpoint.open(folder)
    (folder / "model.safetensors").write_bytes(whole)
    Checkpoint.open(folder)


def _edit_index(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    index = json.loads((folder / _INDEX).read_text())
    change(index)
    (folder / _INDEX).write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda index: index["weight_map"].update({"more": "model-00001-of-00003.safetensors"}), "not in the shard"),
        (lambda index: index["weight_map"].update({_EMBED: "model-00002-of-00003.safetensors"}), "disagree"),
        (lambda index: index["weight_map"].pop(_EMBED), "a tensor that the index lists"),
        (lambda index: index["weight_map"].update({_EMBED: "model-00009-of-00003.safetensors"}), "no model-00009"),
        (lambda index: index["weight_map"].update({_EMBED: "../outside.safetensors"}), "outside itself"),
        (lambda index: index["weight_map"].update({_EMBED: "/etc/outside.safetensors"}), "outside itself"),
        (lambda index: index["weight_map"].update({_EMBED: "pytorch_model.bin"}), r"\.safetensors files"),
        (lambda index: index["weight_map"].update({_EMBED: 3}), r"\.safetensors files"),
        (lambda index: index.pop("weight_map"), "weight_map"),
        (lambda index: index.update(weight_map=[]), "weight_map"),
    ],
)
def test_index_that_lies_is_refused(
    model_dir: Callable[..., Path], change: Callable[[dict[str, Any]], Any], message: str
) -> None:
    folder = model_dir(3)
    (folder.parent / "outside.safetensors").write_bytes((folder / "model-00001-of-00003.safetensors").read_bytes())
    _edit_index(folder, change)
    with pytest.raises(CheckpointError, match=message):
        Checkpoint.open(folder)


def test_index_or_shard_that_is_missing_or_broken(model_dir: Callable[..., Path]) -> None:
    folder = model_dir(3)
    shard, second = folder / "model-00003-of-00003.safetensors", folder / "model-00002-of-00003.safetensors"
    whole = shard.read_bytes()
    shard.unlink()
    with pytest.raises(CheckpointError, match="shards are missing") as caught:
        Checkpoint.open(folder)
    assert shard.name in str(caught.value)
    save_file(load_file(second), shard)
    with pytest.raises(CheckpointError, match="is in two shards"):
        Checkpoint.open(folder)
    shard.write_bytes(whole)
    index = (folder / _INDEX).read_text()
    (folder / _INDEX).write_text(index[: len(index) // 2])
    with pytest.raises(CheckpointError, match=r"index.json is not valid JSON"):
        Checkpoint.open(folder)
    (folder / _INDEX).write_text(index.replace('"weight_map": {', f'"weight_map": {{"{_EMBED}": "x.safetensors", '))
    with pytest.raises(CheckpointError, match="appears twice"):
        Checkpoint.open(folder)
    (folder / _INDEX).unlink()
    with pytest.raises(CheckpointError, match="index is missing"):
        Checkpoint.open(folder)


@pytest.mark.parametrize(
    "name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth", "pytorch_model.bin.index.json"]
)
def test_pickles_are_refused_with_the_way_to_convert_and_never_opened(
    model_dir: Callable[..., Path], name: str
) -> None:
    folder = model_dir()
    (folder / "model.safetensors").unlink()
    (folder / name).write_bytes(b"cos\nsystem\n(S'touch pwned'\ntR.")
    with pytest.raises(CheckpointError, match=r"safe_serialization=True") as caught:
        Checkpoint.open(folder)
    assert name in str(caught.value)
    assert "sandbox" in str(caught.value)


def test_folders_without_weights_or_config(model_dir: Callable[..., Path], tmp_path: Path) -> None:
    folder = model_dir()
    (folder / "model.safetensors").rename(folder / "weights.safetensors")
    with pytest.raises(CheckpointError, match=r"to be named model\.safetensors"):
        Checkpoint.open(folder)
    (folder / "weights.safetensors").unlink()
    with pytest.raises(CheckpointError, match="no weight files"):
        Checkpoint.open(folder)
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="adapter"):
        Checkpoint.open(folder)
    for text, message in (("{", "not valid JSON"), ("[]", "a JSON object"), ("\xff", "not UTF-8 text")):
        (folder / "config.json").write_text(text, encoding="latin-1")
        with pytest.raises(CheckpointError, match=message):
            Checkpoint.open(folder)
    (folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"config\.json is missing"):
        Checkpoint.open(folder)
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "org/base"}')
    with pytest.raises(CheckpointError, match=r"an adapter of org/base\n.*teacher\.adapters"):
        Checkpoint.open(folder)
    (tmp_path / "models--org--name" / "snapshots" / "abc").mkdir(parents=True)
    (tmp_path / "models--org--name" / "snapshots" / "abc" / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"is it to be .*snapshots/abc\?"):
        Checkpoint.open(tmp_path / "models--org--name")
    (tmp_path / "other").mkdir()
    for file, message in (("x.gguf", "GGUF files"), ("params.json", "author's own format")):
        (tmp_path / "other" / file).write_text("{}")
        with pytest.raises(CheckpointError, match=message):
            Checkpoint.open(tmp_path / "other")
        (tmp_path / "other" / file).unlink()
    with pytest.raises(CheckpointError, match="not a folder"):
        Checkpoint.open(tmp_path / "nowhere")


def test_config_that_disagrees_with_the_weights_is_listed(model_dir: Callable[..., Path]) -> None:
    folder = model_dir(extra={"model.layers.0.self_attn.q_proj.bias": torch.zeros(8)})
    config = json.loads((folder / "config.json").read_text())
    config.update(num_hidden_layers=3, vocab_size=17)
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError) as caught:
        _verified(folder)
    message = str(caught.value)
    assert "9 missing: model.layers.2.input_layernorm.weight" in message
    assert "and 1 more" in message
    assert "1 unexpected: model.layers.0.self_attn.q_proj.bias" in message
    assert f"{_EMBED} [16, 8] instead of [17, 8]" in message


def test_old_rotary_buffers_are_ignored(model_dir: Callable[..., Path]) -> None:
    extra = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(2) for i in range(2)}
    checkpoint, notices = _verified(model_dir(extra=extra))
    assert notices == ["2 tensors that no model reads are ignored"]
    assert not set(extra) & set(checkpoint.names)


def test_stored_copy_of_a_tied_head_is_dropped_if_it_is_a_copy(model_dir: Callable[..., Path]) -> None:
    folder = model_dir()
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors[_EMBED].clone()
    save_file(tensors, folder / "model.safetensors")
    checkpoint, notices = _verified(folder)
    assert "lm_head.weight" not in checkpoint.names
    assert len(notices) == 1
    assert "lm_head.weight is a stored copy" in notices[0]
    tensors["lm_head.weight"][-1, -1] += 1e-3
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"differs from model\.embed_tokens"):
        _verified(folder)


MIXTURE = {"model_type": "mixtral", "architectures": ["MixtralForCausalLM"], "num_local_experts": 3}


def _stack_experts(folder: Path) -> None:
    """Rewrite model.safetensors with each parameter as transformers keeps it in memory."""
    config = read_config(folder)
    specs = load_family(config, "config.json").tensors(config)
    whole = Checkpoint.open(folder)
    joined = {name: value.contiguous() for name, value in assemble(specs, whole.tensor).items()}
    save_file(joined, folder / "model.safetensors", {"format": "pt"})


def test_experts_that_are_stacked_on_disk_are_read_as_single_ones(model_dir: Callable[..., Path]) -> None:
    folder = model_dir(**MIXTURE)
    apart, _ = _verified(folder)
    tensors = {name: apart.tensor(name) for name in apart.names}
    _stack_experts(folder)
    stacked, notices = _verified(folder)
    assert set(stacked.names) == set(tensors) and not notices
    assert all(torch.equal(stacked.tensor(name), value) for name, value in tensors.items())
    (folder / "config.json").write_text(json.dumps({**read_config(folder), "intermediate_size": 16}))
    with pytest.raises(
        CheckpointError, match=r"experts\.gate_up_proj\n  expected: \[3, 32, 8\]\n  got:      \[3, 24, 8\]"
    ):
        _verified(folder)


def test_a_weight_that_is_no_number_is_named(model_dir: Callable[..., Path]) -> None:
    name = "model.layers.1.mlp.down_proj.weight"
    checkpoint, _ = _verified(model_dir())
    checkpoint.check_finite()
    entry = checkpoint._entry(name)
    with entry.file.open("r+b") as stream:
        stream.seek(entry.begin + 8)
        stream.write(b"\x00\x00\xc0\x7f")
    with pytest.raises(CheckpointError, match=f"tensor {name} has NaN"):
        checkpoint.check_finite()


def test_reading_a_tensor_costs_its_own_bytes_only(tmp_path: Path, raw_safetensors: Callable[..., bytes]) -> None:
    """A 64 GiB sparse checkpoint opens, and a small tensor reads, within a few MiB of resident memory."""
    big = 64 << 30
    header = {"big": _f32([0, big], [big // 4]), "small": _f32([big, big + 8])}
    path = tmp_path / "model.safetensors"
    start = len(raw_safetensors(header))
    with path.open("wb") as stream:
        stream.write(raw_safetensors(header))
        stream.seek(start + big)
        stream.write(torch.tensor([1.5, -2.0]).numpy().tobytes())
    (tmp_path / "config.json").write_text("{}")
    code = (
        "import resource, sys, torch\n"
        "from pathlib import Path\n"
        "from kdscale.weights import Checkpoint\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "checkpoint = Checkpoint.open(Path(sys.argv[1]))\n"
        "assert checkpoint.nbytes > 64 << 30\n"
        "assert checkpoint.tensor('small').tolist() == [1.5, -2.0]\n"
        "grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before\n"
        "assert grown < 64 << 10, f'{grown} KiB'\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        cwd=Path(__file__).parents[3],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
