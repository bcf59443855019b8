"""The forms in which a package can hold a model: one row a form, with what it takes and who writes it."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from kdscale.config.fields import GgufType
from kdscale.errors import ConfigError, KdscaleError
from kdscale.files import write_json
from kdscale.runs.folder import WEIGHTS
from kdscale.runs.models import model_title
from kdscale.runtime.progress import Reporter
from kdscale.weights import Checkpoint, ShardWriter, config_on_disk, copy_sidecars, without_own_classes
from kdscale_launch.watchdog import beat

Kind = Literal["transformers", "gguf"]  # a folder that transformers, vLLM and SGLang load, or one file of llama.cpp's

_BLOCK_BYTES = 1 << 26
_FLOATS = ("F32", "F16")  # what bf16 is made of, beside itself
_GGUF = "gguf-"
# Bits of a value in a GGUF file, with its share of a block's scale; what q4_0 spares is in q8_0.
_GGUF_BITS: dict[GgufType, float] = {"f32": 32, "bf16": 16, "f16": 16, "q8_0": 8.5, "q4_0": 8.5}


@dataclass(frozen=True)
class Source:
    """What a package is made of: the student's folder, and those of its forms with fewer bits, by name."""

    name: str  # the model's, and of its files
    student: Path
    quantized: Mapping[str, Path] = field(default_factory=dict)
    own_code: bool = False  # whether code of the checkpoint's own goes along
    max_shard_bytes: int = 5_000_000_000


@dataclass(frozen=True, kw_only=True)
class Form:
    """One row: `write` leaves it in a folder (or in a file, of kind gguf) that does not exist, or is empty."""

    name: str
    title: str
    kind: Kind
    nbytes: Callable[[Source], int]  # an upper bound of what it writes
    write: Callable[[Source, Path, Reporter], None]
    check: Callable[[Source], None] = lambda source: None  # raises where it cannot be made


def forms_of(source: Source) -> dict[str, Form]:
    """Every form that this model can be packaged in, the usual first."""
    rows = [
        Form(name="bf16", title="bf16", kind="transformers", nbytes=_bf16_bytes, write=_write_bf16),
        Form(
            name="unchanged", title="as distilled", kind="transformers",
            nbytes=lambda source: _nbytes(source.student),
            write=lambda source, out, reporter: _copy(source.student, out, source.own_code),
        ),
        *(_quantized(name, folder) for name, folder in source.quantized.items()),
        *(_gguf(kind) for kind in _GGUF_BITS),
    ]  # fmt: skip
    return {row.name: row for row in rows}


def usual_forms(source: Source, reporter: Reporter) -> list[str]:
    """What is packaged where nothing is asked for: bf16, the forms that the run made, and GGUF where possible."""
    names, gguf = ["bf16", *source.quantized], forms_of(source)[f"{_GGUF}q8_0"]
    try:
        gguf.check(source)
    except KdscaleError as error:
        reporter.say(f"  note: without a GGUF file: {error.what}" + (f" ({error.got})" if error.got else ""))
        return names
    return [*names, gguf.name]


def chosen(source: Source, asked: str) -> list[Form]:
    """The forms that a list such as `bf16,gguf-q8_0` names. Raises ConfigError for an unknown name."""
    known = forms_of(source)
    names = list(dict.fromkeys(word.strip() for word in asked.split(",") if word.strip()))
    if unknown := [name for name in names if name not in known]:
        raise ConfigError(
            "--forms", expected=f"some of {', '.join(known)}", got=", ".join(unknown),
            hint="a form with fewer bits comes from the run's section quantize",
        )  # fmt: skip
    if not names:
        raise ConfigError("--forms", expected=f"some of {', '.join(known)}", got="none")
    return [known[name] for name in names]


def _quantized(name: str, folder: Path) -> Form:
    return Form(
        name=name, title=model_title(name), kind="transformers", nbytes=lambda source: _nbytes(folder),
        write=lambda source, out, reporter: _copy(folder, out, source.own_code),
    )  # fmt: skip


def _gguf(kind: GgufType) -> Form:
    def write(source: Source, out: Path, reporter: Reporter) -> None:
        from kdscale.packaging.gguf_writer import write_gguf

        write_gguf(source.student, out, kind, reporter, name=source.name)

    def check(source: Source) -> None:
        from kdscale.packaging.gguf_writer import check_gguf

        check_gguf(source.student)

    return Form(
        name=f"{_GGUF}{kind}", title=f"GGUF {kind.upper()}", kind="gguf", write=write, check=check,
        nbytes=lambda source: int(_values(Checkpoint.open(source.student)) * _GGUF_BITS[kind] / 8 * 1.2),
    )  # fmt: skip


def _values(checkpoint: Checkpoint) -> int:
    return sum(math.prod(checkpoint.spec(name).shape) for name in checkpoint.names)


def _bf16_bytes(source: Source) -> int:
    return 2 * _values(Checkpoint.open(source.student))


def _copy(folder: Path, out: Path, own_code: bool) -> None:
    """Config, weights and what lies beside them; never anything else that the folder holds."""
    _beside(folder, out, own_code)
    for path in _weight_files(folder):
        shutil.copyfile(path, out / path.name)
        beat()


def _weight_files(folder: Path) -> list[Path]:
    """Weights and their index, as they are on disk: `Checkpoint` reads quantised ones as what they stand for."""
    return sorted({path for pattern in WEIGHTS for path in folder.glob(pattern)} - {folder / "config.json"})


def _nbytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in _weight_files(folder))


def _beside(folder: Path, out: Path, own_code: bool) -> None:
    out.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(folder / "config.json", out / "config.json")
    config = config_on_disk(folder)
    if not own_code and without_own_classes(config) != config:
        write_json(out / "config.json", without_own_classes(config))
    copy_sidecars(folder, out, code=own_code)


def _write_bf16(source: Source, out: Path, reporter: Reporter) -> None:
    """The student with every float of more or other bits rounded to bf16; a copy where there is none."""
    import torch

    checkpoint = Checkpoint.open(source.student)
    before = {name: checkpoint.spec(name) for name in checkpoint.names}
    specs = {name: spec._replace(dtype="BF16") if spec.dtype in _FLOATS else spec for name, spec in before.items()}
    if specs == before:
        _copy(source.student, out, source.own_code)
        return
    _beside(source.student, out, source.own_code)
    config = {key: value for key, value in config_on_disk(out).items() if key != "torch_dtype"}
    write_json(out / "config.json", {**config, "dtype": "bfloat16"})
    with ShardWriter(out, specs, source.max_shard_bytes) as writer:
        for name, spec in specs.items():
            blocks = checkpoint.blocks(name, _BLOCK_BYTES)
            rounded = spec.dtype != before[name].dtype
            writer.add_blocks(name, (block.to(torch.bfloat16) for block in blocks) if rounded else blocks)
