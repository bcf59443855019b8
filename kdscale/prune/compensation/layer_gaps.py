"""Linear repair of the gaps that dropped layers leave in the residual stream.

The residual path cannot carry a matrix, so what is refitted is the last thing added to the stream before the gap: the
down projection of the layer in front of it. With u what it reads at the kept inputs, y its output, x the teacher's
stream behind that layer and x' the stream behind the last dropped one,

    W' = argmin ‖u W'ᵀ − (y + x' − x)‖² + λ‖W' − W_kept‖²

over the calibration tokens of the teacher's stream. The student stays a plain model of its family. ReplaceMe
(arXiv 2505.02819, section 3) fits a D × D matrix T on y instead; T W is one of the W' that are searched here. A cut of
ffn or hidden is made up for in the same regression.

B batch · S sequence · D hidden · D' kept hidden channels · K kept inputs
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kdscale.config.prune import PruneConfig
from kdscale.errors import ConfigError
from kdscale.families import Sites
from kdscale.files import atomic_path, remove_tree
from kdscale.models.hidden_states import IN_MEMORY, HiddenStates, Scratch
from kdscale.models.layer_pass import LayerPass, layer_progress
from kdscale.models.layer_stream import DecoderLayer, LayerStream, TokenBatch
from kdscale.prune.compensation.regression import TargetSums
from kdscale.prune.plan import Plan
from kdscale.prune.slicing import Slicer
from kdscale.runtime.progress import Reporter
from kdscale.weights import Checkpoint

REPAIRED_ROLE = "down"

# A layer's output counts as its input plus what its two sublayers put out within this share of the change and, for the
# rounding of bf16, of the output.
_OF_CHANGE, _OF_OUTPUT = 2e-2, 1e-2

_TENSORS = 3  # that are kept per batch: the stream; u of the layer in front of the last gap; y − x there


class Gap(NamedTuple):
    """Dropped layers between two kept ones, or behind the last kept one."""

    position: int  # the student's layer in front
    layer: int  # the same layer's number in the teacher
    last: int  # the last dropped layer behind it


def find_gaps(plan: Plan) -> list[Gap]:
    """The gaps that `plan` repairs, in order; none for layers dropped before the first kept one."""
    if plan.methods.layer_repair == "none":
        return []
    behind = [*plan.kept.layers[1:], plan.teacher.layers]
    pairs = enumerate(zip(plan.kept.layers, behind, strict=True))
    return [Gap(position, layer, after - 1) for position, (layer, after) in pairs if after > layer + 1]


def check_repairable(sites: Sites, name: str) -> None:
    """Raises ConfigError for a mixture of experts: no single projection is the last thing added to its stream."""
    if not sites.ffn:
        raise ConfigError("prune.layer_repair: linear", expected="a dense model", got=f"the experts of {name}")


class RepairedWeights:
    """The refitted down projections, as they are on disk, by the student's layer; in files where there is a folder."""

    def __init__(self, folder: Path | None):
        self._folder = folder
        self._held: dict[int, Tensor] = {}

    def put(self, position: int, weight: Tensor) -> None:
        """Keep the weight of one layer."""
        from safetensors.torch import save_file

        if self._folder is None:
            self._held[position] = weight
            return
        with atomic_path(self._file(position)) as tmp:
            save_file({REPAIRED_ROLE: weight.contiguous()}, tmp)

    def has(self, position: int) -> bool:
        """Whether the student's layer `position` got a new weight."""
        return position in self._held if self._folder is None else self._file(position).exists()

    def get(self, position: int | None) -> dict[str, Tensor]:
        """Role → new weight of a layer, fp32 on the CPU; empty without a gap behind it, and for None (no layer)."""
        from safetensors.torch import load_file

        if position is None or not self.has(position):
            return {}
        return {REPAIRED_ROLE: self._held[position]} if self._folder is None else load_file(self._file(position))

    def close(self) -> None:
        """Remove the files."""
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
    """Refit what is in front of each gap, in one pass over the teacher; every rank gets the weights.

    In memory: a layer, one regression ([K, K] and [D', K]) and hidden states within the budget of `scratch`, of which a
    token has D + K + 2 D' numbers (in bf16). With a folder a killed call resumes at the last layer that it saved.
    Raises ConfigError for a layer that does more than add its sublayers' outputs (post-norms, residual multipliers).
    """
    gaps, repaired = find_gaps(slicer.plan), RepairedWeights(scratch.folder)
    if not gaps:
        return repaired
    check_repairable(slicer.family.sites, slicer.family.name)
    front_of, end_of = {gap.layer: gap for gap in gaps}, {gap.last: gap for gap in gaps}
    kept_D = torch.tensor(slicer.plan.kept.hidden, device=stream.device)
    tokens, depth = sum(batch.input_ids_BS.numel() for batch in batches), gaps[-1].last + 1
    with reporter.bar("gap repair", total=tokens) as bar:
        advance = layer_progress(bar, depth)
        walk = LayerPass(_WithGapInputs(stream, slicer), batches, scratch)
        for layer in walk.layers(depth):
            front, end = front_of.get(layer.index), end_of.get(layer.index)
            probe = _FrontProbe(layer, slicer, front.position) if front else None
            sums = TargetSums(_sliced_down(slicer, teacher, end.position).to(stream.device)) if end else None
            for index, batch in enumerate(batches):
                first = _TENSORS * index
                with torch.inference_mode():
                    before_BSD = walk.states[first]
                    after_BSD = layer(before_BSD, batch.position_ids_BS)
                    walk.states[first] = after_BSD
                    if probe is not None:
                        walk.states[first + 1], added_BSD = probe.read(before_BSD, after_BSD)
                        walk.states[first + 2] = (added_BSD - after_BSD.float())[..., kept_D]
                    if sums is not None:
                        sums.add(walk.states[first + 1], walk.states[first + 2] + after_BSD.float()[..., kept_D])
                advance(batch.input_ids_BS.numel(), layer.index)
            if sums is not None and end is not None:
                sums.reduce()
                with torch.inference_mode():
                    weight_DK = sums.solve(cfg.ridge_lambda, f"the gap behind layer {end.layer}").cpu()
                repaired.put(end.position, slicer.family.output_by_input(REPAIRED_ROLE, weight_DK))
            walk.finish()
    return repaired


class _WithGapInputs:
    """A LayerSource with room for what a gap's regression needs beside each batch's hidden state."""

    def __init__(self, stream: LayerStream, slicer: Slicer):
        self.depth, self.device, self._stream = stream.depth, stream.device, stream
        self._inputs, self._outputs = slicer.plan.student.ffn, slicer.plan.student.hidden

    def embed(self, batches: Sequence[TokenBatch], scratch: Scratch) -> HiddenStates:
        states = HiddenStates(scratch, self.device)
        for state_BSD in self._stream.embedded(batches):
            states.append(state_BSD)
            states.append(state_BSD.new_zeros(*state_BSD.shape[:2], self._inputs))
            states.append(state_BSD.new_zeros(*state_BSD.shape[:2], self._outputs, dtype=torch.float32))
        return states

    def layer(self, index: int) -> DecoderLayer:
        return self._stream.layer(index)


def only_adds_sublayers(before: Tensor, added: Tensor, after: Tensor) -> bool:
    """Whether a layer put out its input plus `added`, what its two sublayers put out, and nothing else."""
    change, output = (after.float() - before.float()).norm(), after.float().norm()
    return bool((before.float() + added - after.float()).norm() <= _OF_CHANGE * change + _OF_OUTPUT * output)


class _FrontProbe:
    """What the down projection in front of a gap reads and writes."""

    def __init__(self, layer: DecoderLayer, slicer: Slicer, position: int):
        sites, kept = slicer.family.sites, slicer.kept("ffn", position)
        self._layer = layer.index
        self._kept_K = slice(None) if kept is None else torch.tensor(kept)
        self._bias_D = getattr(layer.site(sites.ffn), "bias", None)
        self._seen: dict[str, tuple[Tensor, Tensor]] = {}
        for role, path in ((REPAIRED_ROLE, sites.ffn), ("o", sites.heads)):
            layer.site(path).register_forward_hook(self._recorder(role))

    def read(self, before_BSD: Tensor, after_BSD: Tensor) -> tuple[Tensor, Tensor]:
        """(u [B, S, K], y less its bias [B, S, D] in fp32) of the batch that the layer was just run on.

        Raises ConfigError when the layer does more than add its sublayers' outputs to its input.
        """
        read_BSK, wrote_BSD = self._seen[REPAIRED_ROLE]
        added = self._seen["o"][1].float() + wrote_BSD.float()
        if not only_adds_sublayers(before_BSD, added, after_BSD):
            raise ConfigError(
                "prune.layer_repair: linear",
                expected="layers that add the outputs of attention and MLP to their input",
                got=f"a layer {self._layer} that does more (a norm or a factor behind them)",
                hint="set prune.layer_repair=none",
            )
        offset = 0.0 if self._bias_D is None else self._bias_D.float()
        return read_BSK[..., self._kept_K], wrote_BSD.float() - offset

    def _recorder(self, role: str) -> Callable[[Any, tuple[Tensor, ...], Tensor], None]:
        return lambda _module, args, output: self._seen.__setitem__(role, (args[0], output))


def _sliced_down(slicer: Slicer, teacher: Checkpoint, position: int) -> Tensor:
    """The sliced down projection [D', K] of the student's layer `position`."""
    down = next(tensor for tensor in slicer.layer(position) if tensor.spec.role == REPAIRED_ROLE)
    weight = slicer.slice(teacher.tensor(down.source), down.spec, position)
    sliced_DK: Tensor = slicer.family.output_by_input(REPAIRED_ROLE, weight)
    return sliced_DK
