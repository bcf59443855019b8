"""This rank's fp32 masters and Adam moments inside a DeepSpeed engine, as ranges of the student's parameters.

Only this file knows how a ZeRO stage lays out its flat buffers (DeepSpeed 0.19: `_hp_mapping` at stages 1 and 2,
`grad_position` at stage 3, optimiser state keyed by the flat buffer; a stage 1 that adds bf16 gradients in fp32 is
another class, BF16_Optimizer, with other names for the same). At stage 0 every rank holds everything, and the ranks
divide the writing among themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import Any

import torch
import torch.distributed as dist

from kdscale.distill.checkpoint.rank_files import AVERAGE, MASTER, QUANTITIES, cut_evenly
from kdscale.distill.parallel.tensor_parallel import ModelSlices
from kdscale.distill.parallel.tensor_slices import TensorSlice, parse_slice_name
from kdscale.errors import ConfigError, SelfCheckError
from kdscale.models.parameter_map import ParameterRange
from kdscale.runtime.ranks import rank, world_size
from kdscale.teacher.source import StudentAverage
from kdscale.weights import Checkpoint

Fill = Callable[[str, ParameterRange, torch.Tensor], None]


@dataclass(frozen=True)
class _HeldRange:
    """A range of a parameter or slice that lies in the flat `buffer` from element `start` on.

    The optimiser keeps its state under the buffer as key.
    """

    span: ParameterRange
    buffer: torch.Tensor
    start: int

    def view_in(self, buffer: torch.Tensor) -> torch.Tensor:
        """This range of the held buffer, or of a moment that is laid out like it."""
        return buffer.view(-1).narrow(0, self.start, self.span.length)


class ZeroState:
    """What one rank saves and loads. `shapes` are the trained parameters; `tied` maps other names to theirs.

    `helpers` are parameters that are trained beside the model's, by name, and are no part of its export. The values of
    an `average` of the student are saved and loaded too. With `slices` (tensor parallelism) the ranges are of this
    rank's slices; `shapes` are still of whole parameters.
    """

    def __init__(
        self,
        engine: Any,
        model: torch.nn.Module,
        slices: ModelSlices | None = None,
        helpers: Mapping[str, torch.nn.Parameter] | None = None,
        average: StudentAverage | None = None,
    ):
        self._zero, self._average = engine.optimizer, average
        self._stage = int(engine.zero_optimization_stage())
        self._nvme = NvmeBuffers(self._zero)
        self._adam = self._zero.optimizer if self._stage else self._zero
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad} | dict(helpers or {})
        self.helpers = sorted(helpers or {})
        names = {id(p): name for name, p in trained.items()}
        self.shapes = {name: tuple(getattr(p, "ds_shape", p.shape)) for name, p in trained.items()}
        with_aliases = model.named_parameters(remove_duplicate=False)
        self.tied = {name: names[id(p)] for name, p in with_aliases if id(p) in names and names[id(p)] != name}
        tensor_ranks = 1
        if slices is not None:
            tensor_ranks = dist.get_world_size(slices.head.group)
            self.shapes |= slices.shapes
            names |= {id(p): slices.slices[name].named(name) for name, p in trained.items() if name in slices.slices}
        self._held = list(_held_ranges(self._zero, self._stage, trained, names))
        wrong = {held.buffer.dtype for held in self._held} - {torch.float32}
        if wrong:
            raise ConfigError("the optimiser's master weights", expected="float32", got=str(wrong.pop()))
        # of a parameter that is not sliced every tensor-parallel rank has a copy: the first of them writes it
        first = rank() % tensor_ranks == 0
        self._written = [held for held in self._held if first or parse_slice_name(held.span.name)[1]]
        if self._stage == 0:
            self._written = _cut_evenly(self._written, rank() // tensor_ranks, world_size() // tensor_ranks)

    @property
    def model_shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes of the model's own parameters."""
        return {name: shape for name, shape in self.shapes.items() if name not in self.helpers}

    @property
    def quantities(self) -> tuple[str, ...]:
        """What is kept of each value, in the order of `blocks`."""
        return QUANTITIES if self._average is None else (*QUANTITIES, AVERAGE)

    @property
    def ranges(self) -> list[ParameterRange]:
        """What this rank writes; over all ranks every value once."""
        return [held.span for held in self._written]

    @property
    def adam_step(self) -> int:
        """How many steps Adam has taken, without skipped ones; the same for all parameters and ranks."""
        steps = {int(state["step"]) for held in self._held if (state := self._adam.state.get(held.buffer))}
        if len(steps) > 1:
            raise SelfCheckError("Adam's step count", expected="one for all parameters", got=str(sorted(steps)))
        return steps.pop() if steps else 0

    def blocks(self) -> Iterator[torch.Tensor]:
        """Views of the values to write, in the order of `write_rank_file`; zeros for moments that do not exist yet."""
        for quantity in QUANTITIES:
            for buffer, ranges in _by_buffer(self._written):
                with self._nvme.in_memory(buffer):
                    values = buffer.detach() if quantity == MASTER else self._adam.state.get(buffer, {}).get(quantity)
                    for held in ranges:
                        yield torch.zeros(held.span.length) if values is None else held.view_in(values)
        if self._average is not None:
            yield from map(self._average.values, self.ranges)

    @torch.no_grad()
    def load(self, fill: Fill, adam_step: int) -> None:
        """Fill masters and moments of what this rank holds, then refresh the working copies; a collective call."""
        self._nvme.forget_moments()
        for buffer, ranges in _by_buffer(self._held):
            with self._nvme.in_memory(buffer, write=True):
                moments = {name: torch.zeros_like(buffer.data) for name in QUANTITIES[1:]}
                self._adam.state[buffer] = {"step": self._step_value(adam_step, buffer), **moments}
                for quantity, values in {MASTER: buffer.data, **moments}.items():
                    for held in ranges:
                        fill(quantity, held.span, held.view_in(values))
        self._refresh()
        if self._average is not None:
            self._average.load(partial(fill, AVERAGE))

    @torch.no_grad()
    def restore_precision(self, source: Checkpoint, trained: Mapping[str, ParameterRange]) -> None:
        """Put back into the masters the digits that fp32 tensors of `source` have beyond bf16.

        DeepSpeed makes masters from the rounded weights. Only what this rank holds is read. `trained` says which range
        of which parameter each tensor is.
        """
        stored: dict[str, list[tuple[str, ParameterRange]]] = {}
        for tensor, span in trained.items():
            if source.spec(tensor).dtype == "F32":
                stored.setdefault(span.name, []).append((tensor, span))
        for buffer, ranges in _by_buffer([held for held in self._held if _parameter(held) in stored]):
            with self._nvme.in_memory(buffer, write=True):
                for held in ranges:
                    self._fill_from(source, stored[_parameter(held)], held)

    def _fill_from(self, source: Checkpoint, stored: Sequence[tuple[str, ParameterRange]], held: _HeldRange) -> None:
        """Fill a range from the tensors of a model folder that are in it; `stored` are those of its parameter."""
        parameter, tensor_slice = parse_slice_name(held.span.name)
        values, shape = held.view_in(held.buffer.data), self.shapes[parameter]
        tensor_slice = tensor_slice or TensorSlice.all_rows(shape)
        for source_at, at, length in tensor_slice.ranges(shape, held.span.offset, held.span.length):
            for tensor, span in stored:
                begin, end = max(source_at, span.offset), min(source_at + length, span.offset + span.length)
                if begin < end:
                    out = values.narrow(0, at + begin - source_at, end - begin)
                    source.fill(tensor, begin - span.offset, out)

    def _step_value(self, step: int, buffer: torch.Tensor) -> Any:
        if not isinstance(self._adam, torch.optim.Adam):  # DeepSpeed's CPU Adam counts in an int
            return step
        return torch.tensor(float(step), device=buffer.device if self._adam.defaults["fused"] else "cpu")

    def _refresh(self) -> None:
        """Working copies from masters, as at the end of an optimiser step."""
        if self._stage in (1, 2):
            self._zero.update_lp_params()
        elif self._stage == 3:
            self._zero.checkpoint_event_prologue()
            for group, flat in enumerate(self._zero.fp32_partitioned_groups_flat):
                with self._nvme.in_memory(flat):
                    self._zero._reassign_or_swap_out_partitioned_parameters(group)
            self._zero.checkpoint_event_epilogue()


def _parameter(held: _HeldRange) -> str:
    return parse_slice_name(held.span.name)[0]


def _by_buffer(ranges: Sequence[_HeldRange]) -> Iterator[tuple[torch.Tensor, list[_HeldRange]]]:
    """Neighbouring ranges of one buffer, together: a buffer that is on a disk is then read once."""
    for _, neighbours in groupby(ranges, key=lambda held: id(held.buffer)):
        together = list(neighbours)
        yield together[0].buffer, together


def _held_ranges(
    zero: Any, stage: int, trained: dict[str, torch.nn.Parameter], names: dict[int, str]
) -> Iterator[_HeldRange]:
    """Every range of a trained parameter that this rank has in fp32, without the padding."""
    if stage == 0:
        for parameter in trained.values():
            yield _HeldRange(ParameterRange(names[id(parameter)], 0, parameter.numel()), parameter, 0)
    elif stage < 3:
        for flat, group in _flat_groups(zero):
            for parameter in group:
                if (mapping := parameter._hp_mapping) is not None:
                    low, high = mapping.lp_fragment_address, mapping.hp_fragment_address
                    yield _HeldRange(ParameterRange(names[id(parameter)], low.start, low.numel), flat, high.start)
    else:
        for flat, group in zip(zero.fp32_partitioned_groups_flat, zero.fp16_groups, strict=True):
            for parameter in group:
                _, start, length = zero.grad_position[zero.get_param_id(parameter)]
                begin = zero._get_param_partition_rank(parameter) * length
                if begin < parameter.ds_numel:
                    length = min(length, parameter.ds_numel - begin)
                    yield _HeldRange(ParameterRange(names[id(parameter)], begin, length), flat, start)


def _flat_groups(zero: Any) -> Iterator[tuple[torch.Tensor, list[Any]]]:
    """Each flat fp32 buffer of stage 1 or 2 with the parameters of which it has a share."""
    if hasattr(zero, "fp32_groups_flat_partition"):
        return zip(zero.fp32_groups_flat_partition, zero.bf16_groups, strict=True)
    return zip(zero.single_partition_of_fp32_groups, zero.bit16_groups, strict=True)


def _cut_evenly(held: list[_HeldRange], index: int, count: int) -> list[_HeldRange]:
    """What the `index`-th of `count` ranks writes of whole parameters that all of them hold."""
    buffers = {entry.span.name: entry.buffer for entry in held}
    ranges = cut_evenly([entry.span for entry in held], index, count)
    return [_HeldRange(span, buffers[span.name], span.offset) for span in ranges]


class NvmeBuffers:
    """The flat fp32 buffers of `zero` that are on NVMe between steps; none when nothing is swapped."""

    def __init__(self, zero: Any):
        self._zero = zero
        buffers = zero.fp32_partitioned_groups_flat if getattr(zero, "swap_optimizer", False) else []
        self._groups = {
            id(buffer): group for group, buffer in enumerate(buffers) if zero._swappable_optimizer_subgroup(group)
        }

    @contextmanager
    def in_memory(self, buffer: torch.Tensor, write: bool = False) -> Iterator[None]:
        """Bring `buffer` and its moments into memory; with `write` the disk gets what the block made of them."""
        group = self._groups.get(id(buffer))
        if group is None:
            yield
            return
        self._zero._optimizer_states_and_gradient_swap_in(group)
        try:
            yield
        except BaseException:
            self._zero._release_swap_buffers(group)
            raise
        if write:
            self._zero._optimizer_states_and_gradient_swap_out(group)
        else:
            self._zero._release_swap_buffers(group)

    def forget_moments(self) -> None:
        """Drop the moments on the disk: new ones are made."""
        if self._groups:
            self._zero.optimizer_swapper.purge_state()
