"""Heads that predict several tokens ahead, where a student is to keep them (see `Drop.kept_with`)."""

from __future__ import annotations

import fnmatch
from dataclasses import dataclass

from kdscale.errors import ConfigError
from kdscale.families.dims import Dims
from kdscale.families.schema import Drop, FamilyData


@dataclass(frozen=True)
class KeptHeads:
    """The heads that are kept, and the sizes of the teacher that they were made for."""

    drops: tuple[Drop, ...] = ()
    teacher: Dims | None = None

    @classmethod
    def of(cls, data: FamilyData, teacher: Dims) -> KeptHeads:
        """Every head of the family that can be kept. Raises ConfigError where there is none."""
        kept = tuple(drop for drop in data.drops if drop.kept_with)
        if not kept:
            raise ConfigError(
                "prune.keep_mtp", expected="a family whose file says with which cuts such a head is kept",
                got=data.name, hint="leave prune.keep_mtp out",
            )  # fmt: skip
        return cls(kept, teacher)

    def __contains__(self, tensor: str) -> bool:
        """Whether a tensor on disk is one of theirs."""
        return any(fnmatch.fnmatchcase(tensor, drop.tensors) for drop in self.drops)

    def violations(self, dims: Dims) -> list[str]:
        """Axes that may not be cut because a head reads them, one sentence each."""
        before = self.teacher or dims
        return [
            f"{axis} ({size}) is not the teacher's {getattr(before, axis)}: the {drop.what} is kept (prune.keep_mtp), "
            f"and is of the teacher's sizes; only {', '.join(drop.kept_with)} can be cut beside it"
            for drop in self.drops
            for axis, size in dims.sizes().items()
            if axis not in drop.kept_with and size != getattr(before, axis)
        ]
