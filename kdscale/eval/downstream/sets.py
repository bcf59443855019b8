"""Sets of tasks under one name, as published comparisons of pruned models use them.

The tasks are lm-evaluation-harness's own, whose data come from the hub.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class HubTask:
    """A task of the harness, with how many solved examples stand before each question and which metric is shown.

    `shots` None: what the harness's task says.
    """

    name: str
    shots: int | None = None
    metric: str = ""  # "": chosen by `harness.METRICS`


SETS: dict[str, tuple[HubTask, ...]] = {
    # arXiv 2408.11796 (Minitron in practice), table 1. HumanEval, which is there too, runs code that the model writes.
    "minitron": (
        HubTask("winogrande", 5, "acc"),
        HubTask("arc_challenge", 25, "acc_norm"),
        HubTask("mmlu", 5, "acc"),
        HubTask("hellaswag", 10, "acc_norm"),
        HubTask("gsm8k", 5, "exact_match"),
        HubTask("truthfulqa_mc2", 0, "acc"),
    ),
    # arXiv 2305.11627 (LLM-Pruner), table 1, and most papers on pruning since: all without examples
    "pruning": (
        HubTask("boolq", 0, "acc"),
        HubTask("piqa", 0, "acc_norm"),
        HubTask("hellaswag", 0, "acc_norm"),
        HubTask("winogrande", 0, "acc"),
        HubTask("arc_easy", 0, "acc_norm"),
        HubTask("arc_challenge", 0, "acc_norm"),
        HubTask("openbookqa", 0, "acc_norm"),
    ),
}
