"""The files beside the weights: tokenizer, chat template, generation defaults, licence."""

from __future__ import annotations

import fnmatch
import json
import shutil
from pathlib import Path
from typing import Any

from kdscale.errors import CheckpointError
from kdscale.files import explain_os_errors, read_json

# By name, never by exclusion: code, pickles and whatever else a repository holds stay behind.
_SIDECARS = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "additional_chat_templates/*.jinja",
    "generation_config.json",
    "LICENSE*",
    "LICENCE*",
    "NOTICE*",
    "USE_POLICY*",
)
_CODE = ("*.py", "*.pyc", "*.so", "*.bin", "*.pt", "*.pth", "*.pkl", "*.safetensors")


def copy_sidecars(src: Path, dst: Path) -> list[str]:
    """Copy the files that belong to a checkpoint beside config.json and the weights; returns their names, sorted."""
    names = {
        str(item.relative_to(src))
        for pattern in _SIDECARS
        for item in src.glob(pattern)
        if item.is_file() and not any(fnmatch.fnmatch(item.name.lower(), glob) for glob in _CODE)
    }
    with explain_os_errors(dst):
        for name in sorted(names):
            (dst / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(src / name, dst / name)  # a hub cache's entries are links: their content is what is copied
    return sorted(names)


def check_tokenizer(path: Path, vocab_size: int) -> int:
    """Check that the tokenizer fits a model of `vocab_size`; returns its largest token id + 1.

    `path` is a folder or its tokenizer.json. An embedding larger than the tokenizer needs is common (padding) and fine.
    A token without a row in the embedding would fail only when it occurs, hours into a run. Tokens that
    tokenizer_config.json and added_tokens.json add at loading time count too. Raises CheckpointError.
    """
    from tokenizers import Tokenizer

    file = path / "tokenizer.json" if path.is_dir() else path
    if not file.is_file():
        raise CheckpointError(
            f"{file} is missing",
            expected="a fast tokenizer",
            hint="save one beside the model: AutoTokenizer.from_pretrained(folder).save_pretrained(folder)",
        )
    read_json(file, CheckpointError)
    try:
        vocab = Tokenizer.from_file(str(file)).get_vocab(with_added_tokens=True)
    except Exception as error:  # the library raises bare Exception for whatever it cannot parse
        raise CheckpointError(f"{file} is not a usable tokenizer", got=str(error)) from error
    ids = {token: (number, file.name) for token, number in vocab.items()}
    ids |= _added_later(file.parent)
    if not ids:
        raise CheckpointError(f"{file} has no tokens")
    token, (largest, source) = max(ids.items(), key=lambda item: item[1][0])
    if largest >= vocab_size:
        raise CheckpointError(
            f"{file.parent}: the tokenizer does not fit the model",
            expected=f"token ids below vocab_size ({vocab_size})",
            got=f"id {largest} ({token!r} in {source})",
            hint="use the tokenizer this model was trained with, or drop the added token",
        )
    return largest + 1


def _added_later(folder: Path) -> dict[str, tuple[int, str]]:
    """Tokens that transformers adds on top of tokenizer.json: token → (id, file that says so)."""
    ids: dict[str, tuple[int, str]] = {}
    if (folder / "tokenizer_config.json").is_file():
        config = _object(folder / "tokenizer_config.json")
        for key, value in (config.get("added_tokens_decoder") or {}).items():
            ids[_content(value)] = (_id(key, folder / "tokenizer_config.json"), "tokenizer_config.json")
    if (folder / "added_tokens.json").is_file():
        for token, key in _object(folder / "added_tokens.json").items():
            ids[token] = (_id(key, folder / "added_tokens.json"), "added_tokens.json")
    return ids


def _object(file: Path) -> dict[str, Any]:
    value = read_json(file, CheckpointError)
    if not isinstance(value, dict):
        raise CheckpointError(f"{file}", expected="a JSON object", got=type(value).__name__)
    return value


def _content(value: Any) -> str:
    return str(value["content"]) if isinstance(value, dict) and "content" in value else json.dumps(value)


def _id(key: Any, file: Path) -> int:
    try:
        return int(key)
    except (TypeError, ValueError):
        raise CheckpointError(f"{file}: added tokens", expected="integer ids", got=repr(key)) from None
