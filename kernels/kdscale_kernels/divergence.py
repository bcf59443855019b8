"""The divergences between teacher and student: one row each. No torch here, so that a config can check names early.

A new divergence is a row of DIVERGENCES, its torch maths in rows/divergences.py and, for a GPU, a branch of
triton_kernels/divergences.py. Everything else (config, checks, messages, tests) derives from the table.
"""

from __future__ import annotations

from dataclasses import dataclass
from numbers import Real


@dataclass(frozen=True)
class DivergenceInfo:
    """What is known about a divergence; p is the teacher's distribution, q the student's."""

    formula: str
    source: str = ""
    parameter: str | None = None  # what its papers call its one number, which lies strictly between 0 and 1
    default: float = 0.0
    gradient_sum: float | None = None  # the sum of dD/dlog q over the vocabulary, where it is a constant
    floors_teacher_tail: bool = False  # divides by the teacher's tail mass, which fp32 may round to zero
    takes_weights: bool = False  # defined for the importance weights of sampled targets, too
    has_triton: bool = False


_GKD = "GKD, Agarwal et al. 2024, section 3"
_DISTILLM = "DistiLLM, Ko et al. 2024, arXiv 2402.03898, section 3.1"

DIVERGENCES: dict[str, DivergenceInfo] = {
    "forward_kl": DivergenceInfo("KL(p ‖ q)", gradient_sum=-1.0, takes_weights=True, has_triton=True),
    "reverse_kl": DivergenceInfo("KL(q ‖ p)", floors_teacher_tail=True, has_triton=True),
    "jsd": DivergenceInfo(
        "β·KL(p ‖ m) + (1-β)·KL(q ‖ m) with m = β·p + (1-β)·q", _GKD, "beta", default=0.5, has_triton=True
    ),
    "skewed_forward_kl": DivergenceInfo("KL(p ‖ s·p + (1-s)·q)", _DISTILLM, "skew", default=0.1, has_triton=True),
    "skewed_reverse_kl": DivergenceInfo("KL(q ‖ s·q + (1-s)·p)", _DISTILLM, "skew", default=0.1, has_triton=True),
}


@dataclass(frozen=True, init=False)
class Divergence:
    """A row of DIVERGENCES with its parameter (None: the default of the table; 0.0 for one without)."""

    name: str
    parameter: float

    def __init__(self, name: str, parameter: float | None = None):
        """Raises ValueError for an unknown name and for a parameter outside its range."""
        if not isinstance(name, str) or name not in DIVERGENCES:
            raise ValueError(f"divergence: expected {' | '.join(DIVERGENCES)}, got {name!r}")
        info = DIVERGENCES[name]
        if info.parameter is None and parameter not in (None, 0.0):
            raise ValueError(f"divergence_parameter: {name} takes none, got {parameter!r}; leave it out")
        good = parameter is None or (isinstance(parameter, Real) and 0.0 < parameter < 1.0)
        if info.parameter is not None and not good:
            raise ValueError(
                f"divergence_parameter: expected {info.parameter} of {name}, a number strictly between 0 and 1 "
                f"(default {info.default:g}), got {parameter!r}"
            )
        object.__setattr__(self, "name", name)
        object.__setattr__(self, "parameter", info.default if parameter is None else float(parameter))

    @property
    def info(self) -> DivergenceInfo:
        """The facts of the table."""
        return DIVERGENCES[self.name]

    @classmethod
    def of(cls, divergence: Divergence | str) -> Divergence:
        """A name stands for the divergence with its default parameter."""
        return divergence if isinstance(divergence, Divergence) else cls(divergence)


FORWARD_KL = Divergence("forward_kl")
