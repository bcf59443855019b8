"""Linear repair of the gaps that dropped layers leave in the residual stream.

The residual path cannot carry a matrix, so what is refitted is the last thing added to the stream before the gap: the
down projection of the layer in front of it. With u what it reads at the kept inputs, y its output, x the teacher's
stream behind that layer and x' the stream behind the last dropped one,

    W' = argmin Σ ‖u W'ᵀ − (y + x' − x)‖² / rms(x')² + λ‖W' − W_kept‖²

over the calibration tokens of the teacher's stream. The error counts as a share of x' because norms read the stream: a
few tokens have a hundred times the norm of others, and without the division the fit is to them alone (a block of ten
layers of SmolLM2-135M: 24 times the teacher's perplexity, with it 4.2; unrepaired 8.6). Behind a norm no token is added
more than the gain, and plain squares are better (Gemma 3 270M, 13 of 18 layers: 2.12 against 2.22).

The student stays a plain model of its family. ReplaceMe (arXiv 2505.02819, section 3) fits a D × D matrix T on y
instead; T W is one of the W' that are searched here. A cut of ffn or hidden is made up for in the same regression.
Where a norm stands behind the projection (Gemma, OLMo 2) y is what leaves the norm, and both are refitted
(post_norm.py).

Behind its first gap the student's stream is not the teacher's. With `compensate: two_stream`, where layers alone are
cut, what the student reads is as many equations more, whose target makes up for a share β of how far it is behind, as
in two_stream.py.

B batch · S sequence · D hidden · D' kept hidden channels · K kept inputs
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kdscale.config.prune import PruneConfig
from kdscale.errors import ConfigError
from kdscale.families import Dims, Family
from kdscale.files import atomic_path, remove_tree
from kdscale.models.hidden_states import IN_MEMORY, HiddenStates, Scratch
from kdscale.models.layer_pass import LayerPass, layer_progress
from kdscale.models.layer_stream import DecoderLayer, LayerStream, TokenBatch
from kdscale.prune.compensation.post_norm import (
    POST_NORMS,
    Rows,
    norm_epsilon,
    norm_gain,
    norm_weight,
    post_norm_path,
    refit_through_norm,
    through_norm,
)
from kdscale.prune.compensation.regression import TargetSums
from kdscale.prune.plan import Plan
from kdscale.prune.slicing import Slicer
from kdscale.runtime.progress import Reporter
from kdscale.weights import Checkpoint

REPAIRED_ROLE = "down"
REPAIRED_ROLES = (REPAIRED_ROLE, POST_NORMS[REPAIRED_ROLE])  # that a repair may change

# A layer's output counts as its input plus what its two sublayers put out within this share of the change and, for the
# rounding of bf16, of the output.
_OF_CHANGE, _OF_OUTPUT = 2e-2, 1e-2

_TENSORS = 3  # that are kept per batch: the stream; u of the layer in front of the last gap; y − x/factor there
_STUDENT = 1  # the second stream, where there are two
_FACTOR = "factor"  # of what that layer's sublayers put out, before it is added


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


def check_repairable(dims: Dims, name: str) -> None:
    """Raises ConfigError for a model whose gaps cannot be repaired: no one projection is the last thing added."""
    if dims.experts:
        raise ConfigError("prune.layer_repair: linear", expected="a dense model", got=f"the experts of {name}")


class RepairedWeights:
    """The refitted down projections and the norms behind them, as they are on disk, by the student's layer; in files
    where there is a folder."""

    def __init__(self, folder: Path | None):
        self._folder = folder
        self._held: dict[int, dict[str, Tensor]] = {}

    def put(self, position: int, weights: dict[str, Tensor]) -> None:
        """Keep the weights of one layer, by role."""
        from safetensors.torch import save_file

        if self._folder is None:
            self._held[position] = weights
            return
        with atomic_path(self._file(position)) as tmp:
            save_file({role: weight.contiguous() for role, weight in weights.items()}, tmp)

    def has(self, position: int) -> bool:
        """Whether the student's layer `position` got a new weight."""
        return position in self._held if self._folder is None else self._file(position).exists()

    def get(self, position: int | None) -> dict[str, Tensor]:
        """Role → new weight of a layer, fp32 on the CPU; empty without a gap behind it, and for None (no layer)."""
        from safetensors.torch import load_file

        if position is None or not self.has(position):
            return {}
        return self._held[position] if self._folder is None else load_file(self._file(position))

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
    token has D + K + 2 D' numbers (in bf16), twice as many with both streams. With a folder a killed call resumes at
    the last layer that it saved. Raises ConfigError for a layer that does more than add what its sublayers put out,
    times a factor.
    """
    gaps, repaired = find_gaps(slicer.plan), RepairedWeights(scratch.folder)
    if not gaps:
        return repaired
    check_repairable(slicer.plan.teacher.dims(), slicer.family.name)
    front_of, end_of = {gap.layer: gap for gap in gaps}, {gap.last: gap for gap in gaps}
    kept_D = torch.tensor(slicer.plan.kept.hidden, device=stream.device)
    tokens, depth = sum(batch.input_ids_BS.numel() for batch in batches), gaps[-1].last + 1
    with reporter.bar("gap repair", total=tokens) as bar:
        advance = layer_progress(bar, depth)
        # the student's stream is known where nothing else is cut, and no other than the teacher's before the first gap
        in_both = slicer.plan.methods.compensate not in ("none", "ridge") and list(slicer.plan.cut_axes()) == ["layers"]
        both = in_both and len(gaps) > 1
        streams = (0, 1) if both else (0,)
        walk = LayerPass(_WithGapInputs(stream, slicer, len(streams)), batches, scratch)
        for layer in walk.layers(depth):
            front, end = front_of.get(layer.index), end_of.get(layer.index)
            probe = _FrontProbe(layer, slicer, front.position) if front else None
            for index, batch in enumerate(batches):
                for which in streams:
                    first = _TENSORS * (len(streams) * index + which)
                    if which == _STUDENT and layer.index <= gaps[0].layer:
                        for item in range(first, first + _TENSORS):
                            walk.states[item] = walk.states[item - _TENSORS]
                        continue
                    if which == _STUDENT and layer.index not in slicer.plan.kept.layers:
                        continue
                    with torch.inference_mode():
                        before_BSD = walk.states[first]
                        after_BSD = layer(before_BSD, batch.position_ids_BS)
                        walk.states[first] = after_BSD
                        if probe is not None:
                            walk.states[first + 1], wrote_BSD, factor = probe.read(before_BSD, after_BSD)
                            walk.states[first + 2] = (wrote_BSD - after_BSD.float() / factor)[..., kept_D]
                            walk.running[_FACTOR] = torch.tensor(factor)
                advance(batch.input_ids_BS.numel(), layer.index)
            if end is not None:
                norm = post_norm_path(slicer.family, REPAIRED_ROLE)
                epsilon = norm_epsilon(layer.site(norm)) if norm else None
                layer.release()  # before another one's projection is read
                factor = float(walk.running[_FACTOR])
                beta = cfg.stream_correction if both and end != gaps[0] else None
                with torch.inference_mode():
                    rows = _gap_rows(walk.states, len(batches), len(streams), kept_D, factor, beta, not norm)
                    solved = _refit(rows, slicer, teacher, end, cfg.ridge_lambda, epsilon)
                    if both:
                        _pass_on(walk.states, solved, slicer.family, factor, epsilon)
                repaired.put(end.position, solved)
            walk.finish()
    return repaired


def _gap_rows(
    states: HiddenStates, batches: int, streams: int, kept_D: Tensor, factor: float, beta: float | None, shares: bool
) -> Rows:
    """(u, y + (x' − x)/factor, weight) of each batch, for the gap whose last layer the states have just left.

    The weight is 1/rms(x') if errors are to count as `shares` of it, else 1.

    With `beta` also the same for what the student reads, where that share of how far it is behind is to be made up for.
    """

    def rows() -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        for index in range(batches):
            first = _TENSORS * streams * index
            after = states[first].float()[..., kept_D]
            size = after.square().mean(-1, keepdim=True).sqrt().clamp_min(torch.finfo(after.dtype).tiny)
            size = size if shares else torch.ones_like(size)
            before = states[first + 2]
            yield states[first + 1], before + after / factor, 1 / size
            if beta is not None:
                student = first + _TENSORS
                yield states[student + 1], torch.lerp(before, states[student + 2], beta) + after / factor, 1 / size

    return rows


def _pass_on(
    states: HiddenStates, solved: dict[str, Tensor], family: Family, factor: float, epsilon: float | None
) -> None:
    """Put the student's stream behind the layer in front of a gap, which has new weights now.

    What is kept of it there is y − x/factor with the old ones: what the layer reads less what it is to add.
    """
    for first in range(_TENSORS, len(states), 2 * _TENSORS):
        u, left = states[first + 1], states[first + 2]
        weight_DK = family.output_by_input(REPAIRED_ROLE, solved[REPAIRED_ROLE]).to(u.device)
        added = u.float() @ weight_DK.T
        if epsilon is not None:
            added = through_norm(added, norm_gain(family, solved[POST_NORMS[REPAIRED_ROLE]]).to(u.device), epsilon)
        states[first] = ((added - left) * factor).to(states[first].dtype)


def _refit(
    rows: Rows, slicer: Slicer, teacher: Checkpoint, gap: Gap, ridge: float, epsilon: float | None
) -> dict[str, Tensor]:
    """Role → weight as it is on disk, fp32 on the CPU, of the layer in front of `gap`.

    `epsilon`: of the norm behind the projection, where there is one.
    """
    family, device, what = slicer.family, next(iter(rows()))[0].device, f"the gap behind layer {gap.layer}"
    weight_DK = family.output_by_input(REPAIRED_ROLE, _sliced(slicer, teacher, gap.position, REPAIRED_ROLE)).to(device)
    if epsilon is None:
        sums = TargetSums(weight_DK)
        for u, target, weight in rows():
            sums.add(u.float() * weight, target * weight)
        sums.reduce()
        return {REPAIRED_ROLE: family.output_by_input(REPAIRED_ROLE, sums.solve(ridge, what).cpu())}
    norm_role = POST_NORMS[REPAIRED_ROLE]
    gain_D = norm_gain(family, _sliced(slicer, teacher, gap.position, norm_role).to(device))
    solved_DK, gain_D = refit_through_norm(rows, weight_DK, gain_D, epsilon, ridge, what)
    return {
        REPAIRED_ROLE: family.output_by_input(REPAIRED_ROLE, solved_DK.cpu()),
        norm_role: norm_weight(family, gain_D.cpu()),
    }


class _WithGapInputs:
    """A LayerSource with room for what a gap's regression needs beside each batch's hidden state."""

    def __init__(self, stream: LayerStream, slicer: Slicer, streams: int):
        self.depth, self.device, self._stream, self._streams = stream.depth, stream.device, stream, streams
        self._inputs, self._outputs = slicer.plan.student.ffn, slicer.plan.student.hidden

    def embed(self, batches: Sequence[TokenBatch], scratch: Scratch) -> HiddenStates:
        states = HiddenStates(scratch, self.device)
        for state_BSD in self._stream.embedded(batches):
            for _ in range(self._streams):
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
        sites, kept = layer.sites, slicer.kept("ffn", position)
        self._layer = layer.index
        self._kept_K = slice(None) if kept is None else torch.tensor(kept)
        self._bias_D = getattr(layer.site(sites.ffn), "bias", None)
        self._seen: dict[str, tuple[Tensor, Tensor]] = {}
        family = slicer.family
        for role, path in ((REPAIRED_ROLE, sites.ffn), ("o", sites.heads)):
            layer.site(path).register_forward_hook(self._recorder(role))
            if norm := post_norm_path(family, role):
                layer.site(norm).register_forward_hook(self._recorder(POST_NORMS[role]))

    def read(self, before_BSD: Tensor, after_BSD: Tensor) -> tuple[Tensor, Tensor, float]:
        """(u [B, S, K], y less its bias [B, S, D] in fp32, factor of y) of the batch that the layer was just run on.

        Raises ConfigError when the layer does more than add its sublayers' outputs, times a factor, to its input.
        """
        read_BSK = self._seen[REPAIRED_ROLE][0]
        of_attention, wrote_BSD = (self._added(role) for role in ("o", REPAIRED_ROLE))
        added, factor = of_attention + wrote_BSD, 1.0
        if not only_adds_sublayers(before_BSD, added, after_BSD):
            change = after_BSD.float() - before_BSD.float()
            factor = float((change * added).sum() / added.square().sum())
        if not factor or not only_adds_sublayers(before_BSD, factor * added, after_BSD):
            raise ConfigError(
                "prune.layer_repair: linear",
                expected="layers that add the outputs of attention and MLP to their input, with one factor for both",
                got=f"a layer {self._layer} that does more",
                hint="set prune.layer_repair=none",
            )
        offset = 0.0 if self._bias_D is None else self._bias_D.float()
        return read_BSK[..., self._kept_K], wrote_BSD - offset, factor

    def _added(self, role: str) -> Tensor:
        """What the sublayer of the projection `role` adds to the stream, behind its norm where it has one."""
        return self._seen.get(POST_NORMS[role], self._seen[role])[1].float()

    def _recorder(self, role: str) -> Callable[[Any, tuple[Tensor, ...], Tensor], None]:
        return lambda _module, args, output: self._seen.__setitem__(role, (args[0], output))


def _sliced(slicer: Slicer, teacher: Checkpoint, position: int, role: str) -> Tensor:
    """The sliced tensor of `role` in the student's layer `position`, as it is on disk."""
    tensor = next(tensor for tensor in slicer.layer(position) if tensor.spec.role == role)
    return slicer.slice(teacher.tensor(tensor.source), tensor.spec, position)
