"""Write a teacher with adapters merged into it: each weight is read, added to in fp32, rounded once and written.

LoRA (Hu et al. 2021, arXiv 2106.09685): W + s B A with s = alpha / r, or alpha / sqrt(r) with rsLoRA (Kalajdzievski
2023, arXiv 2312.03732). DoRA (Liu et al. 2024, arXiv 2402.09353): m (W + s B A) / |W + s B A|, the norm taken over the
inputs of each output. Several adapters are merged one after the other, in the order of the config.

One tensor is in memory at a time, and two more of its size in fp32 where an adapter touches it.

O outputs · I inputs · r rank
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from kdscale.errors import CheckpointError
from kdscale.families import Family
from kdscale.files import write_json
from kdscale.models.lora.adapter_files import Adapter, LowRank
from kdscale.weights import Checkpoint, ShardWriter, copy_sidecars
from kdscale.weights.tensor_bytes import read_rows

_BLOCK_BYTES = 1 << 24


@dataclass(frozen=True)
class MergePlan:
    """What each adapter does to each tensor of a checkpoint, found without reading a weight."""

    teacher: Checkpoint
    adapters: tuple[Adapter, ...]
    added: tuple[dict[str, LowRank], ...]  # an adapter each: tensor on disk → what is added
    replaced: tuple[dict[str, str], ...]  # an adapter each: tensor on disk → its name in the adapter's file

    @classmethod
    def of(cls, teacher: Checkpoint, family: Family, adapters: Sequence[Adapter]) -> MergePlan:
        """Find the tensors. Raises CheckpointError for a module that the teacher has not or that has another shape."""
        find = _Finder(teacher, family)
        added: list[dict[str, LowRank]] = []
        replaced: list[dict[str, str]] = []
        for adapter in adapters:
            added.append({find.tensor(adapter, f"{name}.weight"): part for name, part in adapter.low_rank.items()})
            replaced.append({find.tensor(adapter, name): own for name, own in adapter.replaced.items()})
            for target, part in added[-1].items():
                _check_low_rank(teacher, adapter, target, part)
            for target, own in replaced[-1].items():
                if adapter.entries[own].shape != teacher.spec(target).shape:
                    raise _misfit(adapter, own, teacher.spec(target).shape, adapter.entries[own].shape)
        return cls(teacher, tuple(adapters), tuple(added), tuple(replaced))

    @property
    def touched(self) -> set[str]:
        """The teacher's tensors that come out otherwise."""
        return {name for group in self.added for name in group} | {name for group in self.replaced for name in group}

    def merged(self, name: str) -> Tensor:
        """One tensor after all adapters, in the teacher's dtype. Raises CheckpointError when it is not finite."""
        original = self.teacher.tensor(name)
        weight = original.float()
        for adapter, added, replaced in zip(self.adapters, self.added, self.replaced, strict=True):
            if name in replaced:
                weight = _read(adapter, replaced[name])
            if name in added:
                weight = _with_low_rank(weight, adapter, added[name])
        out = weight.to(original.dtype)
        if not bool(torch.isfinite(out).all()):
            folders = ", ".join(str(adapter.folder) for adapter in self.adapters)
            raise CheckpointError(
                f"{name} with the adapters {folders}", expected="numbers", got="NaN or infinite values"
            )
        return out


def merge_adapters(plan: MergePlan, out_dir: Path, *, max_shard_bytes: int, journal: Path, code: bool = False) -> None:
    """Write the merged teacher as a checkpoint folder; a killed call is taken up from `journal`.

    Tensors that no adapter touches are copied bit for bit; config and sidecars are the teacher's.
    """
    teacher, touched = plan.teacher, plan.touched
    names = sorted((*teacher.names, *teacher.carried), key=teacher.position)
    with ShardWriter(out_dir, {name: teacher.spec(name) for name in names}, max_shard_bytes, journal=journal) as writer:
        for name in (name for name in names if name not in writer.written):
            blocks: Iterator[Tensor] = (
                iter([plan.merged(name)]) if name in touched else teacher.blocks(name, _BLOCK_BYTES)
            )
            writer.add_blocks(name, blocks)
            if name in touched:
                writer.commit()
    if teacher.quantised is None:
        shutil.copyfile(teacher.path / "config.json", out_dir / "config.json")
    else:
        write_json(out_dir / "config.json", teacher.config)  # of the plain model that was written
    copy_sidecars(teacher.path, out_dir, code=code)


class _Finder:
    """Tensors on disk by the names that modules and parameters have in the transformers model."""

    def __init__(self, teacher: Checkpoint, family: Family):
        self._teacher, self._family = teacher, family
        self._there = {*teacher.names, *teacher.carried}
        self._tied = family.tied(teacher.config)
        self._of_parameter: dict[str, list[str]] = {}
        for name, spec in family.tensors(teacher.config).items():
            self._of_parameter.setdefault(spec.parameter, []).append(name)

    def tensor(self, adapter: Adapter, name: str) -> str:
        full = self._family.full_name(name)
        if full in self._tied:
            raise CheckpointError(
                f"{adapter.folder}: {name}", expected=f"a teacher whose {full} is a tensor of its own",
                got=f"one that is tied to {self._tied[full]}",
                hint="untie the teacher first, or train the adapter without this module",
            )  # fmt: skip
        if full in self._there:
            return full
        parts = self._of_parameter.get(name, [])
        if len(parts) == 1:
            return parts[0]
        got = f"a parameter that is {len(parts)} tensors on disk" if parts else "no such tensor"
        raise CheckpointError(
            f"{adapter.folder}: {name}", expected=f"a tensor of {self._teacher.path}", got=got,
            hint="is it an adapter of this model?" if not parts else "merge it with peft and give the merged model",
        )  # fmt: skip


def _check_low_rank(teacher: Checkpoint, adapter: Adapter, target: str, part: LowRank) -> None:
    a, b = adapter.entries[part.a].shape, adapter.entries[part.b].shape
    product = (a[1], b[0]) if part.kind == "embedding" or part.transposed else (b[0], a[1])
    if teacher.spec(target).shape != product:
        raise _misfit(adapter, part.module, teacher.spec(target).shape, product)
    if part.magnitude is not None and adapter.entries[part.magnitude].shape != (b[0],):
        raise _misfit(adapter, part.magnitude, (b[0],), adapter.entries[part.magnitude].shape)


def _misfit(adapter: Adapter, name: str, expected: Sequence[int], got: Sequence[int]) -> CheckpointError:
    what = f"{adapter.folder}: the shape of {name}"
    return CheckpointError(what, expected=f"{list(expected)}, as the teacher has", got=str(list(got)))


def _with_low_rank(weight: Tensor, adapter: Adapter, part: LowRank) -> Tensor:
    """The weight, fp32 and as it is on disk, with what one adapter adds."""
    a, b = _read(adapter, part.a), _read(adapter, part.b)
    if part.kind == "embedding":
        return weight.addmm_(a.T, b.T, alpha=part.scaling)
    weight_OI = (weight.T if part.transposed else weight).addmm(b, a, alpha=part.scaling)
    if part.magnitude is not None:
        weight_OI *= (_read(adapter, part.magnitude) / weight_OI.norm(dim=1))[:, None]
    return weight_OI.T.contiguous() if part.transposed else weight_OI


def _read(adapter: Adapter, name: str) -> Tensor:
    return read_rows(adapter.entries[name], name).float()


def adapter_facts(adapters: Sequence[Adapter]) -> Mapping[str, str]:
    """What a person wants to know of each adapter, by its folder's name."""
    return {
        adapter.folder.name: f"rank {adapter.rank}, {len(adapter.low_rank)} modules"
        + (f", {len(adapter.replaced)} tensors replaced" if adapter.replaced else "")
        for adapter in adapters
    }
