"""The files beside the weights: tokenizer, chat template, generation defaults, licence, and code if it is trusted."""

from __future__ import annotations

import fnmatch
import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from kdscale.errors import CheckpointError
from kdscale.files import explain_os_errors, read_json, write_json
from kdscale.weights.sentence_files import MODULES, fit_pooling

# By name, never by exclusion: code, pickles and whatever else a repository holds stay behind. Both what is downloaded
# from a hub and what is copied into a student follow this list.
SIDECARS = (
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
    # how a model of several modalities reads what is no text
    "processor_config.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "additional_chat_templates/*.jinja",
    "generation_config.json",
    "LICENSE*",
    "LICENCE*",
    "NOTICE*",
    "USE_POLICY*",
    # of sentence-transformers (sentence_files.py)
    "modules.json",
    "sentence_bert_config.json",
    "config_sentence_transformers.json",
    "*_Pooling/config.json",
)
_CODE = ("*.py", "*.pyc", "*.so", "*.bin", "*.pt", "*.pth", "*.pkl", "*.safetensors")
_TOKENIZER_CONFIG = "tokenizer_config.json"
_AUTO_MAP = "auto_map"  # the field that names a checkpoint's own classes: {"AutoConfig": "module.Class"}
_RELATIVE_IMPORT = re.compile(r"^\s*from\s+\.(\w+)\s+import\b", re.MULTILINE)


def sidecar_names(folder: Path, code: bool = False) -> list[str]:
    """The files that belong to a checkpoint beside config.json and the weights, sorted.

    With `code` also the modules that `auto_map` names in config.json and tokenizer_config.json, and what these import
    from the same folder. Raises CheckpointError when a module is missing, and for a link that leads out of the folder
    (to anything but the blobs of a hub's cache): its target would be published with the student.
    """
    names = {
        str(item.relative_to(folder))
        for pattern in SIDECARS
        for item in folder.glob(pattern)
        if item.is_file() and not any(fnmatch.fnmatch(item.name.lower(), glob) for glob in _CODE)
    }
    if code:
        names |= _code_files(folder)
    for name in sorted(names):
        if _leads_out_of(folder, folder / name):
            raise CheckpointError(
                f"{folder / name} is a link that leads out of its folder",
                expected="a file of the checkpoint, which is copied into the student",
                got=f"a link to {(folder / name).resolve()}",
                hint="put a copy of the file in place of the link, or remove the link",
            )
    return sorted(names)


def copy_sidecars(src: Path, dst: Path, *, code: bool = False) -> list[str]:
    """Copy the files of `sidecar_names` from `src` to `dst`; returns their names.

    Without `code` the copied tokenizer_config.json names no classes of the checkpoint's own.
    """
    names = sidecar_names(src, code)
    with explain_os_errors(dst):
        for name in names:
            (dst / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(src / name, dst / name)  # a hub cache's entries are links: their content is what is copied
    if (dst / "config.json").is_file() and MODULES in names:
        config = _object(dst / "config.json")
        fit_pooling(dst, config.get("hidden_size", config.get("dim")))
    if not code and _TOKENIZER_CONFIG in names and _AUTO_MAP.encode() in (dst / _TOKENIZER_CONFIG).read_bytes():
        write_json(dst / _TOKENIZER_CONFIG, without_own_classes(_object(dst / _TOKENIZER_CONFIG)))
    return names


def without_own_classes(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config without the field that names classes in the checkpoint's own code."""
    return {name: value for name, value in config.items() if name != _AUTO_MAP}


def _code_files(folder: Path) -> set[str]:
    """The modules that `auto_map` names, and recursively those that they import from the same folder."""
    files: set[str] = set()
    to_read = [
        (module, f"{folder / name}: {_AUTO_MAP}")
        for name in ("config.json", _TOKENIZER_CONFIG)
        if (folder / name).is_file()
        for module in _own_modules(folder / name)
    ]
    while to_read:
        module, named_by = to_read.pop()
        file = folder / f"{module}.py"
        if file.name in files:
            continue
        if not file.is_file():
            raise CheckpointError(
                f"{named_by} names the module {module}, which is not there",
                expected=str(file),
                hint="download the file too, or set teacher.trust_remote_code=false",
            )
        files.add(file.name)
        text = file.read_text(encoding="utf-8", errors="replace")
        to_read += [(imported, str(file)) for imported in _RELATIVE_IMPORT.findall(text)]
    return files


def _own_modules(file: Path) -> list[str]:
    """Modules in `auto_map` of one file; classes in another repository (`org/name--module.Class`) have none here."""
    auto_map = _object(file).get(_AUTO_MAP) or {}
    classes = list(auto_map.values()) if isinstance(auto_map, dict) else [auto_map]
    classes = [item for entry in classes for item in (entry if isinstance(entry, list) else [entry])]
    modules = []
    for name in classes:
        if name is None or (isinstance(name, str) and "--" in name):
            continue
        if not isinstance(name, str) or not re.fullmatch(r"\w+\.\w+", name):
            raise CheckpointError(f"{file}: {_AUTO_MAP}", expected='names like "module.Class"', got=repr(name)[:200])
        modules.append(name.split(".")[0])
    return modules


def _leads_out_of(folder: Path, file: Path) -> bool:
    """Whether a link leads elsewhere than into its own folder, or the blobs of the hub cache that it is in."""
    root, target = folder.resolve(), file.resolve()
    blobs = root.parent.parent / "blobs" if root.parent.name == "snapshots" else None
    return not target.is_relative_to(root) and target.parent != blobs


class TokenizerFit(NamedTuple):
    """How a tokenizer's ids compare with a model's embedding."""

    ids: int  # its largest token id + 1
    notice: str = ""  # about added tokens without a row in the embedding


def check_tokenizer(path: Path, vocab_size: int) -> TokenizerFit:
    """Check that the tokenizer fits a model of `vocab_size`.

    `path` is a folder or its tokenizer.json. An embedding larger than the tokenizer needs is common (padding) and fine.
    Published tokenizers also have added tokens without a row in the embedding, for what no text contains: they are a
    notice, and tokenising refuses a text that yields one. Raises CheckpointError for an ordinary token without a row,
    which would fail only when it occurs, hours into a run, and for files that cannot be read.
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
        tokenizer = Tokenizer.from_file(str(file))
    except BaseException as error:  # for what it cannot parse the library raises bare Exception, or panics
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise CheckpointError(f"{file} is not a usable tokenizer", got=str(error)) from error
    added = {token.content: (i, file.name) for i, token in tokenizer.get_added_tokens_decoder().items()}
    added |= _added_later(file.parent)
    learned = {token: i for token, i in tokenizer.get_vocab(with_added_tokens=False).items() if token not in added}
    if not learned and not added:
        raise CheckpointError(f"{file} has no tokens")
    token, largest = max(learned.items(), key=lambda item: item[1], default=("", -1))
    if largest >= vocab_size:
        raise CheckpointError(
            f"{file.parent}: the tokenizer does not fit the model",
            expected=f"token ids below vocab_size ({vocab_size})",
            got=f"id {largest} ({token!r} in {file.name})",
            hint="use the tokenizer this model was trained with",
        )
    without_row = sorted((i, token, source) for token, (i, source) in added.items() if i >= vocab_size)
    notice = ""
    if without_row:
        i, token, source = without_row[-1]
        notice = (
            f"{len(without_row)} added token(s) of the tokenizer have no row in the embedding of {vocab_size}, "
            f"the last one id {i} ({token!r} in {source}): text that contains one is refused"
        )
    return TokenizerFit(max([largest, *(i for i, _ in added.values())]) + 1, notice)


def _added_later(folder: Path) -> dict[str, tuple[int, str]]:
    """Tokens that transformers adds on top of tokenizer.json: token → (id, file that says so)."""
    ids: dict[str, tuple[int, str]] = {}
    if (folder / "tokenizer_config.json").is_file():
        config = _object(folder / "tokenizer_config.json")
        added = config.get("added_tokens_decoder") or {}
        if not isinstance(added, dict):
            where = f"{folder / 'tokenizer_config.json'}: added_tokens_decoder"
            raise CheckpointError(where, expected="an object", got=repr(added)[:200])
        for key, value in added.items():
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
    except (TypeError, ValueError, OverflowError):
        raise CheckpointError(f"{file}: added tokens", expected="integer ids", got=repr(key)) from None
