"""Writes the model of a GGUF file as a standard folder: weights, config, tokenizer, chat template, generation defaults.

Each tensor is dequantised in fp32, alone in memory, and rounded once to the dtype of the folder.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from kdscale.errors import CheckpointError, ConfigError
from kdscale.families import Family, TensorSpec
from kdscale.files import atomic_dir, explain_os_errors, read_json, write_json, write_text
from kdscale.packaging.gguf_names import halves_from_pairs
from kdscale.packaging.gguf_teacher.config import read_config, tensor_names
from kdscale.packaging.gguf_teacher.file import GgufFile
from kdscale.packaging.gguf_teacher.tokenizer import Rebuilt, rebuild
from kdscale.weights import ShardWriter, TensorInfo, check_tokenizer, copy_sidecars

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from kdscale.runtime.progress import Reporter

ORIGIN_FILE = "kdscale_gguf.json"  # what the folder was made from
_SAFETENSORS = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
_PROBES = ("In 1984 it cost 12,345.67, or 3x less.", "  tabs\tand\n\nlines; naïve café — 東京 🙂 don't 10:30")


def import_gguf(
    path: Path, folder: Path, reporter: Reporter, *, dtype: str = "bfloat16", tokenizer: Path | None = None
) -> Path:
    """Make `folder` the standard checkpoint of the GGUF file at `path`; it appears complete or not at all.

    `tokenizer` is a folder with the model's own tokenizer, which is taken in place of the file's; its tokens have to be
    the file's. Raises ConfigError where `folder` holds something else, CheckpointError for what cannot be read.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"{folder} is there already", expected="no folder", hint="choose another one, or delete it")
    if not path.is_file():
        raise ConfigError(f"{path} does not exist", expected="a GGUF file")
    file = GgufFile(path)
    with explain_os_errors(folder), atomic_dir(folder) as tmp:
        write_checkpoint(file, tmp, dtype, tokenizer=tokenizer)
        kinds = ", ".join(f"{count} {kind}" for kind, count in file.kinds.items())
        write_json(tmp / ORIGIN_FILE, {"file": path.name, "bytes": path.stat().st_size, "tensors": file.kinds})
        reporter.say(f"{path.name}: {file.architecture}, {kinds}; dequantised to {dtype} in {folder}")
    return folder


def write_checkpoint(
    file: GgufFile, folder: Path, dtype: str, *, ends: list[int] | None = None, tokenizer: Path | None = None
) -> None:
    """Write the standard files of `file` into `folder`, which exists.

    `ends`: the ids that end an answer, in place of those that the file names.
    """
    family, config = read_config(file)
    ends = ends or _ends(file)
    rebuilt = None
    if tokenizer is not None:
        _take_tokenizer(file, tokenizer, folder)
    else:
        rebuilt = rebuild(file, int(config.get("max_position_embeddings", 1 << 20)))
        _write_tokenizer(file, rebuilt, folder, ends)
    special = {f"{name}_token_id": number for name, number in _special(file).items()}
    special |= {"eos_token_id": ends[0]} if ends else {}
    config = dict(sorted({**config, **special, "dtype": dtype}.items()))
    write_json(folder / "config.json", config)
    write_json(folder / "generation_config.json", {**special, **({"eos_token_id": ends} if ends else {})})
    _write_weights(file, family, config, folder, dtype)
    if rebuilt is not None:
        _check_reload(folder, rebuilt.tokenizer)
    check_tokenizer(folder, family.dims(config).vocab)


def _special(file: GgufFile) -> dict[str, int]:
    found = {name: file.token_id(key) for name, key in (("bos", "bos"), ("pad", "padding"))}
    return {name: number for name, number in found.items() if number is not None}


def _ends(file: GgufFile) -> list[int]:
    found = [file.token_id(name) for name in ("eos", "eot", "eom")]
    return list(dict.fromkeys(number for number in found if number is not None))


def _write_weights(file: GgufFile, family: Family, config: Mapping[str, Any], folder: Path, dtype: str) -> None:
    import torch

    specs, stored = family.tensors(dict(config)), tensor_names(family, config)
    infos = {name: TensorInfo(spec.shape, _SAFETENSORS[dtype]) for name, spec in specs.items()}
    with ShardWriter(folder, infos) as writer:
        for source, names in stored.items():
            values = file.tensor(source)
            values = values if specs[names[0]].expert is not None else values[None]
            if len(values) != len(names):
                raise CheckpointError(f"{file.path}: {source}", expected=f"{len(names)} experts", got=str(len(values)))
            for name, value in zip(names, values, strict=True):
                changed = _undo(file, family, specs[name])(value)
                if changed.shape != specs[name].shape:
                    what = f"{file.path}: tensor {source}"
                    raise CheckpointError(what, expected=str(list(specs[name].shape)), got=str(list(changed.shape)))
                if not np.isfinite(changed).all():
                    raise CheckpointError(f"{file.path}: tensor {source} has NaN or infinite values")
                writer.add(name, torch.from_numpy(np.array(changed)).to(getattr(torch, dtype)))


def _undo(file: GgufFile, family: Family, spec: TensorSpec) -> Callable[[np.ndarray], np.ndarray]:
    """The inverse of what the writer of GGUF files does to a tensor (packaging/gguf_writer)."""
    table, role = family.data.gguf, spec.role.removesuffix("_bias")
    assert table is not None
    if len(spec.shape) == 2 and spec.component in ("attention", "ffn") and family.transposed("o"):
        return np.transpose
    if spec.is_gain and family.data.norm.gain == "one_plus_weight":
        return lambda gain: gain - np.float32(1)
    if table.rotary == "pairs" and role in ("q", "k"):
        heads = file.size("attention.head_count")
        count = heads if role == "q" else file.size("attention.head_count_kv", heads)
        return lambda rows: halves_from_pairs(rows, count)
    return lambda values: values


def _write_tokenizer(file: GgufFile, rebuilt: Rebuilt, folder: Path, ends: list[int]) -> None:
    rebuilt.tokenizer.save(str(folder / "tokenizer.json"), pretty=True)
    tokens = file.field("tokenizer.ggml.tokens")
    write_json(folder / "tokenizer_config.json", {**rebuilt.config, **({"eos_token": tokens[ends[0]]} if ends else {})})
    if (template := file.get("tokenizer.chat_template")) is not None:
        write_text(folder / "chat_template.jinja", str(template))


def _take_tokenizer(file: GgufFile, source: Path, folder: Path) -> None:
    """Copy the tokenizer's files, once its tokens are known to be those of the file. Raises CheckpointError."""
    from tokenizers import Tokenizer

    read_json(source / "tokenizer.json", CheckpointError, expect=dict)
    own, tokens = Tokenizer.from_file(str(source / "tokenizer.json")), file.field("tokenizer.ggml.tokens")
    known = own.get_vocab(with_added_tokens=False)
    other = [
        token for token, number in known.items() if number >= len(tokens) or _plain(tokens[number]) != _plain(token)
    ]
    if other:
        raise CheckpointError(
            f"{source}: this tokenizer is not the one of {file.path.name}", expected="the same token of each id",
            got=f"{len(other)} of {len(known)} differ, the first {other[0]!r}",
        )  # fmt: skip
    copy_sidecars(source, folder)
    (folder / "generation_config.json").unlink(missing_ok=True)  # written anew


def _plain(token: str) -> str:
    return token.replace("\u2581", " ")  # GGUF has added tokens with plain spaces


def _check_reload(folder: Path, built: Tokenizer) -> None:
    """Check that AutoTokenizer loads what was built: it splits alike, and text comes back exactly."""
    from kdscale.models.loading import load_tokenizer

    loaded = load_tokenizer(folder)
    for text in _PROBES:
        ids = list(loaded(text, add_special_tokens=False)["input_ids"])
        unknown = loaded.unk_token_id is not None and loaded.unk_token_id in ids
        if ids != built.encode(text, add_special_tokens=False).ids or (loaded.decode(ids) != text and not unknown):
            raise CheckpointError(
                f"{folder} does not load with the tokenizer that was written",
                got=f"{text!r} becomes {json.dumps(loaded.convert_ids_to_tokens(ids))}",
                hint="this version of transformers changes the pre-tokenizer; please report it",
            )
