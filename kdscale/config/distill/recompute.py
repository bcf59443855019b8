"""`distill.gradient_checkpointing`: what of a layer is computed again in the backward instead of being kept until then.

Computing again costs time and saves memory. Attention and matrix products are most of a layer's time, but of what
autograd keeps they are less than half, so keeping these alone is the best bargain of the four.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator


@dataclass(frozen=True)
class Recompute:
    """One value of the setting. `checkpoints`: layers keep their input, and what else is named here.

    `attention`: the outputs of attention; `products`: those of matrix products.
    """

    name: str
    short: str  # for narrow columns
    kept: str  # in words
    again: str
    checkpoints: bool = True
    attention: bool = False
    products: bool = False


# from the fastest to the one that takes the least memory
RECOMPUTE: dict[str, Recompute] = {
    level.name: level
    for level in (
        Recompute("off", "", "everything", "nothing", checkpoints=False),
        Recompute(
            "selective", "sel", "outputs of attention and of matrix products",
            "norms, rotary positions and activation functions", attention=True, products=True,
        ),
        Recompute("keep_attention", "attn", "outputs of attention", "all but attention", attention=True),
        Recompute("full", "full", "the layer's input", "the whole layer"),
    )
}  # fmt: skip


def _level(value: Any) -> Any:
    """`true` and `false` are what older configs say."""
    return ("full" if value else "off") if isinstance(value, bool) else value


def _known(name: str) -> str:
    if name not in RECOMPUTE:
        raise ValueError(f"expected one of {', '.join(RECOMPUTE)} (true is full, false is off)")
    return name


RecomputeLevel = Annotated[str, BeforeValidator(_level), AfterValidator(_known)]
