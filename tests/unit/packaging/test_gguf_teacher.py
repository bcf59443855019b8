"""GGUF files as teachers: what is refused, and what is taken from elsewhere. Round trips are in tests/integration."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from kdscale.cli.main import make_app
from kdscale.errors import CheckpointError, ConfigError
from kdscale.files import read_json
from kdscale.packaging.gguf_teacher.file import GgufFile
from kdscale.packaging.gguf_teacher.folder import import_gguf
from kdscale.packaging.gguf_writer import write_gguf
from kdscale.runtime.progress import Reporter

gguf = pytest.importorskip("gguf")
QUIET = Reporter(quiet=True)


@pytest.fixture(scope="module")
def whole(tiny_llama_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Llama as a GGUF file."""
    return write_gguf(tiny_llama_dir, tmp_path_factory.mktemp("gguf") / "tiny.gguf", "f32", QUIET).path


def changed(whole: Path, path: Path, drop: str = "", **values: Any) -> Path:
    """A copy of the file with other metadata (dots written as __), without the tensor `drop`."""
    reader = gguf.GGUFReader(whole)
    values = {key.replace("__", "."): value for key, value in values.items()}
    architecture = values.pop("general.architecture", "llama")
    writer = gguf.GGUFWriter(path, architecture)
    for key, field in reader.fields.items():
        if key.startswith("GGUF.") or key == "general.architecture" or key in values:
            continue
        kinds = {"sub_type": field.types[-1]} if field.types[0] == gguf.GGUFValueType.ARRAY else {}
        writer.add_key_value(key, field.contents(), field.types[0], **kinds)
    for key, value in values.items():
        if value is not None:
            kind = gguf.GGUFValueType.STRING if isinstance(value, str) else gguf.GGUFValueType.UINT32
            writer.add_key_value(key, value, kind)
    for tensor in reader.tensors:
        if tensor.name != drop:
            writer.add_tensor(tensor.name, np.array(tensor.data), raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize(
    ("drop", "values", "message"),
    [
        ("", {"general__architecture": "rwkv7"}, "general.architecture(.|\n)*gemma3(.|\n)*llama(.|\n)*'rwkv7'"),
        ("", {"split__count": 3}, "one part of a model in 3 files(.|\n)*llama-gguf-split --merge"),
        ("", {"llama__embedding_length": None}, "llama.embedding_length(.|\n)*no such field"),
        ("", {"llama__attention__value_length": 7}, "attention.value_length(.|\n)*that of keys"),
        ("", {"llama__rope__scaling__type": "ntk"}, "rope.scaling.type(.|\n)*'ntk'"),
        ("", {"tokenizer__ggml__model": "t5"}, "tokenizer.ggml.model(.|\n)*'t5'(.|\n)*--tokenizer"),
        ("", {"tokenizer__ggml__pre": "falcon"}, "tokenizer.ggml.pre(.|\n)*qwen2(.|\n)*'falcon'(.|\n)*--tokenizer"),
        ("blk.1.ffn_up.weight", {}, r"not those of the family(.|\n)*no blk\.1\.ffn_up\.weight"),
        ("token_embd.weight", {}, "no tensor token_embd.weight"),
    ],
)
def test_what_cannot_be_read_is_refused_and_leaves_no_folder(
    whole: Path, tmp_path: Path, drop: str, values: dict[str, Any], message: str
) -> None:
    file = changed(whole, tmp_path / "changed.gguf", drop, **values)
    with pytest.raises(CheckpointError, match=message):
        import_gguf(file, tmp_path / "teacher", QUIET)
    assert not (tmp_path / "teacher").exists()


def test_files_that_are_none_and_folders_that_are_taken(tmp_path: Path, whole: Path) -> None:
    (tmp_path / "text.gguf").write_text("no model")
    with pytest.raises(CheckpointError, match="not a readable GGUF file"):
        import_gguf(tmp_path / "text.gguf", tmp_path / "teacher", QUIET)
    with pytest.raises(ConfigError, match="does not exist"):
        import_gguf(tmp_path / "none.gguf", tmp_path / "teacher", QUIET)
    with pytest.raises(ConfigError, match="there already"):
        import_gguf(whole, tmp_path, QUIET)


def test_a_tokenizer_of_an_unknown_rule_comes_from_its_own_folder(
    whole: Path, tiny_llama_dir: Path, tmp_path: Path
) -> None:
    file = changed(whole, tmp_path / "odd.gguf", tokenizer__ggml__pre="of its own")
    call = ["get-teacher", str(file), str(tmp_path / "teacher"), "--dtype", "float32", "--tokenizer"]
    done = CliRunner().invoke(make_app(), [*call, str(tiny_llama_dir)], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    taken = (tmp_path / "teacher" / "tokenizer.json").read_text()
    assert taken == (tiny_llama_dir / "tokenizer.json").read_text()
    assert read_json(tmp_path / "teacher" / "config.json")["dtype"] == "float32"
    other = Path(shutil.copytree(tiny_llama_dir, tmp_path / "other"))
    tree = json.loads((other / "tokenizer.json").read_text())
    vocab = tree["model"]["vocab"]
    first, second = list(vocab)[10:12]
    vocab[first], vocab[second] = vocab[second], vocab[first]
    (other / "tokenizer.json").write_text(json.dumps(tree))
    with pytest.raises(CheckpointError, match=r"not the one of odd\.gguf(.|\n)*2 of"):
        import_gguf(file, tmp_path / "again", QUIET, tokenizer=other)


def test_every_type_that_the_package_dequantises_is_read(tmp_path: Path) -> None:
    """Bytes of half-precision zeros and ones are numbers in every type."""
    kinds = []
    for kind in gguf.GGMLQuantizationType:
        values, size = gguf.GGML_QUANT_SIZES[kind]
        raw = np.zeros((3, 2 * size), dtype=np.uint8)
        try:
            gguf.quants.dequantize(raw, kind)
        except NotImplementedError:
            continue
        kinds.append((kind, values, raw))
    assert len(kinds) > 20
    writer = gguf.GGUFWriter(tmp_path / "kinds.gguf", "llama")
    for kind, _, raw in kinds:
        writer.add_tensor(f"{kind.name}.weight", raw, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    file = GgufFile(tmp_path / "kinds.gguf")
    for kind, values, raw in kinds:
        found = file.tensor(f"{kind.name}.weight")
        assert found.dtype == np.float32 and found.shape == (3, 2 * values), kind
        assert np.array_equal(found, gguf.quants.dequantize(raw, kind).reshape(found.shape).astype(np.float32))
