"""Is the student too small for its teacher, or its token budget too small for it? Two ratios and what is known of them.

Published: along a row of teachers the best one for a student is about 2.5 times its size, a larger one makes a worse
student ("Towards the Law of Capacity Gap in Distilling Language Models", arXiv 2311.07052; students pruned from
teachers below 3B, confirmed at 7B). The gap is one of learning capacity rather than of parameters as such, and more
distillation tokens narrow it ("Distillation Scaling Laws", arXiv 2502.08606). Minitron gave its 4.5B students of
Llama-3.1-8B (a ratio of 1.8) 94B tokens, 21 per parameter (arXiv 2408.11796).
"""

from __future__ import annotations

from dataclasses import dataclass

from kdscale.units import compact_count

OPTIMAL_RATIO = 2.5

# The law is a fit over discrete teachers: a ratio somewhat above it is no reason to worry yet.
_WARN_RATIO = 3.0
_PUBLISHED_TOKENS_PER_PARAMETER = 20.0


@dataclass(frozen=True)
class Capacity:
    """The sizes of a teacher and its student, and the distillation tokens that are planned."""

    teacher_params: int
    student_params: int
    tokens: int

    @property
    def ratio(self) -> float:
        """The teacher's parameters to the student's."""
        return self.teacher_params / self.student_params

    @property
    def tokens_per_parameter(self) -> float:
        """Distillation tokens to the student's parameters."""
        return self.tokens / self.student_params

    @property
    def gap_closes_at(self) -> int:
        """Parameters of an in-between student to which the teacher has the ratio that was measured to be best."""
        return round(self.teacher_params / OPTIMAL_RATIO)

    def warnings(self) -> list[str]:
        """One message for each concern, with the figures behind it; empty where there is none."""
        if self.ratio <= _WARN_RATIO:
            return []
        budget = (
            f"{compact_count(self.tokens)} distillation tokens are {self.tokens_per_parameter:.2g} per parameter of "
            f"the student (published recipes use about {_PUBLISHED_TOKENS_PER_PARAMETER:.0f})"
        )
        few = self.tokens_per_parameter < _PUBLISHED_TOKENS_PER_PARAMETER
        return [
            f"capacity gap: the teacher has {self.ratio:.1f} times the student's parameters "
            f"({compact_count(self.teacher_params)} to {compact_count(self.student_params)}). A teacher about "
            f"{OPTIMAL_RATIO} times as large as its student was measured to be best (arXiv 2311.07052). "
            f"{budget}{', too few to make up for it' if few else ', which narrows the gap (arXiv 2502.08606)'}. "
            f"Consider a step in between at {compact_count(self.gap_closes_at)} or less (steps: in the config)."
        ]

    def to_json(self) -> dict[str, object]:
        """The figures and the warnings, for report.json."""
        return {
            "teacher_params": self.teacher_params,
            "student_params": self.student_params,
            "tokens": self.tokens,
            "ratio": self.ratio,
            "optimal_ratio": OPTIMAL_RATIO,
            "tokens_per_parameter": self.tokens_per_parameter,
            "warnings": self.warnings(),
        }
