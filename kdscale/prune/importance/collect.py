"""Importance scores, gathered in one streaming pass over the teacher.

Two scores a unit where there is a choice:
- `activation`: Minitron (arXiv 2407.14679, section 2.2): mean over the sequence of |x|, L2 norm over the samples; for a
  query head x is the norm of its output, for the hidden axis x is every norm's output and the scores are summed.
- `output_energy`: the unit's share of the sublayer's output, Σ over tokens of ‖W_unit · x_unit‖².
- `pca` of the hidden axis: energies along the residual stream's principal components, and those (rotate.py).
- `obs`, only when the config asks for it: what removing the unit costs when the others are refitted (obs.py).
Layers: block influence, 1 − the mean cosine between what enters and what leaves (arXiv 2403.03853); when asked for, the
loss without each layer and the angles between layers' inputs, in a pass of their own (depth.py).

Gram matrices for the compensation are not stored: which half of a matrix is needed depends on the plan, d_ffn² floats a
layer are 26 GB for an 8B model, and a second pass when the plan is known costs seconds. So each stage can be restarted
on its own.

B batch · S sequence · N = B·S tokens · D hidden · F ffn · Q query heads · K kv heads · P = Q/K · H head_dim
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from kdscale.config.prune import ImportanceConfig, PruneConfig
from kdscale.errors import ConfigError, DataError, SelfCheckError
from kdscale.families import Family
from kdscale.files import atomic_path, remove_tree, write_json
from kdscale.models.hidden_states import IN_MEMORY, Scratch
from kdscale.models.layer_pass import LayerPass
from kdscale.models.layer_stream import LayerStream, TokenBatch
from kdscale.prune.axes import openable_axes
from kdscale.prune.compensation.layer_gaps import check_repairable
from kdscale.prune.importance.hidden_covariance import ResidualCovariance, components
from kdscale.prune.importance.layer_scores import depth_scores, first_tokens
from kdscale.prune.importance.ranking import SCORES_FILE, SUMMARY_FILE, depth_methods, obs_axes
from kdscale.prune.importance.unit_scores import NormStats, UnitStats
from kdscale.prune.rotation import ROTATION, rotation_obstacle
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
) -> dict[str, np.ndarray]:
    """Score every axis that `prune_cfg` may cut; write out_dir/scores.safetensors, then out_dir/scores.json.

    With several ranks `batches` are this rank's share, all get the scores, and one of them has an `out_dir`.
    `batches` are the calibration tokens (their number is the caller's to choose). Returns the arrays: `ffn.*` [L, F],
    `heads.*` [L, Q], `kv_heads.output_energy` [L, K], `hidden.activation` [D], `hidden.pca` [D] and `hidden.rotation`
    [D, D] where the family can be rotated, `layers.block_influence` [L], and when asked for
    `layers.loss` [L] or `layers.angular` [L, L + 1]; of a mixture of experts `ffn.*` [L, E, F] and
    `experts.output_norm` [L, E].
    Raises DataError without tokens and SelfCheckError when a score is not finite.
    """
    dims = family.dims(teacher.config)
    axes = openable_axes(prune_cfg, dims)
    dtype = resolve_dtype(cfg.dtype, device)
    tokens = sum(batch.input_ids_BS.numel() for batch in batches)
    if not tokens:
        raise DataError("there are no calibration tokens", expected="at least one sequence", hint="add training text")
    if family.sites.experts and "ffn" in obs_axes(prune_cfg):
        raise ConfigError(
            "prune.ffn_method: obs", expected="a dense model", got=f"the experts of {family.name}", hint="output_energy"
        )
    if "layers" in axes and prune_cfg.layer_repair == "linear":
        check_repairable(family.sites, family.name)
    stream = LayerStream(teacher.config, family, teacher.tensor, dtype=dtype, device=device)
    asked = depth_methods(prune_cfg) if "layers" in axes else []
    found: dict[str, Tensor] = {}
    if asked:
        part = first_tokens(batches, cfg.layer_tokens)
        whole = sum(batch.input_ids_BS.numel() for batch in part)
        with reporter.bar(f"layers by {asked[0]}", total=whole) as bar:

            def layer_done(count: int, layer: int) -> None:
                bar.advance(count / dims.layers, f"layer {layer + 1}/{dims.layers}")

            found = depth_scores(stream, part, asked, layer_done, scratch)
    with reporter.bar("importance", total=tokens) as bar:

        def advance(count: int, layer: int) -> None:
            bar.advance(count / dims.layers, f"layer {layer + 1}/{dims.layers}")

        scores = collect_scores(stream, batches, axes, advance, scratch, obs_axes(prune_cfg), prune_cfg.ridge_lambda)
    scores |= {name: value.numpy().astype(np.float32) for name, value in found.items()}
    for name in asked:
        if (folder := scratch.subfolder(name).folder) is not None:
            remove_tree(folder)  # until here, so that a kill in the second pass did not cost the first one
    for name, values in scores.items():
        if not np.isfinite(values).all():
            raise SelfCheckError(f"importance {name} is not finite", hint="try importance.dtype=float32")
    everyone = all_reduce_sum(torch.tensor([tokens, sum(len(batch.input_ids_BS) for batch in batches)]))
    if out_dir is not None:
        precision = str(dtype).removeprefix("torch.")
        summary = {"axes": list(axes), "dtype": precision, "tokens": int(everyone[0]), "sequences": int(everyone[1])}
        write_scores(out_dir, scores, summary)
    return scores


def collect_scores(
    stream: LayerStream,
    batches: Sequence[TokenBatch],
    axes: Sequence[str],
    advance: Callable[[int, int], None] | None = None,
    scratch: Scratch = IN_MEMORY,
    obs: Sequence[str] = (),
    ridge: float = 1e-2,
) -> dict[str, np.ndarray]:
    """The scores of `score_teacher` from any stream; calls `advance(tokens, layer)` after each batch of each layer.

    With several ranks `batches` are this rank's share, and every rank gets the scores over all of them. With a folder
    in `scratch` a killed call is taken up again at the first layer that it had not finished.
    `obs`, `ridge`: see UnitStats.
    """
    family, norms = stream.family, NormStats(stream.dims.hidden)
    turns = "hidden" in axes and rotation_obstacle(family, stream.config) is None
    covariance = ResidualCovariance(stream.dims.hidden, stream.device) if turns else None
    walk = LayerPass(stream, batches, scratch, advance)
    for layer in walk.layers():
        units, influence = UnitStats(stream.dims, layer, family, axes, obs, ridge), _Influence()
        units.attach()
        if "hidden" in axes:
            over_stream = [layer.site(path) for path in family.sites.norms]
            norms.attach(over_stream)
            if covariance is not None:
                covariance.attach(over_stream)
        walk.run(layer, influence.see if "layers" in axes else None)
        with torch.inference_mode():
            found = units.scores()
        if "hidden" in axes:
            walk.running["hidden.activation"] = walk.running.get("hidden.activation", 0) + norms.close()
        if covariance is not None:
            walk.running["hidden.covariance"] = walk.running.get("hidden.covariance", 0) + covariance.close()
        if "layers" in axes:
            found["layers.block_influence"] = influence.score()
        walk.finish(found)
    names = walk.results[0]
    out = {name: torch.stack([scores[name] for scores in walk.results]) for name in names}
    if "hidden" in axes:
        final = stream.final_norm()
        norms.attach([final])
        if covariance is not None:
            covariance.attach([final])
        with torch.inference_mode():
            for state in walk.states:
                final(state)
        out["hidden.activation"] = walk.running["hidden.activation"] + norms.close()
    if covariance is not None:
        out["hidden.pca"], out[ROTATION] = components(walk.running["hidden.covariance"] + covariance.close())
    walk.close()
    return {name: value.numpy().astype(np.float32) for name, value in out.items()}


class _Influence:
    """1 − the mean cosine between what enters a layer and what leaves it, over the tokens of all ranks."""

    def __init__(self) -> None:
        self._sum_count = torch.zeros(2, dtype=torch.float64)

    def see(self, before_BSD: Tensor, after_BSD: Tensor) -> None:
        cosine_BS = nn.functional.cosine_similarity(before_BSD.float(), after_BSD.float(), dim=-1)
        self._sum_count += torch.tensor([float(cosine_BS.double().sum()), cosine_BS.numel()], dtype=torch.float64)

    def score(self) -> Tensor:
        total, count = all_reduce_sum(self._sum_count)
        return (1 - total / count).clamp_min(0.0)


def write_scores(out_dir: Path, scores: Mapping[str, np.ndarray], summary: Mapping[str, Any]) -> None:
    """Both files, each whole or absent; the summary last, so that its presence says the scores are there."""
    from safetensors.numpy import save_file

    with atomic_path(out_dir / SCORES_FILE) as tmp:
        save_file({name: np.ascontiguousarray(scores[name]) for name in sorted(scores)}, tmp)
    arrays = {name: list(values.shape) for name, values in sorted(scores.items())}
    layers = max((len(v) for name, v in scores.items() if not name.startswith("hidden")), default=0)
    rows = [
        {
            "layer": layer,
            **{name: _row(values[layer]) for name, values in sorted(scores.items()) if not name.startswith("hidden")},
        }
        for layer in range(layers)
    ]
    write_json(out_dir / SUMMARY_FILE, {"version": 1, **summary, "arrays": arrays, "layers": rows})


def _row(values: np.ndarray) -> dict[str, float] | float:
    """What a person wants to see of one layer: how much there is and how unevenly it is spread."""
    if values.ndim == 0:
        return float(values)
    ordered = np.sort(values.astype(np.float64), axis=None)[::-1]
    total = float(ordered.sum())
    half = float(ordered[: (len(ordered) + 1) // 2].sum()) / total if total > 0 else 0.0
    return {
        "sum": total,
        "mean": total / len(ordered),
        "max": float(ordered[0]),
        "min": float(ordered[-1]),
        "share_of_top_half": half,
    }
