"""A standard checkpoint as one GGUF file, for llama.cpp and what builds on it (Ollama, LM Studio).

The official package `gguf` writes the file and quantises. What differs between families is in the family files; every
value is read from the standard checkpoint, so a student's sizes are as good as a teacher's. Tensors go through memory a
block at a time.

Dimension letters: R rows of a matrix, C its columns.
"""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, cast, get_args

import numpy as np

from kdscale.config.fields import GgufType
from kdscale.errors import CheckpointError, ConfigError, RunFolderError
from kdscale.families import Family, TensorSpec, gguf_families
from kdscale.files import atomic_path, read_json
from kdscale.models.loading import load_tokenizer, open_teacher
from kdscale.packaging.gguf_metadata import Description, describe
from kdscale.packaging.gguf_names import gguf_name, pairs_from_halves
from kdscale.packaging.gguf_tokenizer import GgufTokenizer, read_tokenizer
from kdscale.runtime.packages import require_packages
from kdscale.units import format_size
from kdscale_launch.watchdog import beat

if TYPE_CHECKING:
    import torch

    from kdscale.runtime.progress import Reporter
    from kdscale.weights import Checkpoint

_MAGIC = b"GGUF"
_BLOCK_BYTES = 1 << 25
_SLACK_BYTES = 64 << 20  # metadata: the vocabulary with its merges
_OTHERWISE = "the standard folder runs in transformers and vLLM as it is"
_F16_MAX = 65504.0
_QUANTISED = ("Q8_0", "Q4_0")
# In fp32 whatever the type: llama.cpp wants vectors so, and what is looked up by position, or routes, loses most.
_ALWAYS_F32 = ("position_embed", "router")
# Rows of these are what is quoted or chosen from, and a coarse grid costs most there; llama-quantize spares them too.
_SPARED_BY_Q4 = ("embed", "head")


@dataclass(frozen=True)
class GgufFile:
    """A written file; `kinds` is the number of tensors of each type."""

    path: Path
    bytes: int
    kinds: dict[str, int]
    notes: list[str]


@dataclass(frozen=True)
class _Tensor:
    """One tensor of the file: how many values of which type, and where its values (fp32) come from, block by block."""

    name: str
    shape: tuple[int, ...]
    kind: str
    blocks: Callable[[], Iterator[np.ndarray]]

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

        values, size = GGML_QUANT_SIZES[GGMLQuantizationType[self.kind]]
        return math.prod(self.shape) // values * size

    def tofile(self, stream: IO[bytes]) -> None:
        """Quantise and write; the official writer calls this as it would an array's method.

        Raises CheckpointError for values that are not finite, or too large for the type.
        """
        from gguf import GGMLQuantizationType, quants

        for block in self.blocks():
            largest = float(np.abs(block).max(initial=0.0))
            if not math.isfinite(largest):
                hint = "use an earlier checkpoint, or download it again"
                raise CheckpointError(f"tensor {self.name} has NaN or infinite values", hint=hint)
            if self.kind == "F16" and largest > _F16_MAX:
                what = f"tensor {self.name} in f16"
                raise CheckpointError(what, expected=f"values up to {_F16_MAX:g}", got=f"{largest:g}", hint="take bf16")
            stream.write(np.ascontiguousarray(quants.quantize(block, GGMLQuantizationType[self.kind])).data)
            beat()


def write_gguf(folder: Path, out: Path, gguf_type: str, reporter: Reporter, *, name: str = "") -> GgufFile:
    """Write the model in `folder` to the file `out`, which appears complete or not at all.

    `gguf_type` is a GgufType; `name` is what programs show for it, by default the folder's. Raises before anything is
    written: ConfigError (unknown type, package `gguf` missing, `out` is something else), RunFolderError (no room),
    CheckpointError (a family, config or tokenizer that GGUF or llama.cpp cannot hold: all reasons at once).
    """
    if gguf_type not in get_args(GgufType):
        known = ", ".join(get_args(GgufType))
        raise ConfigError(
            "the type of a GGUF file", expected=f"one of {known}", got=str(gguf_type), hint=_k_quants(out, gguf_type)
        )
    if os.path.lexists(out) and not _is_gguf(out):
        raise ConfigError(
            f"{out} is there already", expected="no file, or a GGUF file to replace", got="something else"
        )
    require_packages("a GGUF file", ("gguf",), "gguf")
    checkpoint, family = open_teacher(folder, reporter)
    description, tokenizer = _described(checkpoint, family)
    tensors = list(_tensors(checkpoint, family, description, gguf_type.upper()))
    notes = [*description.notes, *tokenizer.notes, *_fallback_notes(tensors, gguf_type.upper())]
    for note in notes:
        reporter.say(f"  note: {note}")
    _check_room(out, sum(tensor.nbytes for tensor in tensors))
    metadata = _metadata(
        family, description, tokenizer, gguf_type, _shown_name(name or folder.resolve().name, tokenizer)
    )
    with atomic_path(out) as tmp:
        _write(tmp, family, metadata, tensors, reporter)
    kinds = {kind: sum(tensor.kind == kind for tensor in tensors) for kind in sorted({t.kind for t in tensors})}
    return GgufFile(out, out.stat().st_size, kinds, notes)


def check_gguf(folder: Path) -> None:
    """Raises ConfigError or CheckpointError where `write_gguf` would refuse the model in `folder`; writes nothing."""
    require_packages("a GGUF file", ("gguf",), "gguf")
    _described(*open_teacher(folder))


def _is_gguf(path: Path) -> bool:
    if not path.is_file():
        return False
    with path.open("rb") as stream:
        return stream.read(len(_MAGIC)) == _MAGIC


def _k_quants(out: Path, gguf_type: str) -> str:
    """How to get a type that only llama.cpp's own program writes."""
    return (
        f"for K-quants write bf16 and let llama.cpp's program make them: "
        f"llama-quantize model-bf16.gguf {out.name} {str(gguf_type).upper()[:20]}"
    )


def _described(checkpoint: Checkpoint, family: Family) -> tuple[Description, GgufTokenizer]:
    """The model and its tokenizer in GGUF's terms. Raises CheckpointError with every reason why they have none."""
    folder, where = checkpoint.path, str(checkpoint.path / "config.json")
    if family.data.gguf is None:
        raise CheckpointError(
            f"{where}: a {family.name} model as GGUF", expected="one of " + ", ".join(gguf_families()),
            got=f"{family.name}, which has no GGUF table", hint=_OTHERWISE,
        )  # fmt: skip
    if family.module_in_whole is not None:
        raise CheckpointError(
            f"{where}: a model of several modalities as GGUF", expected="a model of text alone",
            got=f"one around {family.name}", hint=_OTHERWISE,
        )  # fmt: skip
    description = describe(folder, family, checkpoint.config)
    tokenizer, loaded = None, load_tokenizer(folder)
    try:
        vocab = int(description.values["vocab_size"])
        tokenizer = read_tokenizer(folder, loaded, vocab, end_ids(folder, checkpoint.config, loaded.eos_token_id))
    except CheckpointError as error:
        if not description.problems:
            raise
        description.problems.append(str(error))
    if description.problems or tokenizer is None:
        raise CheckpointError(
            f"{where}: llama.cpp would compute another model", got="; ".join(description.problems),
            hint=_OTHERWISE,
        )  # fmt: skip
    return description, tokenizer


def end_ids(folder: Path, config: dict[str, Any], eos: int | None) -> list[int]:
    """The tokens that end an answer, the tokenizer's own first, each once."""
    file = folder / "generation_config.json"
    generation = read_json(file, CheckpointError, expect=dict) if file.is_file() else {}
    configured = generation.get("eos_token_id", config.get("eos_token_id"))
    listed = configured if isinstance(configured, list) else [configured]
    return list(dict.fromkeys(int(token) for token in (eos, *listed) if token is not None))


def _tensors(checkpoint: Checkpoint, family: Family, description: Description, kind: str) -> Iterator[_Tensor]:
    """Every tensor of the file in order. Raises CheckpointError for a role that GGUF has no name for."""
    for vector_name, vector in description.vectors.items():
        yield _Tensor(vector_name, vector.shape, "F32", partial(iter, [vector]))
    specs = family.tensors(checkpoint.config)
    has_q_norm = any(spec.role == "q_norm" for spec in specs.values())
    parts: dict[str, list[str]] = {}  # experts of a layer are one tensor, expert after expert
    for source, spec in specs.items():
        name = gguf_name(spec.role, spec.layer, spec.expert is not None)
        if name is None:
            raise CheckpointError(f"{checkpoint.path}: {source} has no name in GGUF files")
        parts.setdefault(name, []).append(source)
    for name, sources in parts.items():
        spec = specs[sources[0]]
        change = _change(family, spec, description, has_q_norm)
        shape = tuple(reversed(spec.shape)) if _is_transposed(family, spec) else spec.shape
        shape = shape if spec.expert is None else (len(sources), *shape)
        yield _Tensor(name, shape, _kind(spec, shape, kind), _reading(checkpoint, sources, change))


def _kind(spec: TensorSpec, shape: tuple[int, ...], kind: str) -> str:
    """The type a tensor is written in: as asked, but for vectors, for what q4_0 spares, and rows no block divides."""
    if len(shape) == 1 or spec.role in _ALWAYS_F32:
        return "F32"
    kind = "Q8_0" if kind == "Q4_0" and spec.role in _SPARED_BY_Q4 else kind
    return "F16" if kind in _QUANTISED and shape[-1] % 32 else kind


def _fallback_notes(tensors: list[_Tensor], kind: str) -> list[str]:
    short = [tensor for tensor in tensors if tensor.kind == "F16"] if kind in _QUANTISED else []
    widths = ", ".join(sorted({str(tensor.shape[-1]) for tensor in short}))
    return [f"{len(short)} tensors stay in f16: rows of {widths} are no multiple of 32"] if short else []


def _is_transposed(family: Family, spec: TensorSpec) -> bool:
    """Whether a projection is stored [input, output] (GPT-2's Conv1D); GGUF has [output, input]."""
    return len(spec.shape) == 2 and spec.component in ("attention", "ffn") and family.transposed("o")


def _change(
    family: Family, spec: TensorSpec, description: Description, has_q_norm: bool
) -> Callable[[np.ndarray], np.ndarray] | None:
    """What is done to a whole tensor before it is written; None where its rows are copied block by block."""
    steps: list[Callable[[np.ndarray], np.ndarray]] = []
    if _is_transposed(family, spec):
        steps.append(np.transpose)
    if spec.is_gain and family.data.norm.gain == "one_plus_weight":
        steps.append(lambda gain: gain + 1)
    if description.query_factor != 1 and spec.role in (("q_norm",) if has_q_norm else ("q", "q_bias")):
        steps.append(lambda queries: queries * np.float32(description.query_factor))
    heads = {"q": "attention.head_count", "k": "attention.head_count_kv"}.get(spec.role.removesuffix("_bias"))
    if heads is not None and family.data.gguf is not None and family.data.gguf.rotary == "pairs":
        count = int(description.values[heads])
        steps.append(lambda rows_RC: pairs_from_halves(rows_RC, count))
    if not steps:
        return None

    def apply(values: np.ndarray) -> np.ndarray:
        for step in steps:
            values = step(values)
        return np.ascontiguousarray(values)

    return apply


def _reading(
    checkpoint: Checkpoint, sources: list[str], change: Callable[[np.ndarray], np.ndarray] | None
) -> Callable[[], Iterator[np.ndarray]]:
    def read() -> Iterator[np.ndarray]:
        for source in sources:
            if change is not None:
                yield change(_fp32(checkpoint.tensor(source)))
            else:
                yield from map(_fp32, checkpoint.blocks(source, _BLOCK_BYTES))

    return read


def _fp32(values: torch.Tensor) -> np.ndarray:
    return values.float().numpy()


def _check_room(out: Path, need: int) -> None:
    """Raise RunFolderError where the disk has no room for the file."""
    existing = next(path for path in out.resolve().parents if path.exists())
    need, free = need + _SLACK_BYTES, shutil.disk_usage(existing).free
    if need > free:
        raise RunFolderError(
            f"{out}: no room for the file", expected=format_size(need), got=f"{format_size(free)} free",
            hint="free some space, choose another folder, or a smaller type",
        )  # fmt: skip


def _metadata(
    family: Family, description: Description, tokenizer: GgufTokenizer, gguf_type: str, name: str
) -> dict[str, Any]:
    """Every key of the file but its architecture, which the official writer adds."""
    from gguf import GGML_QUANT_VERSION, LlamaFileType

    assert family.data.gguf is not None
    all_or_most = "ALL" if gguf_type == "f32" else "MOSTLY"
    values = {f"{family.data.gguf.architecture}.{key}": value for key, value in description.values.items()}
    ggml: dict[str, Any] = {"model": tokenizer.model, "pre": tokenizer.pre, "tokens": tokenizer.tokens}
    ggml |= {"token_type": tokenizer.types, "merges": tokenizer.merges, "scores": tokenizer.scores}
    ggml |= {f"{which}_token_id": number for which, number in tokenizer.ids.items()} | tokenizer.flags
    values |= {f"tokenizer.ggml.{key}": value for key, value in ggml.items() if value not in ([], None)}
    if tokenizer.chat_template is not None:
        values["tokenizer.chat_template"] = tokenizer.chat_template
    return {
        "general.type": "model",
        "general.name": name,
        "general.file_type": int(LlamaFileType[f"{all_or_most}_{gguf_type.upper()}"]),
        "general.quantization_version": GGML_QUANT_VERSION,
        **values,
    }


def _shown_name(name: str, tokenizer: GgufTokenizer) -> str:
    """`name`, but for one that llama.cpp takes as Phi-3's: it then looks for tokens of Phi-3's tokenizer, and fails."""
    looks = any(part in name.lower() for part in ("phi3", "phi-3"))
    return "model" if looks and not {"<unk>", "<s>", "<|endoftext|>"} <= set(tokenizer.tokens) else name


def _write(path: Path, family: Family, metadata: dict[str, Any], tensors: list[_Tensor], reporter: Reporter) -> None:
    from gguf import GGMLQuantizationType, GGUFWriter

    assert family.data.gguf is not None
    writer = GGUFWriter(None, family.data.gguf.architecture)
    adders: dict[type, Callable[[str, Any], None]] = {
        bool: writer.add_bool,
        int: writer.add_uint32,
        float: writer.add_float32,
        str: writer.add_string,
        list: writer.add_array,
    }
    for key, value in metadata.items():
        adders[type(value)](key, value)
    for tensor in tensors:
        kind = GGMLQuantizationType[tensor.kind]
        writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), tensor.nbytes, raw_dtype=kind)
    try:
        writer.write_header_to_file(path)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        with reporter.bar("writing GGUF", sum(tensor.nbytes for tensor in tensors), unit="B") as bar:
            for tensor in tensors:
                writer.write_tensor_data(cast("Any", tensor))
                bar.advance(tensor.nbytes)
    finally:
        writer.close()
