"""What the report's pruning section shows, from plan.json, scores, headers and configs: plain values, no torch.

L layers · U units
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from kdscale.config.distill.objectives import OBJECTIVES, farther_from_teacher
from kdscale.files import read_json
from kdscale.runs.folder import METRICS
from kdscale.runs.importance_scores import NOTICES_FILE, SCORES_FILE, SUMMARY_FILE, load_scores
from kdscale.runs.metrics_log import read_metrics
from kdscale.sizing.capacity import Capacity

if TYPE_CHECKING:
    from kdscale.families import Family

_CURVE_POINTS = 48
_MOST_NATS = 700.0  # of a loss whose exponential is still a number
_CONTEXT_TOKENS = 4096  # for the size of the KV cache

COMPONENTS = {
    "embedding": "Embedding", "attention": "Attention", "mixer": "State mixers", "ffn": "Feed-forward",
    "norm": "Norms", "head": "Output head", "other": "Other",
}  # fmt: skip


def components(plan: Mapping[str, Any], pruned: Path) -> list[dict[str, Any]] | None:
    """Parameters and bytes by component, of teacher and student; None while there is no pruned model, and where
    layers are gone from one that lists the kinds of its layers.

    The student's are read from its headers. The teacher's are computed: the family's tensors for the student's config
    with the teacher's sizes put back, in the student's dtypes, which pruning does not change.
    """
    from kdscale.weights import Checkpoint

    models = _models(plan, pruned)
    if models is None:
        return None
    family, configs = models
    student = Checkpoint.open(pruned)
    sizes: dict[str, dict[str, dict[str, int]]] = {}
    itemsize: dict[str, int] = {}
    for who, config in configs.items():
        for name, spec in family.tensors(config).items():
            if who == "student":
                itemsize[spec.role] = student.itemsize(name)
            empty = {model: {"parameters": 0, "bytes": 0} for model in ("teacher", "student")}
            size, count = sizes.setdefault(spec.component, empty)[who], math.prod(spec.shape)
            size["parameters"] += count
            size["bytes"] += count * itemsize[spec.role]
    return [{"component": key, "title": title, **sizes[key]} for key, title in COMPONENTS.items() if key in sizes]


def kv_bytes(plan: Mapping[str, Any], pruned: Path) -> dict[str, int] | None:
    """Bytes that the 16-bit cache of one token takes over all layers, of teacher and student; None as `components`."""
    models = _models(plan, pruned)
    return models and {who: 2 * models[0].cached_numbers(config) for who, config in models[1].items()}


def _models(plan: Mapping[str, Any], pruned: Path) -> tuple[Family, dict[str, dict[str, Any]]] | None:
    """The family, and the configs of student and teacher: the student's with the teacher's sizes put back."""
    if not (pruned / "config.json").exists():
        return None
    from kdscale.families import Dims, load_family
    from kdscale.weights import read_config

    student = read_config(pruned)
    family = load_family(student, str(pruned / "config.json"))
    listed = any(rule.field is not None for rule in family.data.layer_kinds)
    if listed and plan["teacher"]["layers"] > plan["student"]["layers"]:
        return None  # the student's config does not say of which kinds the dropped layers were
    sizes_then = {name: size for name, size in plan["teacher"].items() if name in Dims.__dataclass_fields__}
    return family, {"student": student, "teacher": family.with_sizes(student, Dims(**sizes_then))}


def importance(folder: Path) -> dict[str, Any] | None:
    """The importance scores as energies, `axis.method` → nested lists [layers, units] or [units], and their summary.

    Arrays without a unit are no scores. None while there are no scores. Raises CheckpointError for damaged files.
    """
    if not (folder / SCORES_FILE).exists() or not (folder / SUMMARY_FILE).exists():
        return None
    measured = load_scores(folder)
    drawn = [name for name in sorted(measured) if name in measured.units and measured[name].ndim in {1, 2}]
    scores = {name: measured.energy(name).tolist() for name in drawn if measured[name].size}
    return {"scores": scores, "made": read_json(folder / SUMMARY_FILE)} if scores else None


def notices(folder: Path) -> list[str]:
    """What the importance stage said of the calibration text. Raises FileError for a damaged file."""
    path = folder / NOTICES_FILE
    return [str(line) for line in read_json(path, expect=list)] if path.exists() else []


def cumulative(plan: Mapping[str, Any], importance: Mapping[str, Any]) -> dict[str, Any]:
    """By axis: the share of the importance (mean, low, high over the kept layers) that a share of the best units
    holds."""
    out: dict[str, Any] = {}
    layers = plan["kept"]["layers"]
    for axis in ("ffn", "heads", "kv_heads", "ssm_heads", "ssm_head_dim", "ssm_state", "hidden"):
        name = f"{axis}.{plan['methods'].get(axis)}"
        values = importance["scores"].get(name)
        if values is None:
            continue
        score_LU = np.atleast_2d(np.asarray(values, dtype=np.float64))
        if score_LU.ndim != 2 or not np.isfinite(score_LU).all():
            continue
        if axis != "hidden":
            score_LU = score_LU[layers]
        units = score_LU.shape[1]
        counts = np.unique(np.linspace(0, units, min(units, _CURVE_POINTS) + 1).round().astype(int))
        sums_LU = np.cumsum(-np.sort(-score_LU, axis=1), axis=1)
        totals_L = np.maximum(sums_LU[:, -1], np.finfo(float).tiny)
        shares = [sums_LU[:, count - 1] / totals_L if count else np.zeros(len(totals_L)) for count in counts]
        out[axis] = {
            "units": (counts / units).tolist(),
            "mean": [float(share.mean()) for share in shares],
            "low": [float(share.min()) for share in shares],
            "high": [float(share.max()) for share in shares],
            "kept_units": plan["student"][axis] / plan["teacher"][axis],
            "kept_importance": plan["retained"].get(axis),
        }
    return out


def repair(run_dir: Path) -> dict[str, Any] | None:
    """The errors before and after compensation, by projection; None when nothing was compensated."""
    path = run_dir / "repair.json"
    errors = read_json(path) if path.exists() else None
    return errors if errors and errors["layers"] else None


def expected(
    plan: Mapping[str, Any], components: list[dict[str, Any]] | None, kv: dict[str, int] | None
) -> dict[str, Any]:
    """Memory and speed by arithmetic: what a memory-bound decode and a compute-bound prefill would gain.

    One token of decode reads every weight once, but of an untied embedding only a row. Prefill does two operations per
    weight of the layers and token; the head runs once per prompt. Real gains are smaller where other costs count.
    """
    shapes = {who: plan[who] for who in ("teacher", "student")}
    out: dict[str, Any] = {"context_tokens": _CONTEXT_TOKENS}
    if kv is not None:
        out["kv_bytes_per_token"] = kv
        out["kv_bytes"] = {who: value * _CONTEXT_TOKENS for who, value in kv.items()}
    timed = plan["candidates"][0].get("decode_ms")
    out["timed_ms"] = {k: plan["candidates"][0][f"{k}_ms"] for k in ("decode", "prefill")} if timed else None
    if components is None:
        return out
    weights = {who: sum(component[who]["bytes"] for component in components) for who in shapes}
    by_name = {component["component"]: component for component in components}
    untied = "head" in by_name
    skipped = {who: by_name["embedding"][who]["bytes"] if untied else 0 for who in shapes}
    read = {who: weights[who] - skipped[who] for who in shapes}
    layers = {
        who: sum(size[who]["parameters"] for name, size in by_name.items() if name not in ("embedding", "head"))
        for who in shapes
    }
    return out | {
        "weight_bytes": weights,
        "decode_speedup": read["teacher"] / read["student"],
        "prefill_speedup": layers["teacher"] / layers["student"],
    }


def perplexity(plan: Mapping[str, Any] | None, evaluation: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Perplexity before and after the cut, without training: from the evaluation, else from the masked run."""
    if evaluation and {"teacher", "pruned"} <= set(evaluation["models"]):
        models = evaluation["models"]
        if models["pruned"]["quality"]["perplexity"] is None:
            return None
        return {
            "before": models["teacher"]["quality"]["perplexity"],
            "after": models["pruned"]["quality"]["perplexity"],
            "on": f"{evaluation['settings']['tokens']:,} held-out tokens",
        }
    masked = plan["candidates"][0].get("masked") if plan else None
    if not masked:
        return None
    return {
        "before": math.exp(min(masked["teacher_loss"], _MOST_NATS)),
        "after": math.exp(min(masked["loss"], _MOST_NATS)),
        "on": f"{masked['tokens']:,} calibration tokens, run masked",
    }


def steps(run_dir: Path, plan: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    """What each step of a run in several steps cut, and how its distillation went; empty for a run of one step."""
    folders = sorted((run_dir / "steps").glob("*/plan.json"), key=lambda path: int(path.parent.name.partition("-")[0]))
    if not folders:
        return []
    plans = [(path.parent.name.partition("-")[2], path.parent, read_json(path)) for path in folders]
    if plan is not None:
        plans.append(("this student", run_dir, plan))
    return [_step(name, folder, step_plan) for name, folder, step_plan in plans]


def _step(name: str, folder: Path, plan: Mapping[str, Any]) -> dict[str, Any]:
    rows = list(read_metrics(folder / METRICS.path))
    validated = [row for row in rows if row["kind"] == "validation"]
    validation = [row["perplexity"] for row in validated if "perplexity" in row]
    terms = [term for objective in OBJECTIVES.values() for term in objective.terms]
    trained = [row["tokens"] for row in rows if row["kind"] == "train" and "tokens" in row]
    cut = [axis for axis in plan["student"] if plan["student"][axis] < plan["teacher"][axis]]
    return {
        "name": name,
        "cut": {axis: [plan["teacher"][axis], plan["student"][axis]] for axis in cut},
        "teacher_params": plan["teacher_params"],
        "student_params": plan["student_params"],
        "tokens": trained[-1] if trained else None,
        "perplexity_before": validation[0] if validation else None,
        "perplexity_after": validation[-1] if len(validation) > 1 else None,
        "farther_from_teacher": farther_from_teacher(terms, validated[0], validated[-1]) if validated else [],
    }


def original_params(plan: Mapping[str, Any], earlier: list[dict[str, Any]]) -> dict[str, int]:
    """The parameter counts of the teacher that the first step of the run began with; `earlier`: see `steps`."""
    params: dict[str, int] = earlier[0]["teacher_params"] if earlier else plan["teacher_params"]
    return params


def capacity(
    plan: Mapping[str, Any], original: Mapping[str, int], config: Mapping[str, Any] | None
) -> dict[str, Any] | None:
    """The ratios behind the capacity warning, of the student to the model it learns from; None without a token budget.

    `original`: see `original_params`.
    """
    settings = (config or {}).get("distill", {})
    tokens = settings.get("tokens")
    if not isinstance(tokens, int):
        return None
    teacher = plan["teacher_params"] if settings.get("teacher") == "previous" else original
    before, after = teacher["total"], plan["student_params"]["total"]
    return Capacity(before, after, tokens).to_json()
