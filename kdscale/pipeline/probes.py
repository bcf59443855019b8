"""Probes: the best shapes are pruned and distilled for a few tokens, the better half of them for twice as many tokens,
until one is left (successive halving: Jamieson and Talwalkar, arXiv 1502.07943).

A probe is a run inside the run, in `probes/<shape>/`, with the stages, seeds and resuming of any other run. It shares
the text and the importance scores of the outer run, learns with the config's own distillation settings, and counts by
the held-out loss of its last validation. Every round starts from the pruned student again, so that each learning-rate
schedule is complete. Only `result-<tokens>.json` stays: a finished probe is not repeated while its inputs are the same.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kdscale.config.root import Config
from kdscale.errors import TrainingError
from kdscale.files import read_json, read_own_json, remove_tree, sha256_json, write_json
from kdscale.pipeline.stage import StageContext
from kdscale.runs.digests import digest_tree
from kdscale.runs.folder import WEIGHTS, RunFolder
from kdscale.runs.metrics_log import read_metrics
from kdscale.units import BUDGET_FIELDS

if TYPE_CHECKING:
    from kdscale.families import Dims
    from kdscale.prune.candidates import ShapeCandidate


def by_probes(context: StageContext, teacher: Dims, candidates: list[ShapeCandidate]) -> list[ShapeCandidate]:
    """`candidates` with the results of their probes: the winner first, then those that lasted longer first."""
    search = context.config.prune.search
    assert search.probe_tokens is not None
    alive, rest = candidates[: search.probe_candidates], candidates[search.probe_candidates :]
    tokens = search.probe_tokens
    while len(alive) > 1:
        context.reporter.say(f"  probes: {len(alive)} shapes, {tokens:,} tokens each")
        probed = [_probed(context, teacher, candidate, tokens) for candidate in alive]
        alive = sorted(probed, key=lambda candidate: candidate.probes[-1].loss)
        half = (len(alive) + 1) // 2
        alive, rest = alive[:half], [*alive[half:], *rest]
        tokens *= 2
    return [*alive, *rest]


def _probed(context: StageContext, teacher: Dims, candidate: ShapeCandidate, tokens: int) -> ShapeCandidate:
    """The candidate with one more probe, run now or read from its result file."""
    from kdscale.families.dims import SHAPE_AXES
    from kdscale.prune.candidates import ProbeResult

    config = probe_config(context.config, teacher, candidate, tokens)
    folder = Path(config.run_dir)
    name = " ".join(f"{axis}={size}" for axis in SHAPE_AXES if (size := getattr(candidate, axis)))
    result, made_from = folder / f"result-{tokens}.json", _fingerprint(context, config)
    known = read_own_json(result, _is_result)
    if known is None or known["made_from"] != made_from:
        context.reporter.say(f"  probe of {name}")
        loss = _run(context, config)
        write_json(result, {"shape": name, "tokens": tokens, "loss": loss, "made_from": made_from})
    loss = read_json(result)["loss"]
    for item in ("pruned", "student", "checkpoints"):  # gigabytes that the result no longer needs
        remove_tree(folder / item)
    context.reporter.say(f"  probe of {name}: held-out loss {loss:.4f} after {tokens:,} tokens")
    return candidate.model_copy(update={"probes": [*candidate.probes, ProbeResult(tokens=tokens, loss=loss)]})


def _is_result(value: Any) -> bool:
    return isinstance(value, dict) and isinstance(value.get("loss"), float) and "made_from" in value


def _run(context: StageContext, config: Config) -> float:
    from kdscale.runtime.device import release_memory  # it loads torch, which help and status do without

    assert context.run_inner is not None
    release_memory()  # the probe runs in processes of its own, and on a GPU they need what the masked runs held
    shared = {**context.shared_text(), "importance": context.run.importance}
    # a probe is made from scratch whenever its inputs changed
    context.run_inner(replace(context, accept_changes=True), config, ("plan", "prune", "distill"), shared)
    run = RunFolder(Path(config.run_dir))
    rows = [row for row in read_metrics(run.metrics) if row["kind"] == "validation"]
    if not rows or "loss" not in rows[-1]:
        raise TrainingError(f"the probe in {run.path} has no finite held-out loss", hint="lower distill.optimizer.lr")
    return float(rows[-1]["loss"])


def probe_config(config: Config, teacher: Dims, candidate: ShapeCandidate, tokens: int) -> Config:
    """The config of one probe's run: the candidate's sizes are given, nothing is searched, `tokens` are distilled."""
    from kdscale.families.dims import SHAPE_AXES

    tree: dict[str, Any] = config.resolved()
    sizes = {axis: getattr(candidate, axis) for axis in SHAPE_AXES}
    cut = {axis: size if size < getattr(teacher, axis) else None for axis, size in sizes.items()}
    search = {**tree["prune"]["search"], "probe_tokens": None, "score": "kl", "tasks": ()}  # there is one shape
    return Config.model_validate(
        {
            **tree,
            "name": f"{config.name}-probe",
            "run_dir": f"{config.run_dir}/probes/" + "-".join(f"{axis}{size}" for axis, size in sizes.items() if size),
            "prune": {**tree["prune"], **dict.fromkeys(BUDGET_FIELDS), **cut, "search": search},
            "distill": {
                **tree["distill"], "tokens": tokens, "keep_checkpoints": 1, "profile": {}, "on_policy": None,
                "preferences": None,
            },
            "bias": None,
            "quantize": None,  # the candidate's widths are already such that groups divide them
            "steps": (),
            "tracking": {},
        }
    )  # fmt: skip


def _fingerprint(context: StageContext, config: Config) -> str:
    """A hash of everything that the probe's loss depends on."""
    run = context.run
    files = {
        "source": digest_tree(context.model_to_prune, WEIGHTS),
        "teacher": digest_tree(context.model_to_learn_from, WEIGHTS),
        "importance": digest_tree(run.importance),
        "data": digest_tree(run.data),
    }
    return sha256_json({"config": config.fingerprint("prune", "importance", "distill", "seed"), "files": files})
