"""Linear repair of the gaps that dropped layers leave in the residual stream.

The residual path cannot carry a matrix, so what is refitted is the last thing added to the stream before the gap: the
down projection of the layer in front of it. With u what it reads at the kept inputs, y its output, x the teacher's
stream behind that layer and x' the stream behind the last dropped one,

    W' = argmin ‖u W'ᵀ − (y + x' − x)‖² + λ‖W' − W_kept‖²

over the calibration tokens of the teacher's stream. The student stays a plain model of its family. ReplaceMe
(arXiv 2505.02819, section 3) fits a D × D matrix T on y instead; T W is one of the W' that are searched here. A cut of
ffn or hidden is made up for in the same regression.

B batch · S sequence · D' kept hidden channels · K kept inputs
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kdscale.config.prune import PruneConfig
from kdscale.errors import ConfigError
from kdscale.files import atomic_path, remove_tree
from kdscale.models.hidden_states import IN_MEMORY, HiddenStates, Scratch
from kdscale.models.layer_pass import LayerPass
from kdscale.models.layer_stream import DecoderLayer, LayerStream, TokenBatch
from kdscale.prune.compensation.regression import TargetSums
from kdscale.prune.plan import Plan
from kdscale.prune.slicing import Slicer
from kdscale.runtime.progress import Reporter
from kdscale.weights import Checkpoint

ROLE = "down"


# A layer's output counts as its input plus what its two sublayers put out within this share of the change and, for the
# rounding of bf16, of the output.
_PLAIN, _ROUNDING = 2e-2, 1e-2


_SLOTS = 3  # a batch: the stream; u at the last gap's front; y − x there


class Gap(NamedTuple):
    """Dropped layers between two kept ones, or behind the last."""

    position: int  # the student's layer in front
    layer: int  # the same in the teacher
    last: int  # the last dropped layer behind it


def find_gaps(plan: Plan) -> list[Gap]:
    """Those that `plan` repairs, in order. Layers dropped before the first kept one have nothing in front of them."""
    if plan.methods.layer_repair == "none":
        return []
    behind = [*plan.kept.layers[1:], plan.teacher.layers]
    pairs = enumerate(zip(plan.kept.layers, behind, strict=True))
    return [Gap(position, layer, after - 1) for position, (layer, after) in pairs if after > layer + 1]


def check_repairable(sites: Any, name: str) -> None:
    """Raises ConfigError for a mixture of experts: no single projection is the last thing added to its stream."""
    if not sites.ffn:
        raise ConfigError("prune.layer_repair: linear", expected="a dense model", got=f"the experts of {name}")


class RepairedWeights:
    """The refitted down projections, as they are on disk, by the student's layer; in files where there is a folder."""

    def __init__(self, folder: Path | None):
        self._folder = folder
        self._held: dict[int, Tensor] = {}

    def put(self, position: int, weight: Tensor) -> None:
        from safetensors.torch import save_file

        if self._folder is None:
            self._held[position] = weight
            return
        with atomic_path(self._file(position)) as tmp:
            save_file({ROLE: weight.contiguous()}, tmp)

    def has(self, position: int) -> bool:
        return position in self._held if self._folder is None else self._file(position).exists()

    def get(self, position: int) -> Tensor | None:
        """fp32 on the CPU; None where there is no gap."""
        from safetensors.torch import load_file

        if not self.has(position):
            return None
        return self._held[position] if self._folder is None else load_file(self._file(position))[ROLE]

    def close(self) -> None:
        if self._folder is not None and self._folder.exists():
            remove_tree(self._folder)

    def _file(self, position: int) -> Path:
        assert self._folder is not None
        return self._folder / f"gap-{position}.safetensors"


def repaired_gaps(
    stream: LayerStream,
    slicer: Slicer,
    batches: Sequence[TokenBatch],
    cfg: PruneConfig,
    teacher: Checkpoint,
    reporter: Reporter,
    scratch: Scratch = IN_MEMORY,
) -> RepairedWeights:
    """One pass over the teacher, up to the last gap; every rank gets the weights of all their batches.

    In memory: a layer, one regression ([K, K] and [D', K]) and hidden states within the budget of `scratch`, of which a
    token has D + K + 2 D' numbers (in bf16). With a folder a killed call goes on at the first unfinished layer.
    Raises ConfigError for a layer that does more than add its sublayers' outputs (post-norms, residual multipliers).
    """
    found, repaired = find_gaps(slicer.plan), RepairedWeights(scratch.folder)
    if not found:
        return repaired
    check_repairable(slicer.family.sites, slicer.family.name)
    fronts, ends = {gap.layer: gap for gap in found}, {gap.last: gap for gap in found}
    kept_D = torch.tensor(slicer.plan.kept.hidden, device=stream.device)
    tokens, depth = sum(batch.input_ids_BS.numel() for batch in batches), found[-1].last + 1
    with reporter.bar("gap repair", total=tokens) as bar:
        walk = LayerPass(_Slots(stream, slicer), batches, scratch)
        for layer in walk.layers(depth):
            front, end = fronts.get(layer.index), ends.get(layer.index)
            probe = _Front(layer, slicer, front.position) if front else None
            sums = TargetSums(_prior(slicer, teacher, end.position).to(stream.device)) if end else None
            for index, batch in enumerate(batches):
                slot = _SLOTS * index
                with torch.inference_mode():
                    before_BSD = walk.states[slot]
                    after_BSD = layer(before_BSD, batch.position_ids_BS.to(stream.device))
                    walk.states[slot] = after_BSD
                    if probe is not None:
                        walk.states[slot + 1], added_BSD = probe.read(before_BSD, after_BSD)
                        walk.states[slot + 2] = (added_BSD - after_BSD.float())[..., kept_D]
                    if sums is not None:
                        sums.add(walk.states[slot + 1], walk.states[slot + 2] + after_BSD.float()[..., kept_D])
                bar.advance(batch.input_ids_BS.numel() / depth, f"layer {layer.index + 1}/{depth}")
            if sums is not None and end is not None:
                sums.reduce()
                with torch.inference_mode():
                    weight_DK = sums.solve(cfg.ridge_lambda, f"the gap behind layer {end.layer}").cpu()
                repaired.put(end.position, weight_DK.T if slicer.family.transposed(ROLE) else weight_DK)
            walk.finish()
    return repaired


class _Slots:
    """A LayerStream with room for what a gap's regression needs beside each batch's state."""

    def __init__(self, stream: LayerStream, slicer: Slicer):
        self.dims, self.device, self._stream = stream.dims, stream.device, stream
        self._inputs, self._outputs = slicer.plan.student.ffn, slicer.plan.student.hidden

    def embed(self, batches: Sequence[TokenBatch], scratch: Scratch) -> HiddenStates:
        entered, states = self._stream.embedding(), HiddenStates(scratch, self.device)
        with torch.inference_mode():
            for batch in batches:
                state_BSD = entered(batch.input_ids_BS.to(self.device), batch.position_ids_BS.to(self.device))
                states.append(state_BSD)
                states.append(state_BSD.new_zeros(*state_BSD.shape[:2], self._inputs))
                states.append(state_BSD.new_zeros(*state_BSD.shape[:2], self._outputs, dtype=torch.float32))
        return states

    def layer(self, index: int) -> DecoderLayer:
        return self._stream.layer(index)


def is_plain(before: Tensor, added: Tensor, after: Tensor) -> bool:
    """Whether a layer put out its input plus `added`, what its two sublayers did, and nothing else."""
    change, output = (after.float() - before.float()).norm(), after.float().norm()
    return bool((before.float() + added - after.float()).norm() <= _PLAIN * change + _ROUNDING * output)


class _Front:
    """What the down projection in front of a gap reads and writes."""

    def __init__(self, layer: DecoderLayer, slicer: Slicer, position: int):
        sites, kept = slicer.family.sites, slicer.kept("ffn", position)
        self._layer = layer.index
        self._kept_K = slice(None) if kept is None else torch.tensor(kept)
        self._bias_D = getattr(layer.site(sites.ffn), "bias", None)
        self._seen: dict[str, tuple[Tensor, Tensor]] = {}
        for role, path in ((ROLE, sites.ffn), ("o", sites.heads)):
            layer.site(path).register_forward_hook(self._keeper(role))

    def read(self, before_BSD: Tensor, after_BSD: Tensor) -> tuple[Tensor, Tensor]:
        """(u [B, S, K], y less its bias [B, S, D] in fp32) of the batch that the layer was just run on."""
        read_BSK, wrote_BSD = self._seen[ROLE]
        added = self._seen["o"][1].float() + wrote_BSD.float()
        if not is_plain(before_BSD, added, after_BSD):
            raise ConfigError(
                "prune.layer_repair: linear",
                expected="layers that add the outputs of attention and MLP to their input",
                got=f"a layer {self._layer} that does more (a norm or a factor behind them)",
                hint="set prune.layer_repair=none",
            )
        offset = 0.0 if self._bias_D is None else self._bias_D.float()
        return read_BSK[..., self._kept_K], wrote_BSD.float() - offset

    def _keeper(self, role: str) -> Any:
        def keep(_module: Any, args: tuple[Tensor, ...], output: Tensor) -> None:
            self._seen[role] = (args[0], output)

        return keep


def _prior(slicer: Slicer, teacher: Checkpoint, position: int) -> Tensor:
    """The sliced down projection [D', K]."""
    source, spec = next((source, spec) for source, _, spec in slicer.layer(position) if spec.role == ROLE)
    weight = slicer.slice(teacher.tensor(source), spec, position)
    return weight.T if slicer.family.transposed(ROLE) else weight
