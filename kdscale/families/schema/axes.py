"""Axes and sizes as a family file writes them: `heads*head_dim | kv_heads`, `hidden // heads`."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from functools import cache
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

DimName = Literal["hidden", "ffn", "heads", "kv_heads", "head_dim", "layers", "vocab", "experts"]
DIMS: tuple[str, ...] = DimName.__args__  # type: ignore[attr-defined]
_FACTOR = re.compile(r"[a-z_]+|[1-9][0-9]*")
_EXPRESSION = re.compile(
    r"(?P<dim>[a-z_]+)|(?P<top>[a-z_]+) // (?P<by>[a-z_]+)|(?P<times>[1-9][0-9]*) \* (?P<of>[a-z_]+)"
)

# An axis is a sequence of blocks; a block is a row-major product of dimensions and plain numbers.
Blocks = tuple[tuple[str | int, ...], ...]


@cache
def axis_blocks(axis: str) -> Blocks:
    """Parse `heads*head_dim | kv_heads` into (("heads", "head_dim"), ("kv_heads",)). Raises ValueError."""
    blocks = []
    for block in axis.split("|"):
        factors = [factor.strip() for factor in block.split("*")]
        if wrong := [factor for factor in factors if not _FACTOR.fullmatch(factor)]:
            raise ValueError(f"axis {axis!r}: {wrong[0]!r} is neither a dimension nor a positive number")
        blocks.append(tuple(int(factor) if factor.isdigit() else factor for factor in factors))
    return tuple(blocks)


def block_size(block: tuple[str | int, ...], sizes: Mapping[str, int]) -> int:
    """The product that a block stands for, with the sizes of its dimensions."""
    return math.prod(factor if isinstance(factor, int) else sizes[factor] for factor in block)


def _axis(text: str) -> str:
    axis_blocks(text)
    return text


def _expression(text: str) -> str:
    match = _EXPRESSION.fullmatch(text)
    names = [match[group] for group in ("dim", "top", "by", "of") if match[group]] if match else []
    if not names or set(names) - {"hidden", "heads"}:
        raise ValueError(f"{text!r} is not of the form 'heads', 'hidden // heads' or '4 * hidden'")
    return text


def evaluate(expression: str, sizes: Mapping[str, int]) -> int:
    """Compute a size from `hidden` and `heads`, e.g. `hidden // heads`."""
    match = _EXPRESSION.fullmatch(expression)
    assert match
    if match["dim"]:
        return sizes[match["dim"]]
    return sizes[match["top"]] // sizes[match["by"]] if match["top"] else int(match["times"]) * sizes[match["of"]]


Axis = Annotated[str, AfterValidator(_axis)]
Expression = Annotated[str, AfterValidator(_expression)]
Name = Annotated[str, Field(min_length=1)]


class Strict(BaseModel):
    """A section of a family file: unknown keys and other types are errors."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)
