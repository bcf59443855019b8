"""A student whose residual stream is z = P x, x being the teacher's: the start of `hidden_method: refit`.

P [H, D] has orthonormal rows: the directions that stay (runs/stream_basis.py). Writers get P W; readers get
W g Pᵀ √(D/H), with the gain g of the norm before them folded in, and their norms get the gain 1. That would be exact
were P square and no norm behind a sublayer. What is left (the norm of z is not that of x, and a gain behind a sublayer
cannot follow a rotation) is for the regressions of compensation/stream_refit.py.

A tied head stays tied. The head must give E g x̂ = E g B P x̂, where x̂ is the normalised stream at the end and B the
regression of x̂ on P x̂ over the calibration tokens; so the embedding becomes E g B/c, with c such that it is as near as
can be to E Pᵀ, and c is the final norm's gain. The first layers then read embeddings that are not quite P e. They are
refitted to that; at the end of the stream the embedding is a small part (a thousandth in Gemma 3).

D teacher's hidden · H student's hidden · V vocabulary
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kdscale.errors import ConfigError
from kdscale.families import Family, TensorSpec
from kdscale.prune.slicing import NORM_BEFORE, SlicedTensor, Slicer, is_hidden_norm
from kdscale.runs.importance_scores import DIRECTIONS, FINAL_COVARIANCE
from kdscale.runs.stream_basis import kept_directions

METHOD = "refit"  # of prune.hidden_method

# The norms between a sublayer and the stream, where a family has them.
POST_NORM = {"attention": "attn_post_norm", "ffn": "ffn_post_norm"}
WRITER = {"attention": "o", "ffn": "down"}

_KNOWN_NORMS = {*NORM_BEFORE.values(), *POST_NORM.values(), "final_norm"}
_BLOCK_ROWS = 8192  # of an embedding that are in fp64 at a time
_RIDGE = 1e-4  # of the regression of the final stream on the directions that stay


def refit_obstacle(family: Family, config: Mapping[str, Any]) -> str | None:
    """Why the hidden axis of this model cannot be cut by refitting all that reads and writes it, or None."""
    if "experts" in family.data.dims:
        return f"the experts of {family.name} are not refitted to another stream"
    if family.data.layer_kinds:
        return f"the layers of {family.name} are of several kinds"
    if family.data.norm.kind != "rms":
        return f"the norms of {family.name} are not RMSNorms"
    if family.language(config).get("residual_multiplier", 1) not in (None, 1):
        return "residual_multiplier scales what the sublayers add to the stream"
    roles: dict[str, TensorSpec] = {}
    for name, spec in (family.outer_tensors(dict(config)) | family.layer_tensors(dict(config), 0)).items():
        over_hidden = spec.axes == ("hidden",)
        if over_hidden and spec.role.endswith("norm") and spec.role not in _KNOWN_NORMS:
            return f"{name} is a norm with a place of its own"
        if over_hidden and spec.role.endswith("norm_bias"):
            return f"{name} belongs to a LayerNorm"
        if spec.role == "position_embed":
            return f"{name} adds learned positions to the stream"
        if spec.component == "mixer":
            return f"the recurrent mixers of {family.name} are not refitted to another stream"
        roles[spec.role] = spec
    for component, role in NORM_BEFORE.items():
        if role not in roles:
            return f"no norm stands before the {component} of {family.name}"
        if POST_NORM[component] in roles and f"{WRITER[component]}_bias" in roles:
            return f"a norm follows a projection with a bias ({WRITER[component]}_bias)"
    return None


@dataclass(frozen=True)
class StreamBasis:
    """P [H, D], and B [D, H] of the final norm's input (see the top); both fp64."""

    rows_HD: Tensor
    final_DH: Tensor

    @classmethod
    def of(cls, scores: Mapping[str, Any], hidden: int) -> StreamBasis:
        """For a student of this hidden size. Raises ConfigError when the importance scores have no directions."""
        for name in (DIRECTIONS, FINAL_COVARIANCE):
            if name not in scores:
                raise ConfigError(
                    f"the importance scores lack {name!r}",
                    expected="scores for a plan that cuts the hidden axis",
                    got=", ".join(sorted(scores)) or "none",
                    hint="run the importance stage again with this config",
                )
        rows_HD = torch.from_numpy(kept_directions(np.asarray(scores[DIRECTIONS]), hidden))
        covariance_DD = torch.from_numpy(np.asarray(scores[FINAL_COVARIANCE], dtype=np.float64))
        if covariance_DD.shape != (rows_HD.shape[1],) * 2:
            raise ConfigError(FINAL_COVARIANCE, expected="a square matrix of the teacher's hidden size")
        return cls(rows_HD, regressed_on(rows_HD, covariance_DD))


def regressed_on(rows_HD: Tensor, covariance_DD: Tensor) -> Tensor:
    """B [D, H] = C Pᵀ (P C Pᵀ + λI)⁻¹: x from P x, where x has the second moments C."""
    seen_HD = rows_HD @ covariance_DD
    gram_HH = seen_HD @ rows_HD.T
    gram_HH.diagonal().add_(_RIDGE * gram_HH.diagonal().mean())
    return torch.linalg.solve(gram_HH, seen_HD).T


class CutStudent:
    """The student's tensors before any regression, by their names on disk; a TensorSource. fp32 unless untouched.

    `read` gives a tensor of the teacher by its name on disk (`Checkpoint.tensor`).
    """

    def __init__(self, slicer: Slicer, read: Callable[[str], Tensor], basis: StreamBasis):
        self.slicer, self.basis, self.read = slicer, basis, read
        self.origins = {tensor.target: tensor for tensor in slicer.tensors()}
        self._config, family = slicer.teacher_config, slicer.family
        self._added = family.data.norm.added
        self._names = {
            (spec.role, spec.layer): name for name, spec in family.tensors(self._config).items() if is_hidden_norm(spec)
        }
        tied = bool(family.tied(self._config))
        rows_HD, head_DH = basis.rows_HD, self.gain("final_norm", None)[:, None] * basis.final_DH
        self._head_DH = head_DH
        scale = float((rows_HD.T * head_DH).sum() / head_DH.square().sum()) if tied else 1.0
        embed_DH = head_DH * scale if tied else rows_HD.T
        self.embed_DH = embed_DH * slicer.embed_factor
        self._grown = math.sqrt(rows_HD.shape[1] / rows_HD.shape[0])
        self.final_gain = self._grown / (scale * (slicer.embed_factor if tied else 1.0))

    @property
    def head_map(self) -> Tensor:
        """[D, H]: what the teacher's embedding (or head) is multiplied by in the student's head."""
        return self.embed_DH if self.slicer.family.tied(self._config) else self._head_DH

    def tensor(self, name: str) -> Tensor:
        """One tensor of the student."""
        origin = self.origins[name]
        if origin.spec.role in ("embed", "head"):
            return torch.cat(list(self.blocks(origin, self.read(origin.source).split(_BLOCK_ROWS))))
        return self.cut(self.read(origin.source), origin)

    def blocks(self, origin: SlicedTensor, blocks: Iterator[Tensor] | tuple[Tensor, ...]) -> Iterator[Tensor]:
        """The embedding or the head, from blocks of the teacher's rows."""
        columns_DH = self.embed_DH if origin.spec.role == "embed" else self._head_DH
        for block in blocks:
            yield (block.double() @ columns_DH.to(block.device)).float()

    def cut(self, tensor: Tensor, origin: SlicedTensor) -> Tensor:
        """The student's start for a tensor inside the layers, or the final norm's gain."""
        _, _, spec, position = origin
        if "hidden" not in spec.axes:
            return self.slicer.slice(tensor, spec, position)
        if is_hidden_norm(spec):
            return self.as_weight(self._student_gain(spec.role, spec.layer))
        for dimension, axis in enumerate(spec.axes):
            if axis != "hidden" and (kept := self.slicer.kept(axis, position, spec.expert)) is not None:
                tensor = tensor.index_select(dimension, torch.tensor(kept))
        if spec.axes[-1] == "hidden" and len(spec.axes) == 2:  # a reader
            return (tensor.double() @ self.reader_map(NORM_BEFORE[spec.component], spec.layer)).float()
        return self.written(tensor, spec)

    def reader_map(self, norm: str, layer: int | None) -> Tensor:
        """fp64 [D, H]: what all that reads this norm is multiplied by at the start."""
        return self._grown * self.gain(norm, layer)[:, None] * self.basis.rows_HD.T

    def written(self, weight: Tensor, spec: TensorSpec) -> Tensor:
        """What writes to the stream (or its bias), cut to the student's stream and not along its inputs; fp32."""
        role, rows_HD = POST_NORM[spec.component], self.basis.rows_HD
        if (role, spec.layer) not in self._names:
            return (rows_HD @ weight.double()).float()
        gain_D1, student_H1 = self.gain(role, spec.layer)[:, None], self._student_gain(role, spec.layer)[:, None]
        return (rows_HD @ (gain_D1 * weight.double()) / student_H1).float()

    def gain(self, role: str, layer: int | None) -> Tensor:
        """What the teacher's norm multiplies by, fp64 [D]."""
        return self.read(self._names[role, layer]).double() + self._added

    def as_weight(self, gain_H: Tensor) -> Tensor:
        """A gain as it is on disk, fp32."""
        return (gain_H - self._added).float()

    def as_gain(self, weight_H: Tensor) -> Tensor:
        """A norm's weight on disk as what it multiplies by."""
        return weight_H + self._added

    def _student_gain(self, role: str, layer: int | None) -> Tensor:
        """fp64 [H]. Behind a sublayer: the typical size of P g y for a normalised y with independent channels."""
        rows_HD = self.basis.rows_HD
        if role == "final_norm":
            return rows_HD.new_full((len(rows_HD),), self.final_gain)
        if role in POST_NORM.values():
            return (rows_HD.square() @ self.gain(role, layer).square()).sqrt()
        return rows_HD.new_ones(len(rows_HD))
