"""One opened GGUF file: its metadata as plain Python, its tensors as numpy arrays in fp32.

Written against the GGUF specification (ggml/docs/gguf.md); the official package `gguf` opens the file and dequantises.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from kdscale.errors import CheckpointError
from kdscale.runtime.packages import require_packages
from kdscale.weights.unreadable import listed

_DIGITS = ".7g"  # of a number that is stored as float32: 9.99999975e-06 was written as 1e-05


def gguf_reader_class() -> Any:
    """The package gguf's GGUFReader. Raises ConfigError where the package is not installed."""
    require_packages("this teacher comes as a GGUF file", ("gguf",), "gguf")
    from gguf import GGUFReader

    return GGUFReader


class GgufFile:
    """Raises ConfigError without the `gguf` package, CheckpointError for what is no whole GGUF model."""

    def __init__(self, path: Path):
        self.path = path
        reader_class = gguf_reader_class()
        try:
            self._reader = reader_class(path)
        except (ValueError, IndexError, KeyError, OSError, OverflowError, UnicodeDecodeError, MemoryError) as error:
            raise CheckpointError(
                f"{path} is not a readable GGUF file", got=" ".join(str(error).split())[:300]
            ) from error
        self._tensors = {tensor.name: tensor for tensor in self._reader.tensors}
        self.architecture = str(self.field("general.architecture"))
        if self.get("split.count", 1) not in (0, 1):
            raise CheckpointError(
                f"{path} is one part of a model in {self.get('split.count')} files", expected="a whole model",
                hint="merge them first: llama-gguf-split --merge FIRST_PART OUT.gguf",
            )  # fmt: skip

    @property
    def names(self) -> set[str]:
        """All tensors."""
        return set(self._tensors)

    @cached_property
    def keys(self) -> set[str]:
        """All keys of the architecture, without its name."""
        prefix = f"{self.architecture}."
        return {key.removeprefix(prefix) for key in self._reader.fields if key.startswith(prefix)}

    @property
    def kinds(self) -> dict[str, int]:
        """How many tensors there are of each type."""
        kinds = [tensor.tensor_type.name for tensor in self._tensors.values()]
        return {kind: kinds.count(kind) for kind in sorted(set(kinds))}

    def kind(self, name: str) -> str:
        """The type of one tensor, by its name in GGUF."""
        return str(self._tensor(name).tensor_type.name)

    def get(self, key: str, absent: Any = None) -> Any:
        """A metadata value as plain Python, or `absent`."""
        field = self._reader.get_field(key)
        return absent if field is None else field.contents()

    def field(self, key: str) -> Any:
        """A metadata value as plain Python. Raises CheckpointError when the file does not carry it."""
        if (value := self.get(key)) is None:
            raise CheckpointError(f"{self.path} lacks the field {key}")
        return value

    def token_id(self, name: str) -> int | None:
        """The id of a token that the file names (bos, eos, eot, eom, unknown, padding); None where it names none."""
        number = self.get(f"tokenizer.ggml.{name}_token_id")
        return number if type(number) is int and number >= 0 else None

    def number(self, key: str, absent: float | None = None) -> float | None:
        """A number of the architecture, rounded to the digits that float32 has; `absent` where there is none."""
        value = self.get(f"{self.architecture}.{key}", absent)
        if value is None or isinstance(value, bool):
            return absent if value is None else float(value)
        if not isinstance(value, int | float):
            raise self._refused(key, "one number for all layers", value)
        return float(f"{value:{_DIGITS}}")

    def size(self, key: str, absent: int | None = None) -> int:
        """A size of the architecture, the same in all layers. Raises CheckpointError for others."""
        value = self.get(f"{self.architecture}.{key}", absent)
        if isinstance(value, list) and value and len(set(value)) == 1:
            value = value[0]
        if type(value) is not int:
            raise self._refused(key, "one size for all layers", value)
        return value

    def _refused(self, key: str, expected: str, got: Any) -> CheckpointError:
        shown = "no such field" if got is None else repr(got)[:200]
        return CheckpointError(f"{self.path}: {self.architecture}.{key}", expected=expected, got=shown)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor, its first dimension first. Raises CheckpointError where there is none."""
        return tuple(int(size) for size in reversed(self._tensor(name).shape))

    def tensor(self, name: str) -> np.ndarray:
        """A tensor in fp32. Raises CheckpointError for a type that the package gguf cannot dequantise."""
        from gguf.quants import dequantize

        tensor = self._tensor(name)
        try:
            values = dequantize(tensor.data, tensor.tensor_type)
        except NotImplementedError as error:
            raise CheckpointError(
                f"{self.path}: tensor {name}", expected="a type that the package gguf dequantises",
                got=tensor.tensor_type.name, hint="take the file in another type, such as Q8_0, Q4_K_M or BF16",
            ) from error  # fmt: skip
        return np.asarray(values, dtype=np.float32).reshape(self.shape(name))

    def _tensor(self, name: str) -> Any:
        if name not in self._tensors:
            raise CheckpointError(f"{self.path} has no tensor {name}")
        return self._tensors[name]

    def check_names(self, expected: Mapping[str, object], ignored: set[str]) -> None:
        """Raises CheckpointError unless these are the tensors that the file holds."""
        missing, extra = sorted(set(expected) - self.names), sorted(self.names - set(expected) - ignored)
        if missing or extra:
            got = [f"no {listed(missing)}"] if missing else []
            got += [f"besides them {listed(extra)}"] if extra else []
            raise CheckpointError(
                f"{self.path}: its tensors are not those of the family", expected=f"{len(expected)} tensors",
                got="; ".join(got), hint="adapters, projectors and models with more than a language model are not read",
            )  # fmt: skip
