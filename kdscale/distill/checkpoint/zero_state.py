"""This rank's fp32 masters and Adam moments inside a DeepSpeed engine, as pieces of the student's parameters.

Everything here that knows how a ZeRO stage lays out its flat buffers (DeepSpeed 0.19: `_hp_mapping` at stages 1 and 2,
`grad_position` at stage 3, optimiser state keyed by the flat buffer). It looks into the engine's objects and imports
nothing of DeepSpeed. At stage 0 every rank has all of everything, and the ranks share the writing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
import torch.distributed as dist

from kdscale.distill.checkpoint.rank_files import QUANTITIES, cut_evenly
from kdscale.distill.parallel.tensor_parallel import ModelSlices
from kdscale.distill.parallel.tensor_slices import TensorSlice, parse_slice_name
from kdscale.errors import CheckpointError, ConfigError
from kdscale.models.parameter_map import ParameterRange
from kdscale.runtime.ranks import rank, world_size
from kdscale.weights import Checkpoint

Fill = Callable[[str, ParameterRange, torch.Tensor], None]


@dataclass(frozen=True)
class _Place:
    """A piece lies in the flat buffer `key` from element `start`; the optimiser's state is found under `key` too."""

    piece: ParameterRange
    key: torch.Tensor
    start: int

    def of(self, buffer: torch.Tensor) -> torch.Tensor:
        return buffer.view(-1).narrow(0, self.start, self.piece.length)


class ZeroState:
    """What one rank saves and loads. `shapes` are the trained parameters; `tied` maps other names to theirs.

    With `split` pieces are of this rank's parts (parts.py), and `shapes` still of the whole parameters.
    """

    def __init__(self, engine: Any, model: torch.nn.Module, split: ModelSlices | None = None):
        self._zero = engine.optimizer
        self._stage = int(engine.zero_optimization_stage())
        self._swapped = NvmeBuffers(self._zero)
        self._adam = self._zero.optimizer if self._stage else self._zero
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        names = {id(p): name for name, p in trained.items()}
        self.shapes = {name: tuple(getattr(p, "ds_shape", p.shape)) for name, p in trained.items()}
        every = model.named_parameters(remove_duplicate=False)
        self.tied = {name: names[id(p)] for name, p in every if id(p) in names and names[id(p)] != name}
        ranks = 1
        if split is not None:
            ranks = dist.get_world_size(split.head.group)
            self.shapes |= split.shapes
            names |= {id(p): split.slices[name].named(name) for name, p in trained.items() if name in split.slices}
        self._held = list(_held(self._zero, self._stage, trained, names))
        wrong = {place.key.dtype for place in self._held} - {torch.float32}
        if wrong:
            raise ConfigError("the optimiser's master weights", expected="float32", got=str(wrong.pop()))
        # a parameter that tensor-parallel ranks have whole is written by the first of them
        self._written = [place for place in self._held if rank() % ranks == 0 or parse_slice_name(place.piece.name)[1]]
        if self._stage == 0:
            self._written = _shared(self._written, rank() // ranks, world_size() // ranks)

    @property
    def ranges(self) -> list[ParameterRange]:
        """What this rank writes; over all ranks every value once."""
        return [place.piece for place in self._written]

    @property
    def adam_step(self) -> int:
        """Steps that Adam has taken (skipped ones are none); the same for all parameters and ranks."""
        steps = {int(state["step"]) for place in self._held if (state := self._adam.state.get(place.key))}
        if len(steps) > 1:
            raise CheckpointError("Adam's step count", expected="one for all parameters", got=str(sorted(steps)))
        return steps.pop() if steps else 0

    def blocks(self) -> Iterator[torch.Tensor]:
        """Views of the values to write, in the order of `write_rank_file`; zeros for moments that do not exist yet."""
        for kind in QUANTITIES:
            for key, places in _by_buffer(self._written):
                with self._swapped.there(key):
                    values = key.detach() if kind == QUANTITIES[0] else self._adam.state.get(key, {}).get(kind)
                    for place in places:
                        yield torch.zeros(place.piece.length) if values is None else place.of(values)

    @torch.no_grad()
    def load(self, fill: Fill, adam_step: int) -> None:
        """Fill masters and moments of what this rank holds, then refresh the working copies; a collective call."""
        self._swapped.forget_moments()
        for key, places in _by_buffer(self._held):
            with self._swapped.there(key, write=True):
                self._adam.state[key] = {
                    "step": self._step_value(adam_step, key),
                    **{kind: torch.zeros_like(key.data) for kind in QUANTITIES[1:]},
                }
                for kind in QUANTITIES:
                    for place in places:
                        buffer = key.data if kind == QUANTITIES[0] else self._adam.state[key][kind]
                        fill(kind, place.piece, place.of(buffer))
        self._refresh()

    @torch.no_grad()
    def restore_precision(self, source: Checkpoint, trained: Mapping[str, ParameterRange]) -> None:
        """Put back into the masters the digits that fp32 tensors of `source` have beyond bf16.

        DeepSpeed makes masters from the rounded weights. Only what this rank holds is read. `trained`: what part of
        which parameter each tensor is.
        """
        stored: dict[str, list[tuple[str, ParameterRange]]] = {}
        for name, piece in trained.items():
            if source.spec(name).dtype == "F32":
                stored.setdefault(piece.name, []).append((name, piece))
        for key, places in _by_buffer([p for p in self._held if parse_slice_name(p.piece.name)[0] in stored]):
            with self._swapped.there(key, write=True):
                for place in places:
                    self._sharpen(place, source, stored)

    def _sharpen(
        self, place: _Place, source: Checkpoint, stored: Mapping[str, list[tuple[str, ParameterRange]]]
    ) -> None:
        whole, part = parse_slice_name(place.piece.name)
        values, shape = place.of(place.key.data), self.shapes[whole]
        part = part or TensorSlice(0, 0, shape[0] if shape else 1)
        for run in part.runs(shape, place.piece.offset, place.piece.length):
            for name, there in stored[whole]:
                begin, end = max(run.begin, there.offset), min(run.begin + run.length, there.offset + there.length)
                if begin < end:
                    mine = values.narrow(0, run.at + begin - run.begin, end - begin)
                    source.fill(name, begin - there.offset, mine)

    def _step_value(self, step: int, key: torch.Tensor) -> Any:
        if not isinstance(self._adam, torch.optim.Adam):  # DeepSpeed's CPU Adam counts in an int
            return step
        return torch.tensor(float(step), device=key.device if self._adam.defaults["fused"] else "cpu")

    def _refresh(self) -> None:
        """Working copies from masters, as at the end of an optimiser step."""
        if self._stage in (1, 2):
            self._zero.update_lp_params()
        elif self._stage == 3:
            self._zero.checkpoint_event_prologue()
            for group, flat in enumerate(self._zero.fp32_partitioned_groups_flat):
                with self._swapped.there(flat):
                    self._zero._reassign_or_swap_out_partitioned_parameters(group)
            self._zero.checkpoint_event_epilogue()


def _by_buffer(places: Sequence[_Place]) -> Iterator[tuple[torch.Tensor, list[_Place]]]:
    """Runs of places in one buffer: a buffer that is not in memory is then read once."""
    for _, run in groupby(places, key=lambda place: id(place.key)):
        together = list(run)
        yield together[0].key, together


def _held(zero: Any, stage: int, trained: dict[str, torch.nn.Parameter], names: dict[int, str]) -> Iterator[_Place]:
    """Every piece of a trained parameter that this rank has in fp32, without the padding."""
    if stage == 0:
        for parameter in trained.values():
            yield _Place(ParameterRange(names[id(parameter)], 0, parameter.numel()), parameter, 0)
    elif stage < 3:
        for flat, group in zip(zero.single_partition_of_fp32_groups, zero.bit16_groups, strict=True):
            for parameter in group:
                if (mapping := parameter._hp_mapping) is not None:
                    here, there = mapping.lp_fragment_address, mapping.hp_fragment_address
                    yield _Place(ParameterRange(names[id(parameter)], here.start, here.numel), flat, there.start)
    else:
        for flat, group in zip(zero.fp32_partitioned_groups_flat, zero.fp16_groups, strict=True):
            for parameter in group:
                _, start, length = zero.grad_position[zero.get_param_id(parameter)]
                begin = zero._get_param_partition_rank(parameter) * length
                if begin < parameter.ds_numel:
                    length = min(length, parameter.ds_numel - begin)
                    yield _Place(ParameterRange(names[id(parameter)], begin, length), flat, start)


def _shared(held: list[_Place], index: int, count: int) -> list[_Place]:
    """The `index`-th of `count` ranks' share of what they hold alike."""
    places = {place.piece.name: place for place in held}
    mine = cut_evenly([place.piece for place in held], index, count)
    return [_Place(piece, places[piece.name].key, piece.offset) for piece in mine]


class NvmeBuffers:
    """The flat fp32 buffers of `zero` that are on NVMe between steps; none where nothing is swapped."""

    def __init__(self, zero: Any):
        self._zero = zero
        buffers = zero.fp32_partitioned_groups_flat if getattr(zero, "swap_optimizer", False) else []
        self._groups = {
            id(buffer): group for group, buffer in enumerate(buffers) if zero._swappable_optimizer_subgroup(group)
        }

    @contextmanager
    def there(self, buffer: torch.Tensor, write: bool = False) -> Iterator[None]:
        """Have `buffer` and its moments in memory; with `write` they go back to the disk as the block leaves them."""
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
        """Moments that are on the disk count no more: others are made."""
        if self._groups:
            self._zero.optimizer_swapper.purge_state()
