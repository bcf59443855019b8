"""Importance scores, measured in one streaming pass over the teacher and in a pass of their own for criteria that need
one. What is scored how is in `kdscale.config.criteria`.

Gram matrices for the compensation are not stored: which half of a matrix is needed depends on the plan, d_ffn² floats
per layer are 26 GB for an 8B model, and a second pass when the plan is known costs seconds. So each stage can be
restarted on its own.

L layers · E experts · F ffn · Q query heads · K kv heads · D hidden
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kdscale.config.criteria import Criterion
from kdscale.config.prune import ImportanceConfig, PruneConfig
from kdscale.errors import ConfigError, DataError, SelfCheckError
from kdscale.families import Family
from kdscale.files import remove_tree
from kdscale.models.hidden_states import IN_MEMORY, Scratch
from kdscale.models.layer_pass import Advance, LayerPass, layer_progress
from kdscale.models.layer_stream import LayerStream, TokenBatch
from kdscale.prune.axes import openable_axes
from kdscale.prune.compensation.layer_gaps import check_repairable
from kdscale.prune.for_family import settled
from kdscale.prune.importance.layer_context import Collector, LayerContext
from kdscale.prune.importance.layer_scores import first_tokens
from kdscale.prune.importance.ranking import criteria_to_measure, most_dropped
from kdscale.runs.importance_scores import ImportanceScores, write_scores
from kdscale.runtime.device import resolve_dtype
from kdscale.runtime.progress import Reporter
from kdscale.runtime.ranks import all_reduce_sum
from kdscale.weights import Checkpoint


def score_teacher(
    teacher: Checkpoint,
    family: Family,
    batches: Sequence[TokenBatch],
    cfg: ImportanceConfig,
    prune_cfg: PruneConfig,
    out_dir: Path | None,
    device: torch.device,
    reporter: Reporter,
    scratch: Scratch = IN_MEMORY,
) -> ImportanceScores:
    """Score every axis that `prune_cfg` may cut; write out_dir/scores.safetensors, then out_dir/scores.json.

    `batches` are the calibration tokens (the caller chooses how many); with several ranks this rank's share. All ranks
    get the scores, and one of them has an `out_dir`. Returns arrays by name: `ffn.*` [L, F], `heads.*` [L, Q],
    `kv_heads.*` [L, K], `ssm_heads.*` [L, M], `ssm_head_dim.*` [L, P], `hidden.*` [D] and `hidden.rotation` [D, D]
    where the family can be rotated, `layers.*` [L] or [L, L + 1]; of a mixture of experts `ffn.*` [L, E, F],
    `experts.*` [L, E] and `ffn.expert_tokens` [L, E], which is no score: the fewer tokens an expert got, the less there
    is to compensate from.
    Raises DataError without tokens, CheckpointError when a weight is not finite, and SelfCheckError when only a score
    is not.
    """
    dims, prune_cfg = family.dims(teacher.config), settled(prune_cfg, family, teacher.config)
    axes = openable_axes(prune_cfg, dims)
    dtype = resolve_dtype(cfg.dtype, device)
    tokens = _count(batches)
    if not tokens:
        raise DataError("there are no calibration tokens", expected="at least one sequence", hint="add training text")
    if dims.experts and prune_cfg.criterion("ffn").needs_gram:
        raise ConfigError(
            f"prune.ffn_method: {prune_cfg.ffn_method}", expected="a dense model", got=f"the experts of {family.name}",
            hint="output_energy",
        )  # fmt: skip
    if "layers" in axes and prune_cfg.layer_repair == "linear":
        check_repairable(dims, family.name)
    stream = LayerStream(teacher.config, family, teacher.tensor, dtype=dtype, device=device)
    scores: dict[str, np.ndarray] = {}
    passes = [row for row in criteria_to_measure(prune_cfg, axes) if row.own_pass]
    for row in passes:
        sample = first_tokens(batches, cfg.layer_tokens)
        with reporter.bar(f"{row.axis} by {row.method}", total=_count(sample)) as bar:
            terms = {"rounds": most_dropped(prune_cfg, dims)} if row.in_order else {}
            values = look_up(row.collect)(
                stream, sample, layer_progress(bar, dims.layers), scratch.subfolder(row.method), **terms
            )
        scores[row.name] = values.numpy().astype(np.float32)
    with reporter.bar("importance", total=tokens) as bar:
        scores |= collect_scores(stream, batches, axes, prune_cfg, layer_progress(bar, dims.layers), scratch)
    for row in passes:
        if (folder := scratch.subfolder(row.method).folder) is not None:
            remove_tree(folder)  # not before: a kill in the second pass must not cost the first one
    for name, values in scores.items():
        if not np.isfinite(values).all():
            teacher.check_finite()
            hint = "set importance.dtype=float32" if dtype != torch.float32 else "look for odd calibration text"
            raise SelfCheckError(f"importance {name} is not finite", hint=hint)
    everyone = all_reduce_sum(torch.tensor([tokens, sum(len(batch.input_ids_BS) for batch in batches)]))
    measured = ImportanceScores(scores)
    if out_dir is not None:
        precision = str(dtype).removeprefix("torch.")
        summary = {"axes": list(axes), "dtype": precision, "tokens": int(everyone[0]), "sequences": int(everyone[1])}
        write_scores(out_dir, measured, summary)
    return measured


def collect_scores(
    stream: LayerStream,
    batches: Sequence[TokenBatch],
    axes: Sequence[str],
    cfg: PruneConfig,
    advance: Advance | None = None,
    scratch: Scratch = IN_MEMORY,
) -> dict[str, np.ndarray]:
    """The scores of `axes` that need no pass of their own; calls `advance(tokens, layer)` after each batch.

    With several ranks `batches` are this rank's share, and every rank gets the scores over all of them. With a folder
    in `scratch` a killed call is resumed at the first layer that it had not finished.
    """
    ridge = cfg.ridge_lambda
    collected = [row for row in criteria_to_measure(cfg, axes) if row.collect and not row.own_pass]
    of_norms = [row for row in collected if row.axis == "hidden"]
    of_layer = [row for row in collected if row.axis != "hidden"]
    model_wide: dict[str, Any] = {}
    walk = LayerPass(stream, batches, scratch, advance)
    for layer in walk.layers():
        norms = [layer.site(path) for path in layer.sites.norms]
        context = LayerContext(stream, layer, norms, ridge, model_wide)
        units, stream_sums = _of_units(of_layer, context), _collectors(of_norms, context)
        walk.run(layer, context.see)
        with torch.inference_mode():
            result = {name: collector().clamp_min(0).cpu() for name, collector in units.items()}
            if "ffn" in axes and (experts := context.experts()) is not None:
                result["ffn.expert_tokens"] = experts.tokens_E.cpu()
            _add_to(walk.running, stream_sums)
        walk.finish(result)
    scores = _stacked(walk.results)
    if of_norms:
        if stream.family.sites.final_norm:  # else the last layer's own norm was the last
            final = stream.final_norm()
            stream_sums = _collectors(of_norms, LayerContext(stream, None, [final], ridge, model_wide))
            with torch.inference_mode():
                for state in walk.states:
                    final(stream.stream(state))
                _add_to(walk.running, stream_sums)
        for row in of_norms:
            if row.name in walk.running:
                total = walk.running[row.name]
                scores |= {row.name: total} if row.finish is None else look_up(row.finish)(total)
    walk.close()
    return {name: values.numpy().astype(np.float32) for name, values in scores.items()}


def look_up(path: str | None) -> Any:
    """The function that a row of the criteria table names as `module:function`."""
    module, _, function = (path or "").partition(":")
    return getattr(import_module(module), function)


def _of_units(criteria: Sequence[Criterion], context: LayerContext) -> dict[str, Collector]:
    """By name, of all parts of the layer that have units of the criterion's axis or of one that follows it."""
    out: dict[str, Collector] = {}
    for row in criteria:
        for axis, part in context.parts(row.axis).items():
            collector = look_up(row.collect)(part)
            if collector is not None:
                out[row.name_of(axis)] = collector
    return out


def _stacked(results: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Name → [L, ...]; zeros for the layers that do not have such units."""
    some = {name: value for result in results for name, value in result.items()}
    return {
        name: torch.stack([result.get(name, torch.zeros_like(value)) for result in results])
        for name, value in some.items()
    }


def _collectors(criteria: Sequence[Criterion], context: LayerContext) -> dict[str, Collector]:
    """By name; without the criteria that do not apply to this model."""
    attached = {row.name: look_up(row.collect)(context) for row in criteria}
    return {name: collector for name, collector in attached.items() if collector is not None}


def _add_to(running: dict[str, Tensor], collectors: dict[str, Collector]) -> None:
    for name, collector in collectors.items():
        value = collector()
        running[name] = running[name] + value if name in running else value


def _count(batches: Sequence[TokenBatch]) -> int:
    return sum(batch.input_ids_BS.numel() for batch in batches)
