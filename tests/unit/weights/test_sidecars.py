"""What lies beside the weights: which files are copied, and whether the tokenizer fits the model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from kdscale.errors import CheckpointError
from kdscale.weights import check_tokenizer, copy_sidecars, sidecar_names


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
    src, dst, blobs = tmp_path / "models--org--name" / "snapshots" / "abc", tmp_path / "dst", "models--org--name/blobs"
    for folder in (src, dst, tmp_path / blobs):
        folder.mkdir(parents=True)
    (tmp_path / blobs / "0123").write_text("{}")
    (src / "tokenizer.json").symlink_to(Path("../../blobs/0123"))
    copy_sidecars(src, dst)
    assert not (dst / "tokenizer.json").is_symlink()
    assert (dst / "tokenizer.json").read_text() == "{}"


@pytest.mark.parametrize("via", ["LICENSE", "additional_chat_templates", "blobs", "modeling_own.py"])
def test_links_that_lead_out_of_the_folder_are_refused(tmp_path: Path, via: str) -> None:
    """A link to a private key, from a folder that somebody else has packed, would be published with the student."""
    src, dst, secret = tmp_path / "cache" / "snapshots" / "abc", tmp_path / "dst", tmp_path / "home" / "key.jinja"
    for folder in (src, dst, secret.parent):
        folder.mkdir(parents=True)
    secret.write_text("secret")
    if via == "blobs":
        (tmp_path / "cache" / "blobs").symlink_to(secret.parent)
        (src / "LICENSE").symlink_to(tmp_path / "cache" / "blobs" / secret.name)
    else:
        (src / via).symlink_to(secret.parent if via == "additional_chat_templates" else secret)
    (src / "config.json").write_text(json.dumps({"auto_map": {"AutoConfig": "modeling_own.Own"}}))
    with pytest.raises(CheckpointError, match="leads out of its folder"):
        copy_sidecars(src, dst, code=via == "modeling_own.py")
    assert not any(dst.iterdir())


@pytest.fixture
def with_code(tmp_path: Path) -> Path:
    """A folder whose two configs name classes of its own, one of which needs a helper."""
    folder = tmp_path / "with-code"
    folder.mkdir()
    own = {"AutoConfig": "configuration_own.Own", "AutoModel": "org/name--modeling_elsewhere.Own"}
    (folder / "config.json").write_text(json.dumps({"auto_map": own}))
    tokenizer = {"auto_map": {"AutoTokenizer": ["tokenization_own.Own", None]}, "eos_token": "é"}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    (folder / "configuration_own.py").write_text("from .helper import x\nfrom transformers import y\n")
    for module in ("helper", "tokenization_own", "unrelated"):
        (folder / f"{module}.py").write_text("")
    return folder


def test_trusted_code_is_copied_whole_and_nothing_else(with_code: Path, tmp_path: Path) -> None:
    (tmp_path / "dst").mkdir()
    copy_sidecars(with_code, tmp_path / "dst", code=True)
    modules = ["configuration_own.py", "helper.py", "tokenization_own.py"]
    assert sorted(file.name for file in (tmp_path / "dst").iterdir()) == sorted([*modules, "tokenizer_config.json"])
    assert (tmp_path / "dst/tokenizer_config.json").read_bytes() == (with_code / "tokenizer_config.json").read_bytes()


def test_without_code_nothing_names_it(with_code: Path, tmp_path: Path) -> None:
    (tmp_path / "dst").mkdir()
    assert copy_sidecars(with_code, tmp_path / "dst") == ["tokenizer_config.json"]
    assert json.loads((tmp_path / "dst/tokenizer_config.json").read_text()) == {"eos_token": "é"}


@pytest.mark.parametrize("module", ["helper", "tokenization_own"])
def test_trusted_code_that_is_missing_is_named(with_code: Path, module: str) -> None:
    (with_code / f"{module}.py").unlink()
    with pytest.raises(CheckpointError, match=f"{module}, which is not there"):
        sidecar_names(with_code, code=True)


@pytest.mark.parametrize("name", ["../x.Own", "x", 7, "a.b.Own", {}])
def test_auto_map_names_modules_of_the_folder(with_code: Path, name: Any) -> None:
    (with_code / "config.json").write_text(json.dumps({"auto_map": {"AutoConfig": name}}))
    with pytest.raises(CheckpointError, match="auto_map"):
        sidecar_names(with_code, code=True)


@pytest.fixture
def tokenizer_dir(tiny_tokenizer_file: Path, tmp_path: Path) -> Path:
    shutil.copyfile(tiny_tokenizer_file, tmp_path / "tokenizer.json")
    return tmp_path


def test_tokenizer_that_fits(tokenizer_dir: Path, tiny_llama_dir: Path) -> None:
    from tokenizers import Tokenizer

    size = Tokenizer.from_file(str(tokenizer_dir / "tokenizer.json")).get_vocab_size()
    assert check_tokenizer(tokenizer_dir, size) == (size, "")
    assert check_tokenizer(tokenizer_dir / "tokenizer.json", size + 100) == (size, "")
    assert check_tokenizer(tiny_llama_dir, 320).ids <= 320
    with pytest.raises(CheckpointError, match=f"id {size - 1}"):
        check_tokenizer(tokenizer_dir, size - 1)


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("added_tokens.json", {"<pad>": 320}),
        ("tokenizer_config.json", {"added_tokens_decoder": {"320": {"content": "<pad>"}}}),
    ],
)
def test_token_added_beyond_the_embedding_is_a_notice(tokenizer_dir: Path, file: str, content: Any) -> None:
    (tokenizer_dir / file).write_text(json.dumps(content))
    fit = check_tokenizer(tokenizer_dir, 320)
    assert fit.ids == 321
    assert "1 added token(s)" in fit.notice
    assert f"id 320 ('<pad>' in {file})" in fit.notice
    assert check_tokenizer(tokenizer_dir, 321) == (321, "")


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
