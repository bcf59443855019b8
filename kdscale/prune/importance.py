"""Importance scores, gathered in one streaming pass over the teacher.

Two scores a unit where there is a choice:
- `activation`: Minitron (arXiv 2407.14679, section 2.2): mean over the sequence of |x|, L2 norm over the samples; for a
  query head x is the norm of its output, for the hidden axis x is every norm's output and the scores are summed.
- `output_energy`: the unit's share of the sublayer's output, Σ over tokens of ‖W_unit · x_unit‖².
Layers: block influence, 1 − the mean cosine between what enters and what leaves (arXiv 2403.03853).

All statistics are fp32 within a batch and fp64 across batches, whatever the weights are in. Gram matrices for the
compensation are not stored: which half of a matrix is needed depends on the plan, d_ffn² floats a layer are 26 GB for
an 8B model, and a second pass when the plan is known costs seconds. So each stage can be restarted on its own.

B batch · S sequence · N = B·S tokens · D hidden · F ffn · Q query heads · K kv heads · P = Q/K · H head_dim
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from kdscale.config import ImportanceConfig, PruneConfig
from kdscale.errors import DataError, SelfCheckError
from kdscale.families import Dims, Family
from kdscale.files import atomic_path, write_json
from kdscale.models import resolve_dtype
from kdscale.progress import Reporter
from kdscale.prune.ranking import SCORES_FILE, SUMMARY_FILE
from kdscale.prune.search import openable_axes
from kdscale.prune.stream import LayerStream, OneLayer, TokenBatch
from kdscale.weights import Checkpoint


class UnitStats:
    """Both scores of ffn units and of heads, and the energy of kv groups, in one layer."""

    def __init__(self, dims: Dims, layer: OneLayer, family: Family, axes: Sequence[str]):
        self._dims, self._axes = dims, axes
        self._sites = family.sites
        self._layer = layer
        self._sums: dict[str, Tensor] = {}

    def attach(self) -> list[Any]:
        """Register the hooks this layer needs; returns their handles."""
        handles = []
        if "ffn" in self._axes:
            handles.append(self._hook(self._sites.ffn, self._see_ffn))
        if "heads" in self._axes or "kv_heads" in self._axes:
            handles.append(self._hook(self._sites.heads, self._see_heads))
        return handles

    def scores(self) -> dict[str, Tensor]:
        """Finished scores of this layer, fp64 on the CPU."""
        sums, dims, out = self._sums, self._dims, {}
        if "ffn" in self._axes:
            weight_DF = _weight(self._layer.site(self._sites.ffn))
            out["ffn.activation"] = sums["ffn"].sqrt()
            out["ffn.output_energy"] = sums["ffn_square"] * weight_DF.square().sum(0).double()
        if "heads" in self._axes or "kv_heads" in self._axes:
            out["heads.activation"] = sums["heads"].sqrt()
            group, width = dims.heads // dims.kv_heads, dims.head_dim
            weight = _weight(self._layer.site(self._sites.heads)).double()
            weight_KDPH = weight.view(-1, dims.kv_heads, group * width).transpose(0, 1)
            # ‖W x‖² summed over tokens is the trace of W G Wᵀ; a head's own part is its diagonal block of G.
            gram = sums["gram"]
            out["kv_heads.output_energy"] = ((weight_KDPH @ gram) * weight_KDPH).sum((1, 2))
            blocks = [slice(head * width, (head + 1) * width) for head in range(group)]
            energy_PK = [((weight_KDPH[..., b] @ gram[:, b, b]) * weight_KDPH[..., b]).sum((1, 2)) for b in blocks]
            out["heads.output_energy"] = torch.stack(energy_PK, dim=1).flatten()
        return {name: value.clamp_min(0).cpu() for name, value in out.items()}

    def _hook(self, path: str, see: Callable[[Tensor], None]) -> Any:
        return self._layer.site(path).register_forward_pre_hook(lambda _module, args: see(args[0].float()))

    def _see_ffn(self, x_BSF: Tensor) -> None:
        self._add("ffn", x_BSF.abs().mean(1).square().sum(0))
        self._add("ffn_square", x_BSF.square().sum((0, 1)))

    def _see_heads(self, x_BSQH: Tensor) -> None:
        dims = self._dims
        self._add("heads", x_BSQH.unflatten(-1, (dims.heads, dims.head_dim)).norm(dim=-1).mean(1).square().sum(0))
        x_KNG = x_BSQH.flatten(0, 1).unflatten(-1, (dims.kv_heads, -1)).transpose(0, 1)
        self._add("gram", x_KNG.transpose(1, 2) @ x_KNG)

    def _add(self, name: str, value: Tensor) -> None:
        self._sums[name] = self._sums[name] + value.double() if name in self._sums else value.double()


class NormStats:
    """Minitron's score of the hidden axis: summed over all norms of all layers and the final one."""

    def __init__(self, hidden: int):
        self.total_D = torch.zeros(hidden, dtype=torch.float64)
        self._squares: dict[int, Tensor] = {}

    def attach(self, norms: Sequence[nn.Module]) -> list[Any]:
        return [norm.register_forward_hook(lambda module, _args, output: self._see(module, output)) for norm in norms]

    def close(self) -> None:
        """Take the root of what each norm saw and add it to the total; call once when its batches are through."""
        for squares in self._squares.values():
            self.total_D += squares.sqrt().cpu()
        self._squares.clear()

    def _see(self, module: nn.Module, y_BSD: Tensor) -> None:
        seen = y_BSD.float().abs().mean(1).square().sum(0).double()
        self._squares[id(module)] = self._squares.get(id(module), torch.zeros_like(seen)) + seen


def run(
    teacher: Checkpoint,
    family: Family,
    batches: Sequence[TokenBatch],
    cfg: ImportanceConfig,
    prune_cfg: PruneConfig,
    out_dir: Path,
    device: torch.device,
    reporter: Reporter,
) -> dict[str, np.ndarray]:
    """Score every axis that `prune_cfg` may cut; write out_dir/scores.safetensors, then out_dir/scores.json.

    `batches` are the calibration tokens (their number is the caller's to choose). Returns the arrays: `ffn.*` [L, F],
    `heads.*` [L, Q], `kv_heads.output_energy` [L, K], `hidden.activation` [D], `layers.block_influence` [L].
    Raises DataError without tokens and SelfCheckError when a score is not finite.
    """
    dims = family.dims(teacher.config)
    axes = openable_axes(prune_cfg, dims)
    dtype = resolve_dtype(cfg.dtype, device)
    tokens = sum(batch.input_ids_BS.numel() for batch in batches)
    if not tokens:
        raise DataError("there are no calibration tokens", expected="at least one sequence", hint="add training text")
    stream = LayerStream(teacher.config, family, teacher.tensor, dtype=dtype, device=device)
    with reporter.bar("importance", total=tokens) as bar:
        scores = gather(stream, batches, axes, advance=bar.advance)
    for name, values in scores.items():
        if not np.isfinite(values).all():
            raise SelfCheckError(f"importance {name} is not finite", hint="try importance.dtype=float32")
    write_scores(
        out_dir,
        scores,
        summary={
            "axes": list(axes),
            "dtype": str(dtype).removeprefix("torch."),
            "tokens": tokens,
            "sequences": sum(len(batch.input_ids_BS) for batch in batches),
        },
    )
    return scores


def gather(
    stream: LayerStream, batches: Sequence[TokenBatch], axes: Sequence[str], advance: Callable[[float, str], None]
) -> dict[str, np.ndarray]:
    """The scores of `run`, from any stream; `advance(tokens, note)` is called after each layer's share of the work."""
    dims, family = stream.dims, stream.family
    norms, per_layer, influence = NormStats(dims.hidden), [], []
    hidden = stream.embed(batches)
    for layer in stream.layers():
        units = UnitStats(dims, layer, family, axes)
        units.attach()
        if "hidden" in axes:
            norms.attach([layer.site(path) for path in family.sites.norms])
        cosine, count = torch.zeros((), dtype=torch.float64), 0
        for index, batch in enumerate(batches):
            with torch.inference_mode():
                after = layer(hidden[index], batch.position_ids_BS.to(stream.device))
                if "layers" in axes:
                    cosine += _cosine_sum(hidden[index], after)
            hidden[index] = after
            count += batch.input_ids_BS.numel()
            advance(batch.input_ids_BS.numel() / dims.layers, f"layer {layer.index + 1}/{dims.layers}")
        norms.close()
        with torch.inference_mode():
            per_layer.append(units.scores())
        influence.append(1 - float(cosine) / count)
    if "hidden" in axes:
        final = stream.final_norm()
        norms.attach([final])
        with torch.inference_mode():
            for state in hidden:
                final(state)
        norms.close()
    out = {name: torch.stack([scores[name] for scores in per_layer]) for name in per_layer[0]}
    out |= {"hidden.activation": norms.total_D} if "hidden" in axes else {}
    arrays = {name: value.numpy().astype(np.float32) for name, value in out.items()}
    if "layers" in axes:
        arrays["layers.block_influence"] = np.maximum(influence, 0.0).astype(np.float32)
    return arrays


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
    ordered = np.sort(values.astype(np.float64))[::-1]
    total = float(ordered.sum())
    half = float(ordered[: (len(ordered) + 1) // 2].sum()) / total if total > 0 else 0.0
    return {
        "sum": total,
        "mean": total / len(ordered),
        "max": float(ordered[0]),
        "min": float(ordered[-1]),
        "share_of_top_half": half,
    }


def _cosine_sum(before_BSD: Tensor, after_BSD: Tensor) -> Tensor:
    return nn.functional.cosine_similarity(before_BSD.float(), after_BSD.float(), dim=-1).double().sum().cpu()


def _weight(module: nn.Module) -> Tensor:
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight.float()
