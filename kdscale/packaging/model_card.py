"""The student's README.md: where it comes from, what was done to it, what was measured."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kdscale.config.distill.targets import TEXT
from kdscale.config.root import Config
from kdscale.escaping import for_markdown


def card_facts(cfg: Config, manifest: Mapping[str, Any]) -> dict[str, Any]:
    """What the model card says of a checkpoint (with this manifest) of the run of `cfg`."""
    settings, step = cfg.distill, int(manifest["step"])
    several = len(settings.objectives) > 1
    losses = [f"{entry.weight:g} × ({entry.formula})" if several else entry.formula for entry in settings.objectives]
    return {
        "teacher": Path(cfg.teacher.path).name,
        **({"teachers": ", ".join(entry.in_words for entry in settings.teachers)} if settings.teachers else {}),
        "training tokens": step * settings.global_batch * settings.seq_len,
        "optimiser steps": step,
        "sequence length": settings.seq_len,
        "sequences a step": settings.global_batch,
        "learnt from": settings.needs.in_words(),
        "loss": " + ".join(losses),
        "learning rate": f"{settings.optimizer.lr:g} → {settings.optimizer.min_lr:g}, cosine",
        "computed in": f"{manifest['fingerprint']['distill']['dtype']} with fp32 master weights",
        "skipped steps": manifest["state"]["guard"]["total"],
        "seed": cfg.seed,
    }


def model_card(facts: dict[str, Any], title: str = "Distilled student", origin: str = "") -> str:
    """README.md of the student: what it was made from and how; `facts` are shown in their order.

    `origin` begins the sentence that says what it learnt from.
    """
    origin = origin or "Pruned from a teacher and " + ("trained" if facts["learnt from"] == TEXT else "distilled")
    rows = "\n".join(
        f"| {name} | {for_markdown(value if isinstance(value, str) else json.dumps(value, sort_keys=True))} |"
        for name, value in facts.items()
    )
    return (
        "---\nlibrary_name: transformers\npipeline_tag: text-generation\ntags: [kdscale, pruned, distilled]\n---\n\n"
        f"# {title}\n\n{origin} on {facts['learnt from']} with kdscale. "
        "A standard checkpoint: load it with `AutoModelForCausalLM.from_pretrained`. The teacher's licence and the "
        "licence of the training text apply.\n\n"
        f"| | |\n|---|---|\n{rows}\n"
    )
