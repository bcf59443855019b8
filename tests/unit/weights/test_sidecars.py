"""What lies beside the weights: which files are copied, and whether the tokenizer fits the model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from kdscale.errors import CheckpointError
from kdscale.weights import check_tokenizer, copy_sidecars


def test_sidecars_are_the_known_files_and_never_code(tmp_path: Path) -> None:
    src, dst = tmp_path / "src", tmp_path / "dst"
    wanted = [
        "tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja", "LICENSE.txt",
        "additional_chat_templates/tool.jinja",
    ]  # fmt: skip
    unwanted = [
        "modeling_x.py", "pytorch_model.bin", "config.json", "model.safetensors", "model.safetensors.index.json",
        "LICENSE.py", "README.md", "training_args.bin", "optimizer.pt",
    ]  # fmt: skip
    for name in wanted + unwanted:
        (src / name).parent.mkdir(parents=True, exist_ok=True)
        (src / name).write_text(name)
    dst.mkdir()
    assert copy_sidecars(src, dst) == sorted(wanted)
    assert sorted(str(p.relative_to(dst)) for p in dst.rglob("*") if p.is_file()) == sorted(wanted)
    assert (dst / wanted[-1]).read_text() == wanted[-1]


def test_sidecars_of_a_hub_cache_are_copied_not_linked(tmp_path: Path) -> None:
    src, dst = tmp_path / "src", tmp_path / "dst"
    src.mkdir()
    dst.mkdir()
    (tmp_path / "blob").write_text("{}")
    (src / "tokenizer.json").symlink_to(tmp_path / "blob")
    copy_sidecars(src, dst)
    assert not (dst / "tokenizer.json").is_symlink()
    assert (dst / "tokenizer.json").read_text() == "{}"


@pytest.fixture
def tokenizer_dir(tiny_tokenizer_file: Path, tmp_path: Path) -> Path:
    shutil.copyfile(tiny_tokenizer_file, tmp_path / "tokenizer.json")
    return tmp_path


def test_tokenizer_that_fits(tokenizer_dir: Path, tiny_llama_dir: Path) -> None:
    from tokenizers import Tokenizer

    size = Tokenizer.from_file(str(tokenizer_dir / "tokenizer.json")).get_vocab_size()
    assert check_tokenizer(tokenizer_dir, size) == size
    assert check_tokenizer(tokenizer_dir / "tokenizer.json", size + 100) == size
    assert check_tokenizer(tiny_llama_dir, 320) <= 320
    with pytest.raises(CheckpointError, match=f"id {size - 1}"):
        check_tokenizer(tokenizer_dir, size - 1)


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("added_tokens.json", {"<pad>": 320}),
        ("tokenizer_config.json", {"added_tokens_decoder": {"320": {"content": "<pad>"}}}),
    ],
)
def test_token_added_beyond_the_embedding_is_found(tokenizer_dir: Path, file: str, content: Any) -> None:
    (tokenizer_dir / file).write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=rf"id 320 \('<pad>' in {file}\)"):
        check_tokenizer(tokenizer_dir, 320)
    assert check_tokenizer(tokenizer_dir, 321) == 321


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("tokenizer.json", "{", "not valid JSON"),
        ("tokenizer.json", '{"model": {"type": "Nonsense"}}', "not a usable tokenizer"),
        ("tokenizer_config.json", "[]", "JSON object"),
        ("added_tokens.json", '{"<x>": "seven"}', "integer ids"),
    ],
)
def test_broken_tokenizer_files_are_named(tokenizer_dir: Path, file: str, text: str, message: str) -> None:
    (tokenizer_dir / file).write_text(text)
    with pytest.raises(CheckpointError, match=message):
        check_tokenizer(tokenizer_dir, 320)


def test_missing_tokenizer_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="save_pretrained"):
        check_tokenizer(tmp_path, 320)
