"""Axes and sizes as a family file writes them: `heads*head_dim | kv_heads`, `ssm_heads | ssm_heads by ssm_groups`,
`hidden // heads`."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from functools import cache
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from kdscale.config.criteria import FOLLOWED

DimName = Literal[
    "hidden", "ffn", "heads", "kv_heads", "head_dim", "layers", "vocab", "experts", "dense_ffn", "shared_ffn",
    "ssm_heads", "ssm_head_dim", "ssm_groups", "ssm_state",
]  # fmt: skip
DIMS: tuple[str, ...] = DimName.__args__  # type: ignore[attr-defined]
SSM_DIMS = ("ssm_heads", "ssm_head_dim", "ssm_groups", "ssm_state")
OPTIONAL_DIMS = ("experts", *FOLLOWED, *SSM_DIMS)  # 0 in models without such layers
_FACTOR = re.compile(r"[a-z_]+|[1-9][0-9]*")
_EXPRESSION = re.compile(
    r"(?P<dim>[a-z_]+)|(?P<top>[a-z_]+) // (?P<by>[a-z_]+)|(?P<times>[1-9][0-9]*|[a-z_]+) \* (?P<of>[a-z_]+)"
)

_BY = " by "

# An axis is a sequence of blocks; a block is a row-major product of dimensions and plain numbers.
Blocks = tuple[tuple[str | int, ...], ...]


@cache
def axis_blocks(axis: str) -> Blocks:
    """Parse `heads*head_dim | kv_heads` into (("heads", "head_dim"), ("kv_heads",)). Raises ValueError.

    Of an axis in groups, `ssm_groups*ssm_state | ssm_heads by ssm_groups`, they are the blocks over all groups.
    """
    blocks = []
    for block in axis.partition(_BY)[0].split("|"):
        factors = [factor.strip() for factor in block.split("*")]
        if wrong := [factor for factor in factors if not _FACTOR.fullmatch(factor)]:
            raise ValueError(f"axis {axis!r}: {wrong[0]!r} is neither a dimension nor a positive number")
        blocks.append(tuple(int(factor) if factor.isdigit() else factor for factor in factors))
    return tuple(blocks)


@cache
def axis_groups(axis: str) -> str | None:
    """The dimension that an axis is in groups of: first all that belongs to group 0, block after block, then group 1.

    The first factor of each block is that dimension or a multiple of it. None: the blocks follow one another whole.
    """
    return axis.partition(_BY)[2].strip() or None


def block_size(block: tuple[str | int, ...], sizes: Mapping[str, int]) -> int:
    """The product that a block stands for, with the sizes of its dimensions."""
    return math.prod(factor if isinstance(factor, int) else sizes[factor] for factor in block)


def axis_size(axis: str, sizes: Mapping[str, int]) -> int:
    """The size of an axis: the sum of its blocks."""
    return sum(block_size(block, sizes) for block in axis_blocks(axis))


def _axis(text: str) -> str:
    axis_blocks(text)
    if _BY in text and axis_groups(text) not in DIMS:
        raise ValueError(f"axis {text!r}: {axis_groups(text)!r} is no dimension to have groups of")
    return text


def _expression(text: str) -> str:
    if not _EXPRESSION.fullmatch(text):
        raise ValueError(f"{text!r} is not of the form 'heads', 'hidden // heads', '4 * hidden' or 'n_shared * ffn'")
    return text


def expression_names(expression: str) -> set[str]:
    """The sizes that an expression names."""
    match = _EXPRESSION.fullmatch(expression)
    assert match
    return {name for name in match.groupdict().values() if name and not name.isdigit()}


def evaluate(expression: str, sizes: Mapping[str, int]) -> int:
    """Compute a size from other sizes, e.g. `hidden // heads`."""
    match = _EXPRESSION.fullmatch(expression)
    assert match
    if match["dim"]:
        return sizes[match["dim"]]
    if match["top"]:
        return sizes[match["top"]] // sizes[match["by"]]
    return (int(match["times"]) if match["times"].isdigit() else sizes[match["times"]]) * sizes[match["of"]]


Axis = Annotated[str, AfterValidator(_axis)]
Expression = Annotated[str, AfterValidator(_expression)]
Name = Annotated[str, Field(min_length=1)]


class Strict(BaseModel):
    """A section of a family file: unknown keys and other types are errors."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)
