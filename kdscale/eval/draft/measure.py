"""Every student as a draft of the teacher: how much it would speed up the teacher on this machine, and how much it did.

The acceptance of each token comes from the scoring of the held-out text. Here are added the costs of a draft's token
and of a check, timed in turn in this process, and really generated text.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from kdscale.config.evaluation.draft import DraftConfig
from kdscale.eval.draft.expected import speed_up, tokens_per_call, tokens_per_call_along
from kdscale.eval.draft.generating import generate
from kdscale.eval.summary import Scores
from kdscale.models.generation.times import Reader
from kdscale.models.loading import load_model, quantization_of
from kdscale.runs.models import CORRECTED, TEACHER
from kdscale.runtime.device import release_memory

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from kdscale.runtime.progress import Bar, Reporter

WAYS = {"sampled": True, "greedy": False}  # at temperature 1 from the whole vocabulary, and the most likely token


def drafts(models: Mapping[str, Path]) -> list[str]:
    """The models that can be drafts: plain transformers does not run those in few bits as a serving engine would."""
    return [name for name, path in models.items() if name not in (TEACHER, CORRECTED) and quantization_of(path) is None]


def measure_drafts(
    models: Mapping[str, Path],
    scores: Mapping[str, Scores],
    prompts: Sequence[Tensor],
    cfg: DraftConfig,
    reporter: Reporter,
    *,
    device: torch.device,
    dtype: torch.dtype,
    trust_remote_code: bool = False,
) -> dict[str, dict[str, Any]]:
    """The figures of each model that can be a draft: docs/reference/figures.md.

    `prompts` [1, S] each, at least one, on any device. The teacher is loaded once, the students one after another.
    """
    names = drafts(models)
    if not names:
        return {}

    def load(name: str) -> PreTrainedModel:
        return load_model(models[name], dtype=dtype, device=device, trust_remote_code=trust_remote_code)

    ids = [prompt_1S.to(device) for prompt_1S in prompts]
    found = {}
    with reporter.bar("drafts", 2 * len(names), unit="measurement") as bar:
        teacher = load(TEACHER)
        for name in names:
            draft = load(name)
            found[name] = _figures(teacher, draft, scores[name], ids, cfg, bar) | {"generated": None}
            if cfg.generate_length is not None:
                found[name] |= _generated(teacher, draft, ids, cfg)
            bar.advance(1, name)
            del draft
            release_memory()
        del teacher
        release_memory()
    return found


def _figures(
    teacher: PreTrainedModel, draft: PreTrainedModel, scores: Scores, prompts: Sequence[Tensor], cfg: DraftConfig,
    bar: Bar,
) -> dict[str, Any]:  # fmt: skip
    """Costs on this machine, and what follows for every draft length; the best length at temperature 1 on top."""
    seconds = _step_seconds(teacher, draft, max(prompts, key=lambda prompt_1S: prompt_1S.shape[1]), cfg)
    bar.advance(1, "costs")
    of_teacher, of_draft = seconds[TEACHER], seconds["draft"]
    assert scores.stats.overlap_N is not None
    assert scores.stats.agrees_N is not None
    accepted = {
        "sampled": scores.stats.overlap_N.double().numpy(),
        "greedy": scores.stats.agrees_N.double().numpy(),
    }
    lengths = []
    for length in cfg.lengths:
        check = seconds[length] / of_teacher
        row: dict[str, Any] = {"length": length, "check_cost": check}
        for way, accepted_N in accepted.items():
            tokens = tokens_per_call(float(accepted_N.mean()), length)
            row[way] = {
                "tokens_per_call": tokens,
                "tokens_per_call_along": tokens_per_call_along(accepted_N, scores.cluster_N, length),
                "speed_up": speed_up(tokens, length, of_draft / of_teacher, check),
            }
        lengths.append(row)
    best = max(lengths, key=lambda row: row["sampled"]["speed_up"])
    return {
        "best_length": best["length"],
        "tokens_per_call": best["sampled"]["tokens_per_call"],
        "speed_up": best["sampled"]["speed_up"],
        "draft_cost": of_draft / of_teacher,
        "teacher_step_seconds": of_teacher,
        "draft_step_seconds": of_draft,
        "draft_lengths": list(cfg.lengths),
        "lengths": lengths,
    }


def _step_seconds(
    teacher: PreTrainedModel, draft: PreTrainedModel, prompt_1S: Tensor, cfg: DraftConfig
) -> dict[str | int, float]:
    """Median seconds: of a step of the `teacher`, of the `draft`, and of the teacher's check of each draft length."""
    measured: dict[str | int, list[float]] = {TEACHER: [], "draft": [], **{length: [] for length in cfg.lengths}}
    for repeat in range(cfg.repeats + 1):  # in turn, so that other load slows all of them alike; the first warms up
        of_teacher, of_draft = Reader(teacher, prompt_1S), Reader(draft, prompt_1S)
        times: dict[str | int, float] = {TEACHER: of_teacher.seconds(1), "draft": of_draft.seconds(1)}
        times |= {length: of_teacher.seconds(length + 1) for length in cfg.lengths}
        if repeat:
            for key, value in times.items():
                measured[key].append(value)
    return {key: statistics.median(values) for key, values in measured.items()}


def _generated(
    teacher: PreTrainedModel, draft: PreTrainedModel, prompts: Sequence[Tensor], cfg: DraftConfig
) -> dict[str, Any]:
    """What speculative decoding really gave, in both ways; or why it could not be done."""
    assert cfg.generate_length is not None
    if reason := _refused(teacher, draft):
        return {"generated_left_out": reason}
    out: dict[str, Any] = {"length": cfg.generate_length, "tokens": cfg.new_tokens * len(prompts)}
    for way, sampled in WAYS.items():
        rounds, alone, together = generate(
            teacher, draft, prompts, new_tokens=cfg.new_tokens, length=cfg.generate_length, sampled=sampled
        )
        out[way] = {
            "acceptance": rounds.acceptance,
            "tokens_per_call": rounds.tokens_per_call,
            "rounds": len(rounds.whole),
            "speed_up": alone / together,
        }
    return {"generated": out}


def _refused(teacher: PreTrainedModel, draft: PreTrainedModel) -> str:
    """Why transformers does not let the two models generate together; "" where it does."""
    rows = [np.shape(model.get_output_embeddings().weight)[0] for model in (teacher, draft)]
    if rows[0] != rows[1]:
        return f"the heads have {rows[0]:,} and {rows[1]:,} rows, which transformers refuses"
    if teacher._is_stateful or draft._is_stateful:
        return "a recurrent state cannot go back to before a refused token, and transformers refuses it"
    return ""
