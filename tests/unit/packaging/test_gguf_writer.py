"""GGUF files without llama.cpp: names, patterns, types, and everything that is refused before a byte is written."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from kdscale.errors import CheckpointError, ConfigError, KdscaleError, RunFolderError
from kdscale.families import gguf_families, load_family
from kdscale.packaging import gguf_writer
from kdscale.packaging.gguf_metadata import period_of
from kdscale.packaging.gguf_names import gguf_name, halves_from_pairs, pairs_from_halves
from kdscale.packaging.gguf_teacher.file import GgufFile
from kdscale.packaging.gguf_teacher.folder import import_gguf
from kdscale.packaging.gguf_writer import write_gguf
from kdscale.runtime.progress import Reporter

gguf = pytest.importorskip("gguf")
QUIET = Reporter(quiet=True)


@pytest.fixture
def model(tiny_llama_dir: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_llama_dir, tmp_path / "model"))


def change_json(file: Path, change: Callable[[dict[str, Any]], None]) -> None:
    tree = json.loads(file.read_text())
    change(tree)
    file.write_text(json.dumps(tree))


def opened(path: Path) -> Any:
    return gguf.GGUFReader(path)


@pytest.mark.parametrize("model_type", gguf_families())
def test_names_are_those_of_the_official_package(model_type: str) -> None:
    family = load_family({"model_type": model_type}, "config.json")
    assert family.data.gguf is not None
    arch = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == family.data.gguf.architecture)
    official = gguf.get_tensor_name_map(arch, 2)
    known = {gguf.TENSOR_NAMES[tensor] for tensor in gguf.MODEL_TENSORS[arch]}
    tied = any(rule.field == "tie_word_embeddings" and rule.one_of == (True,) for rule in family.data.gguf.requires)
    for template in family.data.tensors:
        if (tied and template.role == "head") or template.only_in == ("dense",):  # llama.cpp has mixtures alone
            continue
        if "dense" in template.only_in and f"blk.{{bid}}.ffn_{template.role}" not in known:
            # a mixture whose dense layers llama.cpp does not read, which the table says
            assert any(rule.field == "mlp_only_layers" for rule in family.data.gguf.requires)
            continue
        layer = 1 if template.per_layer else None
        ours = gguf_name(template.role, layer, template.per_expert)
        assert ours is not None
        stem, _, suffix = ours.rpartition(".")
        assert template.name.endswith(suffix)
        assert (stem if layer is None else stem.replace("blk.1.", "blk.{bid}.")) in known
        if template.per_expert:  # the package knows one expert's tensor by no name
            continue
        theirs = official.get_name(template.name.replace("{layer}", "1"), (".weight", ".bias"))
        # Gemma's and OLMo's norms after a sublayer share a name with Llama's before one: the package has two answers
        assert theirs == ours or "norm" in stem


@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 3))
def test_rotary_rows_change_their_order_and_back(heads: int, half: int, width: int) -> None:
    rows = np.arange(heads * 2 * half * width).reshape(heads * 2 * half, width)
    paired = pairs_from_halves(rows, heads)
    assert np.array_equal(halves_from_pairs(paired, heads), rows)
    assert list(paired[:2, 0]) == [rows[0, 0], rows[half, 0]]  # what is rotated together lies side by side
    assert np.array_equal(pairs_from_halves(rows[:, 0], heads), paired[:, 0])


@given(st.integers(2, 7), st.integers(1, 14))
def test_a_pattern_that_repeats_has_a_period(period: int, layers: int) -> None:
    slides = [layer % period < period - 1 for layer in range(layers)]
    found = period_of(slides)
    assert found is not None
    assert slides == [layer % found < found - 1 for layer in range(layers)]


def test_a_pattern_cut_by_depth_pruning_has_none() -> None:
    assert period_of([True, True, False, True, False]) is None
    assert period_of([False, True]) is None


def test_the_reader_gives_back_every_bit(model: Path, tmp_path: Path) -> None:
    write_gguf(model, tmp_path / "m.gguf", "f32", QUIET, name="my student")
    read = GgufFile(tmp_path / "m.gguf")
    weights = load_file(model / "model.safetensors")
    found = load_file(import_gguf(read.path, tmp_path / "back", QUIET, dtype="float32") / "model.safetensors")
    assert found.keys() == weights.keys()
    assert all(torch.equal(found[name], weights[name]) for name in weights)
    config = json.loads((model / "config.json").read_text())
    assert read.field("general.name") == "my student"
    assert read.field("llama.feed_forward_length") == config["intermediate_size"]
    assert read.field("tokenizer.ggml.eos_token_id") == 0


def test_vectors_are_fp32_and_q4_spares_the_embedding(model: Path, tmp_path: Path) -> None:
    written = write_gguf(model, tmp_path / "m.gguf", "q4_0", QUIET)
    kinds = {tensor.name: tensor.tensor_type.name for tensor in opened(written.path).tensors}
    assert kinds["token_embd.weight"] == "Q8_0"
    assert kinds["blk.0.attn_norm.weight"] == "F32"
    assert kinds["blk.3.ffn_down.weight"] == "Q4_0"
    assert written.kinds == {"F32": 9, "Q4_0": 28, "Q8_0": 1}
    assert not written.notes


def test_rows_that_no_block_divides_stay_in_f16(model: Path, tmp_path: Path) -> None:
    change_json(model / "config.json", lambda config: config.update(intermediate_size=120))
    weights = load_file(model / "model.safetensors")
    for name in list(weights):
        if "mlp" in name:
            kept = weights[name][:, :120] if "down" in name else weights[name][:120]
            weights[name] = kept.contiguous()
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    written = write_gguf(model, tmp_path / "m.gguf", "q8_0", QUIET)
    assert written.kinds["F16"] == 4
    assert written.notes == ["4 tensors stay in f16: rows of 120 are no multiple of 32"]


def test_large_tensors_go_through_in_blocks(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = write_gguf(model, tmp_path / "whole.gguf", "q8_0", QUIET, name="m").path.read_bytes()
    monkeypatch.setattr(gguf_writer, "_BLOCK_BYTES", 4096)
    assert write_gguf(model, tmp_path / "blocks.gguf", "q8_0", QUIET, name="m").path.read_bytes() == whole


def poison(folder: Path, value: float) -> None:
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.2.mlp.up_proj.weight"][5, 5] = value
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def other_split(tree: dict[str, Any]) -> None:
    tree["pre_tokenizer"] = {"type": "Whitespace"}


def unigram(tree: dict[str, Any]) -> None:
    tree["model"] = {"type": "Unigram", "unk_id": 0, "vocab": [[token, -1.0] for token in tree["model"]["vocab"]]}


def some_merges(tree: dict[str, Any]) -> None:
    """SentencePiece joins any neighbours that make a token, here two that no merge joins."""
    tree["model"] |= {"byte_fallback": True, "vocab": {"a": 0, "b": 1, "c": 2, "ab": 3, "bc": 4, "abc": 5}}
    tree["model"]["merges"] = [["a", "b"], ["ab", "c"], ["b", "c"]]
    tree |= {"added_tokens": [], "pre_tokenizer": None, "decoder": None}
    tree["normalizer"] = {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}


def token_without_merge(tree: dict[str, Any]) -> None:
    some_merges(tree)
    tree["model"]["merges"] = [["b", "c"]]


REFUSED: dict[str, tuple[Callable[[Path], object], str, type[KdscaleError], str]] = {
    "type": (lambda model: None, "q4_k_m", ConfigError, "llama-quantize model-bf16.gguf m.gguf Q4_K_M"),
    "nan": (lambda model: poison(model, float("nan")), "bf16", CheckpointError, "ffn_up.weight has NaN"),
    "too large for f16": (lambda model: poison(model, 1e6), "f16", CheckpointError, "take bf16"),
    "splitting rule": (
        lambda model: change_json(model / "tokenizer.json", other_split), "bf16", CheckpointError, "Whitespace",
    ),
    "no bpe": (lambda model: change_json(model / "tokenizer.json", unigram), "bf16", CheckpointError, "Unigram"),
    "merges": (
        lambda model: change_json(model / "tokenizer.json", some_merges), "bf16", CheckpointError, "no merge of 'a'",
    ),
    "a token that no merge makes": (
        lambda model: change_json(model / "tokenizer.json", token_without_merge), "bf16", CheckpointError, "no merge",
    ),
    "rope and activation together": (
        lambda model: change_json(
            model / "config.json",
            lambda config: config.update(
                hidden_act="gelu",
                rope_parameters={"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 8,
                                 "long_factor": [1.0] * 8, "original_max_position_embeddings": 64},
            ),
        ),
        "bf16", CheckpointError, "hidden_act is \"gelu\".*rope_type 'longrope'",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_what_gguf_cannot_hold_is_one_message_and_no_file(what: str, model: Path, tmp_path: Path) -> None:
    spoil, kind, error, said = REFUSED[what]
    spoil(model)
    (tmp_path / "out").mkdir()
    with pytest.raises(error, match=said):
        write_gguf(model, tmp_path / "out" / "m.gguf", kind, QUIET)
    assert not list((tmp_path / "out").iterdir())


def test_a_family_without_a_table_names_those_with_one(model: Path, tmp_path: Path) -> None:
    from tests.integration.prune.family_table import save_teacher

    save_teacher("gpt_neox", tmp_path / "neox")
    with pytest.raises(CheckpointError, match=r"gemma2.*llama.*qwen3.*smollm3.*\n  got:      gpt_neox"):
        write_gguf(tmp_path / "neox", tmp_path / "m.gguf", "bf16", QUIET)


def test_a_full_disk_is_said_before_anything_is_written(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(RunFolderError, match="no room"):
        write_gguf(model, tmp_path / "new" / "m.gguf", "bf16", QUIET)
    assert not (tmp_path / "new").exists()


def test_only_a_gguf_file_is_replaced(model: Path, tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(b"GGUF, an older one")
    assert write_gguf(model, tmp_path / "m.gguf", "bf16", QUIET).bytes > 1000
    for taken in (model / "config.json", model):
        with pytest.raises(ConfigError, match="is there already"):
            write_gguf(model, taken, "bf16", QUIET)


def test_a_folder_called_phi3_is_no_phi3_for_llama_cpp(model: Path, tmp_path: Path) -> None:
    written = write_gguf(model, tmp_path / "m.gguf", "bf16", QUIET, name="my-phi3-like")
    assert opened(written.path).get_field("general.name").contents() == "model"
