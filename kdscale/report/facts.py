"""From the files of a run folder to the facts of its report: plain values, no models, no torch.

Stages, evaluated models and log columns are those that the folder holds. What has not been made yet is None, `missing`
names it, and the report says so.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from kdscale import units
from kdscale.errors import RunFolderError
from kdscale.files import read_json
from kdscale.report import pruning_facts, training_facts
from kdscale.report.bias_facts import bias
from kdscale.report.comparison import NOISE, comparison, students, worsened
from kdscale.report.downstream_facts import downstream
from kdscale.report.speed.drafts import drafts
from kdscale.report.speed.facts import speed
from kdscale.report.tradeoff.points import as_json, points_of
from kdscale.runs.folder import ALIGNMENT, BIAS, DOWNSTREAM, EVAL, EVAL_FILE, METRICS, ON_POLICY
from kdscale.runs.metrics_log import read_metrics
from kdscale.runs.models import DISTILLED, PRUNED, TEACHER, model_title

SCHEMA_VERSION = 1

_OF_PRUNING = ("plan", "importance")  # which a run with a ready student does without

_AXIS_TITLES = {
    "layers": "Layers",
    "hidden": "Hidden size",
    "ffn": "FFN width",
    "heads": "Query heads",
    "kv_heads": "KV heads",
    "experts": "Experts",
    "ssm_heads": "SSM heads",
    "ssm_head_dim": "SSM head dimension",
    "ssm_state": "SSM state",
    "head_dim": "Head dimension",
    "vocab": "Vocabulary",
}


def gather(run_dir: Path) -> dict[str, Any]:
    """Everything the report shows, JSON-ready.

    Raises RunFolderError when `run_dir` is no folder, and FileError or CheckpointError for a damaged file in it.
    """
    if not run_dir.is_dir():
        raise RunFolderError(f"run folder {run_dir} does not exist", hint="kdscale run CONFIG makes one")
    config = read_config(run_dir / "config.yaml")
    plan = _optional(run_dir / "plan.json")
    evaluation = _optional(run_dir / EVAL.path / EVAL_FILE)
    log_rows = list(read_metrics(run_dir / METRICS.path))
    importance = pruning_facts.importance(run_dir / "importance")
    tasks = downstream(run_dir / DOWNSTREAM.path)
    results = {
        "config": config, "plan": plan, "importance": importance, "distillation": log_rows, "evaluation": evaluation,
    }  # fmt: skip
    steps = pruning_facts.steps(run_dir, plan)
    original = pruning_facts.original_params(plan, steps) if plan else None
    components = pruning_facts.components(plan, run_dir / "pruned") if plan else None
    ready = bool((config or {}).get("student"))
    facts: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        "name": (config or {}).get("name") or run_dir.name,
        "missing": [name for name, result in results.items() if not result and not (ready and name in _OF_PRUNING)],
        "comparison": comparison(evaluation) if evaluation else None,
        "evaluation": evaluation,
        "downstream": tasks,
        "speed": speed(evaluation) if evaluation else None,
        "drafts": drafts(evaluation) if evaluation else None,
        "models": as_json(points_of(evaluation, tasks["means"] if tasks else None)),
        "bias": bias(run_dir / BIAS.path, ((config or {}).get("bias") or {}).get("fail_if")),
        "shape": _shape(plan) if plan else None,
        "components": components,
        "expected": pruning_facts.expected(plan, components, pruning_facts.kv_bytes(plan, run_dir / "pruned"))
        if plan
        else None,
        "cumulative": pruning_facts.cumulative(plan, importance) if plan and importance else None,
        "repair": pruning_facts.repair(run_dir),
        "perplexity": pruning_facts.perplexity(plan, evaluation),
        "capacity": pruning_facts.capacity(plan, original, config) if plan and original else None,
        "steps": steps,
        "original_params": original,
        "plan": {key: value for key, value in plan.items() if key != "kept"} if plan else None,
        "kept": _kept(plan) if plan else None,
        "importance": importance,
        "notices": pruning_facts.notices(run_dir / "importance"),
        "ready_student": ready,
        "alignment": _optional(run_dir / ALIGNMENT.path),
        "curves": training_facts.curves(log_rows) if log_rows else None,
        "on_policy": training_facts.written(run_dir / ON_POLICY.path),
        "stages": _stages(run_dir),
        "config": config,
        "student_path": f"{(config or {}).get('run_dir') or run_dir.name}/student",
        "has_student": (run_dir / "student" / "config.json").exists(),
    }
    facts["worsened"] = worsened(evaluation) if evaluation else []
    facts["verdict"] = _verdict(facts)
    facts["headline"] = _headline(facts)
    facts["warnings"] = _warnings(facts)
    return facts


def for_json(facts: Mapping[str, Any]) -> dict[str, Any]:
    """The facts without the score of every single unit, which stay in their own file; sums a layer are kept."""
    importance = facts["importance"]
    if importance is None:
        return dict(facts)
    short = {"file": "importance/scores.safetensors", "scored": sorted(importance["scores"])}
    return {**facts, "importance": {**short, "made": importance["made"]}}


def _optional(path: Path) -> Any:
    return read_json(path) if path.exists() else None


def read_config(path: Path) -> dict[str, Any] | None:
    """The resolved config of a run as plain values, None where there is none. Raises RunFolderError for damage."""
    if not path.exists():
        return None
    try:
        tree = YAML(typ="safe", pure=True).load(path.read_text(encoding="utf-8"))
    except (YAMLError, UnicodeDecodeError) as error:
        raise RunFolderError(f"{path} cannot be read", expected="the resolved config", got=str(error)) from error
    return tree if isinstance(tree, dict) else None


def _shape(plan: Mapping[str, Any]) -> list[dict[str, Any]]:
    before, after, methods = plan["teacher"], plan["student"], plan.get("methods", {})
    retained = plan.get("retained", {})
    return [
        {
            "axis": axis,
            "title": title,
            "teacher": before[axis],
            "student": after[axis],
            "kept": after[axis] / before[axis],
            "method": methods.get(axis),
            "importance_kept": retained.get(axis),
        }
        for axis, title in _AXIS_TITLES.items()
        if before.get(axis) and axis in after  # a dense model has no experts
    ]


def _kept(plan: Mapping[str, Any]) -> dict[str, Any]:
    """Kept layers, which heads and kv heads each keeps, and how many units on each axis."""
    kept = plan["kept"]
    per_layer = [
        {"layer": layer, "ffn": _ffn_units(plan, position)}
        | {axis: len(kept[axis][position]) for axis in ("heads", "kv_heads")}
        for position, layer in enumerate(kept["layers"])
    ]
    axes = ("layers", "heads", "kv_heads", "experts", "ssm_heads", "ssm_head_dim", "ssm_state")
    which = {axis: kept[axis] for axis in axes if axis in kept}
    return {**which, "per_layer": per_layer, "hidden": len(kept["hidden"])}


def _ffn_units(plan: Mapping[str, Any], position: int) -> int:
    """How many ffn units a layer keeps; of each expert, where it has experts."""
    kept = plan["kept"]
    if kept.get("experts") and kept["experts"][position]:
        units: int = plan["student"]["ffn"]
        return units
    return len(kept["dense_ffn" if kept.get("dense_ffn") else "ffn"][position])


def _stages(run_dir: Path) -> list[dict[str, Any]]:
    """What the manifests of finished stages say, in the order of status.json, which the run wrote as it went."""
    manifests = {path.stem: read_json(path) for path in (run_dir / "stages").glob("*.json") if "." not in path.stem}
    status = list((_optional(run_dir / "status.json") or {}).get("stages", {}))

    def position(name: str) -> tuple[int, str, str]:
        at = status.index(name) if name in status else len(status)
        return at, manifests[name].get("finished") or "", name

    keys = ("seconds", "finished", "facts", "versions")
    return [
        {"stage": name, **{key: manifests[name].get(key) for key in keys}} for name in sorted(manifests, key=position)
    ]


def _verdict(facts: Mapping[str, Any]) -> str:
    """One sentence: what was kept and what it cost."""
    clauses = []
    plan, evaluation = facts["plan"], facts["evaluation"]
    if plan:
        kept, before = plan["student_params"]["non_embedding"], facts["original_params"]["non_embedding"]
        clauses.append(f"{units.format_count(kept)} of {units.format_count(before)} non-embedding parameters kept")
    if evaluation:
        perplexity = {
            name: units.format_number(float(model["quality"]["perplexity"]))
            for name, model in evaluation["models"].items()
            if model["quality"]["perplexity"] is not None
        }
        after = " → ".join(perplexity[name] for name in students(evaluation) if name in perplexity)
        teacher = f"teacher {perplexity[TEACHER]}" if TEACHER in perplexity else ""
        if after:
            clauses.append(f"perplexity {after}" + (f" ({teacher})" if teacher else ""))
        elif teacher:
            clauses.append(f"perplexity of the {teacher}")
        qualities = [evaluation["models"][name]["quality"] for name in students(evaluation)]
        if kept := [f"{quality['similarity_kept']:.3f}" for quality in qualities if "similarity_kept" in quality]:
            clauses.append(f"similarity kept {' → '.join(kept)}")
        agreed = [quality["class_agreement"] for quality in qualities if quality.get("class_agreement") is not None]
        if agreed:
            clauses.append(f"class as the teacher's {' → '.join(f'{share:.1%}' for share in agreed)}")
    return "; ".join(clauses) if clauses else "Nothing has been measured in this run yet"


def _headline(facts: Mapping[str, Any]) -> list[dict[str, str]]:
    """A few figures a reader takes away: of the run's last model, beside the teacher where it was evaluated too."""
    out: list[dict[str, str]] = []
    plan, evaluation = facts["plan"], facts["evaluation"]
    if plan:
        before, kept = facts["original_params"]["total"], plan["student_params"]["total"]
        note = f"{units.format_count(kept)} of the teacher’s {units.format_count(before)}"
        out.append(_tile("Parameters", f"{kept / before:.0%}", note))
    if facts["downstream"] and (tile := _accuracy(facts["downstream"])):
        out.append(tile)
    if not evaluation or not students(evaluation):
        return out
    name = students(evaluation)[-1]
    student, teacher = evaluation["models"][name], evaluation["models"].get(TEACHER)
    if student["quality"].get("similarity_kept") is not None:
        note = f"rank correlation of cosines with the teacher’s ({model_title(name).lower()})"
        out.append(_tile("Similarity kept", f"{student['quality']['similarity_kept']:.3f}", note))
    if (accuracy := student["quality"].get("class_accuracy")) is not None:
        note = f"of held-out texts in their class ({model_title(name).lower()})"
        if teacher is not None:
            note += f"; the teacher’s is {teacher['quality']['class_accuracy']:.1%}"
        out.append(_tile("Accuracy", f"{accuracy:.1%}", note))
    if (agreed := student["quality"].get("class_agreement")) is not None:
        out.append(
            _tile("Class kept", f"{agreed:.1%}", f"of texts in the teacher’s class ({model_title(name).lower()})")
        )
    if teacher is not None and student["quality"]["perplexity"] is not None:
        ratio = student["quality"]["perplexity"] / teacher["quality"]["perplexity"]
        note = f"the teacher’s, on held-out text ({model_title(name).lower()})"
        out.append(_tile("Perplexity", f"{ratio:.2f}×", note))
    if (closed := evaluation.get("gap_closed")) is not None:
        gap = "the loss that pruning cost" if PRUNED in evaluation["models"] else "the distance to the teacher"
        out.append(_tile("Gap closed", f"{closed:.0%}", f"of {gap}, by distilling"))
    if worse := facts["worsened"]:
        first = model_title(students(evaluation)[0]).lower()
        out.append(_tile("Got worse", str(len(worse)), f"since {first}: {', '.join(worse)}"))
    if teacher is None:
        return out
    if student.get("efficiency") and teacher.get("efficiency"):
        own, of_teacher = (model["efficiency"]["decode_tokens_per_second"] for model in (student, teacher))
        out.append(_tile("Decode speed", f"{own / of_teacher:.2f}×", f"{own:.0f} tokens/s on this machine"))
    cache, teacher_cache = (model["size"]["kv_cache_bytes_per_token"] for model in (student, teacher))
    if cache is None:  # encoders have none
        return out
    out.append(_tile("KV cache", f"{cache / teacher_cache:.0%}", f"{units.format_size(cache)} per token"))
    return out


def _accuracy(tasks: Mapping[str, Any]) -> dict[str, str] | None:
    """The distilled student's mean over tasks, beside the teacher's."""
    if DISTILLED not in tasks["means"]:
        return None
    beside = f"; the teacher’s {tasks['teacher']}" if tasks["teacher"] else ""
    note = f"mean of {len(tasks['rows'][:-1])} tasks" if len(tasks["rows"]) > 1 else tasks["rows"][0]["title"]
    return _tile("Accuracy", f"{100 * tasks['means'][DISTILLED]:.1f} %", f"{note}{beside}")


def _tile(title: str, value: str, note: str) -> dict[str, str]:
    return {"title": title, "value": value, "note": note}


def _warnings(facts: Mapping[str, Any]) -> list[str]:
    out = [*(facts["plan"] or {}).get("warnings", []), *facts["notices"]]
    out += (facts["capacity"] or {}).get("warnings", [])
    evaluation, curves = facts["evaluation"], facts["curves"]
    gap = evaluation["differences"].get("distilled_minus_pruned", {}) if evaluation else {}
    if "ce" in gap:
        error = gap["ce_standard_error"]
        if gap["ce"] >= 0:
            out.append(
                "Distillation did not lower the held-out loss: the distilled student is no better than the pruned."
            )
        elif error and abs(gap["ce"]) < NOISE * error:
            out.append("The gain from distillation is within two standard errors: evaluate on more tokens.")
    if facts["worsened"]:
        before, after = (model_title(students(evaluation)[at]).lower() for at in (0, -1))
        out.append(f"Worse in the {after} student than in the {before} one: {', '.join(facts['worsened'])}.")
    for step in facts["steps"][: -1 if evaluation else None]:  # the last one is evaluated
        if farther := step["farther_from_teacher"]:
            out.append(f"Distilling moved {step['name']} away from the teacher on held-out text: {', '.join(farther)}.")
    if facts["bias"]:
        out += [f"Bias grew more than the config allows: {one}." for one in facts["bias"]["too_much"]]
        if grew := facts["bias"]["grew"]:
            out.append(f"Bias grew since the teacher: {', '.join(grew)}.")
    speeds = [m.get("efficiency", {}) for m in evaluation["models"].values()] if evaluation else []
    if any(found.get("interleaved") is False for found in speeds):
        out.append("The models did not fit in memory together, so their speeds were measured one after another.")
    if any(found.get("device") == "cuda" and not found.get("cuda_graphs") for found in speeds):
        out.append(
            "Decode on a GPU is timed without CUDA graphs: starting kernels, whose number grows with"
            " the layers, takes most of it. A serving engine gains more from narrower layers than these speeds show;"
            " eval.speed.cuda_graphs comes nearer to one."
        )
    out += [
        f"The kernels of the distillation ran in {row['facts']['kernels']}."
        for row in facts["stages"]
        if "kernels" in (row["facts"] or {})
    ]
    if curves and curves["skipped_steps"]:
        out.append(f"{curves['skipped_steps']} training steps were skipped for NaN or Inf.")
    return out
