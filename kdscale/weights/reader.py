"""A checkpoint folder, opened without reading its tensors: each is read when it is asked for, and only its bytes.

torch is imported only where tensors are read, so that a plan can be made from shapes without it.
"""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from kdscale.errors import CheckpointError
from kdscale.files import read_json, safe_join, sha256_file
from kdscale.weights.expected import ExpectedTensor, ExpectedTensors
from kdscale.weights.header import DTYPE_BYTES, PACKED_BYTES, TensorEntry, read_header
from kdscale.weights.quantised import Entry, Quantised, decoded_entries, format_of, without_quantisation
from kdscale.weights.quantised.packed import PackedTensor
from kdscale.weights.tensor_bytes import read_ahead, read_into, read_rows, read_values, torch_dtype
from kdscale.weights.unreadable import INDEX_FILE, SINGLE_FILE, listed, no_config, no_weights

if TYPE_CHECKING:
    import torch

_FILL_BYTES = 1 << 22


class TensorInfo(NamedTuple):
    """The shape of a tensor on disk, and its dtype by its safetensors name (F32, BF16, ...)."""

    shape: tuple[int, ...]
    dtype: str


def read_config(folder: Path) -> dict[str, Any]:
    """Read config.json of a checkpoint folder as that of the plain model, which its weights are read as.

    Raises CheckpointError when it is missing, not a JSON object, or names a quantised format that cannot be read.
    """
    config = config_on_disk(folder)
    format_of(config, str(folder / "config.json"))
    return without_quantisation(config)


def config_on_disk(folder: Path) -> dict[str, Any]:
    """Read config.json as it is, whatever it says of quantised weights. Raises CheckpointError."""
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is not a folder", expected="a folder with config.json and *.safetensors")
    if not (folder / "config.json").exists():
        raise no_config(folder)
    config = read_json(folder / "config.json", CheckpointError)
    if not isinstance(config, dict):
        raise CheckpointError(f"{folder / 'config.json'}", expected="a JSON object", got=type(config).__name__)
    for field in _MAY_BE_INFINITE & config.keys():
        config[field] = _tagged(config[field])
    return config


def quantised_notice(folder: Path) -> str | None:
    """What a plan and a report say of a model whose weights are stored quantised; None of another one.

    Raises CheckpointError as `read_config` does.
    """
    form = format_of(config_on_disk(folder), str(folder / "config.json"))
    if form is None:
        return None
    return (
        f"the weights of {folder.name} are stored quantised ({form.label}) and dequantised as they are read: what that "
        "lost, the student inherits"
    )


# Lists of limits, in which Mamba models say that there is none.
_MAY_BE_INFINITE = {"time_step_limit"}


def _tagged(value: Any) -> Any:
    """Infinity as transformers writes it, since it is no number of JSON."""
    if isinstance(value, list):
        return [_tagged(item) for item in value]
    return {"__float__": "Infinity"} if value == math.inf else value


def checkpoint_identity(folder: Path) -> dict[str, Any]:
    """What tells checkpoints apart without reading their weights: config.json's hash, the weight files' sizes."""
    sizes = {file.name: file.stat().st_size for file in sorted(folder.glob("*.safetensors"))}
    return {**sizes, "config": sha256_file(folder / "config.json")}


class Checkpoint:
    """An opened checkpoint folder; make one with `Checkpoint.open`.

    `config` is config.json, `names` the tensors in file order, `files` the weight files, `path` the folder. One that is
    quantised is read as the plain model that it stands for, config and tensors alike; `quantised` says what it was.
    Once it was verified against a family, `names` are the family's, and `carried` those of other parts of the model.
    """

    def __init__(
        self,
        path: Path,
        config: dict[str, Any],
        entries: Mapping[str, Entry],
        files: list[Path],
        quantised: Quantised | None = None,
    ):
        self.path, self.config, self.files, self.quantised = path, config, files, quantised
        self._entries = dict(entries)
        self._carried: dict[str, Entry] = {}
        self._decoded: tuple[PackedTensor, torch.Tensor] | None = None

    @classmethod
    def open(cls, path: Path) -> Checkpoint:
        """Open a folder, checking its config, index and every header but no tensor's values.

        Raises CheckpointError for anything missing, damaged, contradictory, unsafe (pickle) or unsupported.
        """
        try:
            config = config_on_disk(path)
            form = format_of(config, str(path / "config.json"))
            entries, files = _read_files(path, DTYPE_BYTES if form is None else PACKED_BYTES)
            if form is None:
                return cls(path, config, entries, files)
            plain, quantised = decoded_entries(entries, form)
            return cls(path, without_quantisation(config), plain, files, quantised)
        except PermissionError as error:
            raise CheckpointError(f"{error.filename or path} cannot be read", got="permission denied") from error

    @property
    def names(self) -> list[str]:
        """All tensors, in file order."""
        return list(self._entries)

    @property
    def carried(self) -> list[str]:
        """Tensors that go along with the language model and that no cut has to understand, in file order."""
        return list(self._carried)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors together, as they are read."""
        return sum(entry.nbytes for entry in self._entries.values())

    @property
    def carried_nbytes(self) -> int:
        """Bytes of the tensors in `carried`."""
        return sum(entry.nbytes for entry in self._carried.values())

    def spec(self, name: str) -> TensorInfo:
        """Shape and dtype of one tensor, as it is read."""
        entry = self._entry(name)
        return TensorInfo(entry.shape, entry.dtype)

    def itemsize(self, name: str) -> int:
        """Bytes a value of one tensor."""
        return DTYPE_BYTES[self._entry(name).dtype]

    def tensor(self, name: str) -> torch.Tensor:
        """Read one tensor into memory of its own on the CPU: as it is on disk, or decoded. Reads just its bytes."""
        entry = self._entry(name)
        return entry.tensor() if isinstance(entry, PackedTensor) else read_rows(entry, name)

    def blocks(self, name: str, max_bytes: int) -> Iterator[torch.Tensor]:
        """Read one tensor in blocks of whole rows (of its first dimension), in order.

        A block has at most `max_bytes`, or is one row. It leaves memory when the caller drops it: nothing is mapped.
        """
        entry = self._entry(name)
        rows, size = entry.shape[0] if entry.shape else 1, entry.nbytes
        if size <= max_bytes or rows < 2:
            yield self.tensor(name)
            return
        row_bytes = size // rows
        step = max(1, max_bytes // row_bytes)
        if isinstance(entry, PackedTensor):
            yield from _decoded_blocks(entry, step)
            return
        with entry.file.open("rb", buffering=0) as stream:
            for row in range(0, rows, step):
                count = min(step, rows - row)
                begin = entry.begin + row * row_bytes
                read_ahead(stream, begin, 2 * step * row_bytes)
                yield read_values(stream, entry, name, begin, begin + count * row_bytes).reshape(
                    count, *entry.shape[1:]
                )

    def fill(self, name: str, begin: int, out: torch.Tensor) -> None:
        """Write the tensor's values `begin` to `begin + len(out)`, counted in storage order, into the flat `out`.

        Only their bytes are read: straight into `out` where it has the dtype on disk, else in converted blocks. Raises
        ValueError when the tensor has no such values.
        """
        entry, end = self._entry(name), begin + out.numel()
        if not 0 <= begin <= end <= math.prod(entry.shape):
            raise ValueError(f"{name} of shape {entry.shape} has no values {begin} to {end}")
        if isinstance(entry, PackedTensor):
            out.copy_(self._decoded_values(entry, begin, end))
            return
        width = DTYPE_BYTES[entry.dtype]
        direct = out.device.type == "cpu" and out.dtype == torch_dtype(entry.dtype)
        step = out.numel() if direct else max(1, _FILL_BYTES // width)
        with entry.file.open("rb", buffering=0) as stream:
            for done in range(0, out.numel(), max(1, step)):
                target = out[done : done + step]
                first = entry.begin + (begin + done) * width
                if direct:
                    read_into(stream, entry, name, first, target)
                else:
                    target.copy_(read_values(stream, entry, name, first, first + target.numel() * width))

    def _decoded_values(self, entry: PackedTensor, begin: int, end: int) -> torch.Tensor:
        """Flat values of a quantised matrix. Where few are asked for, more of the same will be: all are kept."""
        if end - begin >= entry.row_values:
            return entry.values(begin, end)
        known = self._decoded
        if known is None or known[0] is not entry:
            known = self._decoded = (entry, entry.values(0, math.prod(entry.shape)))
        return known[1][begin:end]

    def check_finite(self) -> None:
        """Read every tensor. Raises CheckpointError naming the first that has NaN or infinite values."""
        import torch

        for name in (*self.names, *self.carried):
            if not all(bool(torch.isfinite(block).all()) for block in self.blocks(name, _FILL_BYTES)):
                raise CheckpointError(
                    f"{self.path}: tensor {name} has NaN or infinite values",
                    hint="download the checkpoint again; if it was trained to this state, use an earlier one",
                )

    def position(self, name: str) -> tuple[int, int]:
        """The number of the file and the offset of the tensor's bytes: this order reads every file once through."""
        entry = self._entry(name)
        return self.files.index(entry.file), entry.begin

    def verify_against(self, family: ExpectedTensors) -> list[str]:
        """Check that names and shapes are the family's for this config; returns notices for the user.

        A stored copy of a tied tensor, old buffers that no model reads and heads that the student does without are
        dropped from `names`, and a notice says so. Tensors of a checkpoint that lacks the base model's prefix get their
        full names, and one that holds several of the family's (the experts of a layer, stacked) is read as these. What
        belongs to other parts of the model is in `carried` from then on.
        Raises CheckpointError listing every missing, unexpected or differently shaped tensor, or when a tensor that the
        config calls tied differs from the one it is tied to.
        """
        expected, tied = family.tensors(self.config), family.tied(self.config)
        self._entries = {family.full_name(name): entry for name, entry in self._entries.items()}
        self._split_joined(expected, family.language_names)
        self._carried = {name: e for name, e in self._entries.items() if name not in expected and family.carried(name)}
        self._entries = {name: entry for name, entry in self._entries.items() if name not in self._carried}
        heads = {
            what: {name for name in self._entries if name not in expected and fnmatch.fnmatchcase(name, glob)}
            for glob, what in family.dropped().items()
        }
        extra = [name for name in self._entries if name not in expected and name not in set().union(*heads.values())]
        buffers = [name for name in extra if any(fnmatch.fnmatchcase(name, glob) for glob in family.ignored())]
        copies = [name for name in extra if name in tied and tied[name] in self._entries]
        zeros = [name for name in extra if self._is_empty_bias(name)]
        wrong = {
            "missing": [name for name in expected if name not in self._entries],
            "unexpected": [name for name in extra if name not in {*buffers, *copies, *zeros}],
            "wrong shape": [
                f"{name} {list(self._entries[name].shape)} instead of {list(spec.shape)}"
                for name, spec in expected.items()
                if name in self._entries and self._entries[name].shape != spec.shape
            ],
        }
        if any(wrong.values()):
            raise CheckpointError(
                f"{self.path}: config.json and the weights disagree",
                expected=f"the {len(expected)} tensors that config.json describes",
                got="; ".join(f"{len(names)} {what}: {listed(names)}" for what, names in wrong.items() if names),
                hint="is it the right config.json? kdscale reads whole causal LMs, neither adapters nor base models",
            )
        for name in copies:
            self._check_copy(name, tied[name])
        self._entries = {name: self._entries[name] for name in self._entries if name in expected}
        notices = [f"{name} is a stored copy of the tied {tied[name]}: ignored" for name in copies]
        notices += [f"{len(names)} tensors of the {what} are left out" for what, names in heads.items() if names]
        notices += [f"{len(zeros)} biases that a quantiser added, all zero, are left out"] if zeros else []
        if self.quantised is not None:
            notices.append(self.quantised.notice)
        return notices + ([f"{len(buffers)} tensors that no model reads are ignored"] if buffers else [])

    def _split_joined(self, expected: Mapping[str, ExpectedTensor], prefixes: Mapping[str, str]) -> None:
        """Enter ranges of a tensor that is a whole parameter of the model as the tensors that the family has for it.
        `prefixes`: beginnings of names on disk, and of the parameters that they are."""
        joined: dict[str, list[str]] = {}
        for name, spec in expected.items():
            begins = ((p, text) for p, text in prefixes.items() if spec.parameter.startswith(text))
            prefix, text = next(begins, ("", ""))
            whole = f"{prefix}{spec.parameter.removeprefix(text)}"
            if name not in self._entries and whole in self._entries and whole not in expected:
                joined.setdefault(whole, []).append(name)
        for parameter, names in joined.items():
            entry, specs = self._entries[parameter], [expected[name] for name in names]
            experts = len({spec.expert for spec in specs})
            rows, row_shape = sum(spec.shape[0] for spec in specs) // experts, specs[0].shape[1:]
            shape = (rows, *row_shape) if specs[0].expert is None else (experts, rows, *row_shape)
            if entry.shape != shape:
                what = f"{self.path}: tensor {parameter}"
                raise CheckpointError(what, expected=str(list(shape)), got=str(list(entry.shape)))
            del self._entries[parameter]
            first = 0
            for name, spec in zip(names, specs, strict=True):
                self._entries[name] = entry.piece(spec.shape, first)
                first += math.prod(spec.shape)

    def _entry(self, name: str) -> Entry:
        entry = self._entries.get(name) or self._carried.get(name)
        if entry is None:
            raise CheckpointError(f"{self.path} has no tensor {name}")
        return entry

    def _is_empty_bias(self, name: str) -> bool:
        """Whether this is a bias of zeros beside a quantised matrix: older quantisers gave one to every matrix."""
        stem = name.removesuffix(".bias")
        beside = self._entries.get(f"{stem}.weight")
        return name.endswith(".bias") and isinstance(beside, PackedTensor) and not self.tensor(name).any()

    def _check_copy(self, name: str, original: str) -> None:
        """Refuse a head that differs from the tensor it is tied to: loaders disagree on which counts."""
        import torch

        copy, tied_to = self._entries[name], self._entries[original]
        same = (copy.shape, copy.dtype) == (tied_to.shape, tied_to.dtype) and all(
            torch.equal(left.view(torch.uint8), right.view(torch.uint8))
            for left, right in zip(self.blocks(name, _FILL_BYTES), self.blocks(original, _FILL_BYTES), strict=True)
        )
        if not same:
            raise CheckpointError(
                f"{self.path}: {name} differs from {original}",
                expected="equal tensors, as config.json says they are tied",
                got="different values",
                hint="set tie_word_embeddings to false in config.json if the model has a head of its own",
            )


def _decoded_blocks(entry: PackedTensor, rows: int) -> Iterator[torch.Tensor]:
    """A quantised matrix in blocks of so many rows, decoded at once where its rows cannot be decoded apart."""
    row_values = math.prod(entry.shape[1:])
    if entry.row_values > rows * row_values:
        yield from entry.tensor().split(rows)
        return
    for row in range(0, entry.shape[0], rows):
        last = min(row + rows, entry.shape[0])
        yield entry.values(row * row_values, last * row_values).reshape(last - row, *entry.shape[1:])


def _read_files(folder: Path, dtypes: Mapping[str, int]) -> tuple[dict[str, TensorEntry], list[Path]]:
    if (folder / SINGLE_FILE).is_file():  # before the index, as transformers does
        return read_header(folder / SINGLE_FILE, dtypes), [folder / SINGLE_FILE]
    if (folder / INDEX_FILE).is_file():
        return _read_sharded(folder, dtypes)
    raise no_weights(folder)


def _read_sharded(folder: Path, dtypes: Mapping[str, int]) -> tuple[dict[str, TensorEntry], list[Path]]:
    weight_map = _read_index(folder / INDEX_FILE)
    shards = {name: safe_join(folder, name) for name in dict.fromkeys(weight_map.values())}
    absent = [name for name, path in shards.items() if not path.is_file()]
    if absent:
        raise CheckpointError(
            f"{folder}: shards are missing",
            expected=f"the {len(shards)} files that {INDEX_FILE} names",
            got="no " + listed(absent),
            hint="download them again",
        )
    entries: dict[str, TensorEntry] = {}
    for shard, path in shards.items():
        for name, entry in read_header(path, dtypes).items():
            if name in entries:
                raise CheckpointError(
                    f"{folder}: tensor {name} is in two shards", got=f"{entries[name].file.name} and {shard}"
                )
            if weight_map.get(name) != shard:
                raise CheckpointError(
                    f"{folder}: {INDEX_FILE} and {shard} disagree on {name}",
                    expected=f"{name} in {weight_map[name]}" if name in weight_map else "a tensor that the index lists",
                    got=f"{name} in {shard}",
                )
            entries[name] = entry
    lost = [f"{name} ({shard})" for name, shard in weight_map.items() if name not in entries]
    if lost:
        raise CheckpointError(
            f"{folder}: tensors are not in the shard that {INDEX_FILE} names", got=listed(lost), hint="download again"
        )
    return {name: entries[name] for name in weight_map}, list(shards.values())


def _read_index(path: Path) -> dict[str, str]:
    """Read tensor → shard. Raises CheckpointError for anything but an object of .safetensors names."""
    index = read_json(path, CheckpointError, expect=dict, unique=True)
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path} is not a valid index", expected="a weight_map of tensor name to file name")
    bad = [name for name, file in weight_map.items() if not isinstance(file, str) or not file.endswith(".safetensors")]
    if bad:
        raise CheckpointError(f"{path}: weight_map", expected="names of .safetensors files", got=listed(bad))
    return weight_map
