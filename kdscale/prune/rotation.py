"""The teacher in the basis of its residual stream's principal components: the same function, channels sorted by use.

RMSNorm without its gain commutes with rotations: ‖Rx‖ = ‖x‖. So fold each norm's gain into the matrices that read it,
rotate every reader and writer of the residual stream by an orthogonal R, and the model computes what it did before
(SliceGPT, arXiv 2401.15024, section 3). With R the eigenvectors of the stream's covariance the leading channels carry
most of it, and cutting the hidden axis means keeping the first d' channels: the student is still a plain model of its
family. SliceGPT rotates each block by a matrix of its own and pays with one more matrix on every skip connection; one R
for all blocks needs none.

The head reads what the final norm's gain scales and the embedding does not, so a tied head gets a weight of its own.

D hidden · V vocabulary · R orthogonal [D, D], its rows the new channels
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kdscale.errors import ConfigError
from kdscale.families import Family, TensorSpec
from kdscale.prune.carried import along
from kdscale.runs.importance_scores import ROTATION
from kdscale.weights import Checkpoint
from kdscale.weights.quantised import Entry

# Which norm a reader of the residual stream comes after, by component.
_NORM_BEFORE = {"attention": "attn_norm", "mixer": "attn_norm", "ffn": "ffn_norm", "head": "final_norm"}
_NORMS = ("attn_norm", "ffn_norm", "final_norm")

_BLOCK_ROWS = 8192  # of a tensor that are in fp64 at a time


def rotation_obstacle(family: Family, config: Mapping[str, Any]) -> str | None:
    """Why this model cannot be rotated, or None.

    The residual stream may only meet plain RMSNorms, each right before a sublayer or the head.
    """
    for name, spec in family.tensors(dict(config)).items():
        over_hidden = spec.axes == ("hidden",)
        if over_hidden and spec.role.endswith("norm") and spec.role not in _NORMS:
            return f"{name} is a norm that is not right before the matrices that read it"
        if over_hidden and spec.role.endswith("norm_bias"):
            return f"{name} belongs to a LayerNorm, which does not commute with rotations"
        if spec.role.startswith("conv"):
            return f"{name} belongs to a convolution over the stream's own channels"
        if spec.role == "position_embed":
            return f"{name} adds learned positions to the stream"
        if spec.stacked:
            return f"{name} holds all experts of a layer, which are not rotated"
    if family.data.norm.kind != "rms" or family.data.norm.gain != "weight":
        return f"the norms of {family.name} are not a plain RMSNorm times a weight"
    return None


class RotatedTeacher(Checkpoint):
    """A checkpoint whose tensors are read rotated; config and names are those of the rotated (untied) model."""

    def __init__(self, teacher: Checkpoint, family: Family, rotation_DD: Tensor):
        """Wrap `teacher`; raises ConfigError when it cannot be rotated, or for a matrix that is no rotation of it."""
        if reason := rotation_obstacle(family, teacher.config):
            raise ConfigError("prune.hidden_method: pca", expected="a model that can be rotated", got=reason)
        hidden = family.dims(teacher.config).hidden
        if rotation_DD.shape != (hidden, hidden) or not _orthogonal(rotation_DD):
            raise ConfigError("hidden.rotation in the importance scores", expected=f"orthogonal [{hidden}, {hidden}]")
        super().__init__(
            teacher.path, untied_config(teacher.config, family), teacher._entries, teacher.files, teacher.quantised
        )
        self._teacher, self._rotation_DD, self._carried = teacher, rotation_DD, teacher._carried
        self._carried_axes = family.carried_axes
        self._specs = family.tensors(self.config)
        self._tied = family.tied(teacher.config)

    @property
    def names(self) -> list[str]:
        """All tensors of the rotated model, in the family's order."""
        return list(self._specs)

    def _entry(self, name: str) -> Entry:
        return super()._entry(self._tied.get(name, name))  # a head of its own has its embedding's shape and dtype

    def blocks(self, name: str, max_bytes: int) -> Iterator[Tensor]:
        """Read one tensor in blocks as Checkpoint.blocks does, or at once where rotation mixes its rows."""
        spec = self._specs.get(name)
        if spec is None:
            yield from super().blocks(name, max_bytes)
            return
        if "hidden" not in spec.axes or spec.axes[0] == "hidden":
            yield self.tensor(name)
            return
        reads_DD = self._reads(name, spec)
        for block in self._teacher.blocks(self._tied.get(name, name), max_bytes):
            yield (block.double() @ reads_DD).to(block.dtype)

    def tensor(self, name: str) -> Tensor:
        """Read one tensor rotated, in the dtype on disk, computed in fp64."""
        if name not in self._specs:
            return self._rotated_carried(name)
        spec = self._specs[name]
        plain = self._teacher.tensor(self._tied.get(name, name))
        if "hidden" not in spec.axes:
            return plain
        if spec.role in _NORMS:
            return torch.ones_like(plain)
        if spec.axes[0] == "hidden":  # writers and their biases
            return (self._rotation_DD.double() @ plain.double()).to(plain.dtype)
        reads_DD = self._reads(name, spec)
        return torch.cat([(block.double() @ reads_DD).to(plain.dtype) for block in plain.split(_BLOCK_ROWS)])

    def _rotated_carried(self, name: str) -> Tensor:
        """A tensor from outside the language model: what it writes into the stream is rotated."""
        tensor = self._teacher.tensor(name)
        for dimension, axis in enumerate(self._carried_axes(name)):
            if axis is not None:
                tensor = along(self._rotation_DD, tensor, dimension)
        return tensor

    def _reads(self, name: str, spec: TensorSpec) -> Tensor:
        """What a matrix whose columns are the stream's channels is multiplied by, fp64."""
        rotation_DD = self._rotation_DD.double().T
        return rotation_DD if spec.role == "embed" else self._gain(name, spec)[:, None] * rotation_DD

    def _gain(self, name: str, spec: TensorSpec) -> Tensor:
        """The gain of the norm whose output this matrix reads."""
        role = _NORM_BEFORE[spec.component]
        norms = [
            norm for norm, norm_spec in self._specs.items() if (norm_spec.role, norm_spec.layer) == (role, spec.layer)
        ]
        assert len(norms) == 1, f"{name} reads one norm, not {norms}"
        return self._teacher.tensor(norms[0]).double()


def rotated_teacher(teacher: Checkpoint, family: Family, scores: Mapping[str, Any]) -> RotatedTeacher:
    """The teacher in the basis that the importance stage measured. Raises ConfigError when `scores` have none."""
    if ROTATION not in scores:
        raise ConfigError(
            f"the importance scores lack {ROTATION!r}",
            expected="scores for a plan that cuts the hidden axis",
            got=", ".join(sorted(scores)) or "none",
            hint="run the importance stage again with this config",
        )
    return RotatedTeacher(teacher, family, torch.from_numpy(np.asarray(scores[ROTATION], dtype=np.float32).copy()))


def untied_config(config: Mapping[str, Any], family: Family) -> dict[str, Any]:
    """The same config with a head that is not tied to the embedding."""
    out = copy.deepcopy(dict(config))
    for flag in {tie.when for tie in family.data.ties}:
        out[family.data.flags[flag].field] = False
    return out


def _orthogonal(matrix_DD: Tensor) -> bool:
    eye = torch.eye(len(matrix_DD), dtype=torch.float64)
    return bool((matrix_DD.double() @ matrix_DD.double().T - eye).abs().max() < 1e-4)
