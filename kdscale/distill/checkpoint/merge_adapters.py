"""The export of a student of which only adapters were trained: merged into its weights, and as a folder of their own.

A merged tensor is W + scale·B·A, made in fp64 and rounded once to the dtype that W has in the pruned student, so that
machines agree on its bytes.

R rank, I inputs, O outputs.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor

from kdscale import files
from kdscale.config.distill.lora import LoraConfig
from kdscale.distill.checkpoint.rank_files import MASTER, RankFileReader
from kdscale.errors import CheckpointError, TrainingError
from kdscale.families import load_family
from kdscale.families.linear_maps import AdaptedMap, adapted_maps
from kdscale.models.lora.adapter_files import NAME_PREFIX, WEIGHTS_FILE
from kdscale.models.lora.adapters import adapter_names, peft_config
from kdscale.models.parameter_map import ParameterRange, parameter_ranges
from kdscale.weights import Checkpoint, ShardWriter
from kdscale.weights.unreadable import ADAPTER_CONFIG

_BLOCK_BYTES = 1 << 26


class _Adapter(NamedTuple):
    a_RI: Tensor
    b_OR: Tensor


class AdaptersOnDisk:
    """Which tensors of the pruned student `source` the adapters of a checkpoint belong to.

    `shapes`: the trained parameters. Raises CheckpointError where these are not the adapters of `settings`.
    """

    def __init__(self, source: Checkpoint, settings: LoraConfig, shapes: Mapping[str, tuple[int, ...]]):
        family = load_family(source.config, str(source.path / "config.json"))
        self._settings, self._maps = settings, adapted_maps(family, source.config, settings.targets)
        self._ranges = {
            name: span
            for name, span in parameter_ranges(family.tensors(source.config)).items()
            if span.name.removesuffix(".weight") in self._maps
        }
        expected = {name: shape for module in self._maps for name, shape in self._shapes(module).items()}
        if dict(shapes) != expected:
            raise CheckpointError(
                f"{source.path}: adapters", expected=f"{len(expected)} matrices of rank {settings.rank}",
                got=f"{len(shapes)} others", hint="distil into another run folder",
            )  # fmt: skip

    def _shapes(self, module: str) -> dict[str, tuple[int, ...]]:
        """Of a module's A and B."""
        shape, (a, b) = self._maps[module], adapter_names(module)
        return {a: (self._settings.rank, shape.inputs), b: (shape.outputs, self._settings.rank)}

    def __contains__(self, tensor: str) -> bool:
        """Whether a tensor of the student is (a part of) an adapted weight."""
        return tensor in self._ranges

    def _read(self, reader: RankFileReader, module: str) -> _Adapter:
        found = []
        for name, shape in self._shapes(module).items():
            values = torch.empty(shape)
            reader.fill(MASTER, ParameterRange(name, 0, values.numel()), values.view(-1))
            if not bool(torch.isfinite(values).all()):
                raise TrainingError(f"the trained {name} has NaN or infinite values; the student was not written")
            found.append(values)
        return _Adapter(*found)

    def merged(self, source: Checkpoint, tensor: str, reader: RankFileReader) -> Iterator[Tensor]:
        """A tensor of the student with its adapter added, in blocks of whole rows."""
        span = self._ranges[tensor]
        module = span.name.removesuffix(".weight")
        left, right = _factors(self._read(reader, module), self._maps[module])
        row = span.offset // right.shape[1]
        for block in source.blocks(tensor, _BLOCK_BYTES):
            change = self._settings.scale * (left[row : row + len(block)] @ right)
            merged = (block.double() + change).to(block.dtype)
            if not bool(torch.isfinite(merged).all()):
                raise TrainingError(f"the merged tensor {tensor} has infinite values; the student was not written")
            yield merged
            row += len(block)

    def write(self, folder: Path, reader: RankFileReader) -> None:
        """Write the adapters as a folder that `peft.PeftModel.from_pretrained` adds to the pruned student, in fp32."""
        tensors: dict[str, Tensor] = {}
        for module in self._maps:
            for letter, values in zip("AB", self._read(reader, module), strict=True):
                tensors[f"{NAME_PREFIX}{module}.lora_{letter}.weight"] = values
        with files.atomic_dir(folder) as tmp:
            save_file(tensors, tmp / WEIGHTS_FILE, metadata={"format": "pt"})
            files.write_json(tmp / ADAPTER_CONFIG, _plain(peft_config(self._settings, self._maps)))


def write_merged(
    source: Checkpoint, adapters: AdaptersOnDisk, reader: RankFileReader, folder: Path, max_shard_bytes: int
) -> None:
    """Write the tensors of `source` into `folder`, those that have adapters with these added."""
    specs = {name: source.spec(name) for name in source.names}
    with ShardWriter(folder, specs, max_shard_bytes) as writer:
        for name in source.names:
            if name in adapters:
                writer.add_blocks(name, adapters.merged(source, name, reader))
            else:
                writer.add_blocks(name, source.blocks(name, _BLOCK_BYTES))


def _factors(adapter: _Adapter, shape: AdaptedMap) -> tuple[Tensor, Tensor]:
    """fp64 factors whose product has the shape of the weight as it is stored."""
    a_RI, b_OR = adapter.a_RI.double(), adapter.b_OR.double()
    return (a_RI.t(), b_OR.t()) if shape.transposed else (b_OR, a_RI)


def _plain(config: Any) -> dict[str, Any]:
    """peft's settings as it writes them itself."""
    values = {**config.to_dict(), "inference_mode": True}
    plain: dict[str, Any] = json.loads(json.dumps(values, default=sorted, sort_keys=True))
    return plain
