"""Teacher, pruned and distilled on the same held-out tokens: quality, size, speed and samples in one JSON file.

Letters: B sequences of a batch, S their length, N scored tokens, H hidden size, V vocabulary.

The teacher runs once; what its head reads is spooled to disk and serves every student, so that a student and its
sibling are the most that is ever in memory. Definitions of all figures: docs/reference/figures.md.
"""

from __future__ import annotations

import gc
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import Tensor

from kdscale.config.evaluate import EvalConfig
from kdscale.config.root import RuntimeConfig
from kdscale.data.packing import IGNORED_LABEL
from kdscale.errors import CheckpointError, DataError, KdscaleError
from kdscale.eval import efficiency
from kdscale.eval.samples import Sampling, continue_prompts
from kdscale.eval.summary import CALIBRATION_BINS, Scores, compare, gap_closed, summarise
from kdscale.eval.token_stats import CHUNK_BYTES, TokenStats, check_same_vocabulary, checked_head, token_stats
from kdscale.files import explain_os_errors, write_json
from kdscale.models.head import final_hidden
from kdscale.models.loading import load_model, load_tokenizer
from kdscale.runtime.device import resolve_device, resolve_dtype, set_threads
from kdscale.runtime.progress import Bar, Reporter

if TYPE_CHECKING:
    from collections.abc import Iterator

    from transformers import PreTrainedModel


SCHEMA_VERSION = 1


TEACHER = "teacher"


class EvalBatch(Protocol):
    """What scoring needs of a data batch: int64 [B, S], labels already shifted, −100 where nothing is scored."""

    @property
    def input_ids_BS(self) -> Tensor: ...  # noqa: N802

    @property
    def position_ids_BS(self) -> Tensor: ...  # noqa: N802

    @property
    def labels_BS(self) -> Tensor: ...  # noqa: N802

    @property
    def text_bytes(self) -> int: ...  # UTF-8 bytes of the text that the labels stand for


@dataclass(frozen=True)
class Settings:
    device: torch.device
    dtype: torch.dtype
    trust_remote_code: bool = False
    chunk_bytes: int = CHUNK_BYTES


@dataclass
class Prompting:
    """Prompts every model continues while it is loaded, and where the answers go."""

    prompts: Sequence[str] = ()
    tokens: int = 0
    tokenizer: Any = None
    sampling: Sampling = field(default_factory=Sampling)
    outputs: dict[str, list[str]] = field(default_factory=dict)


def evaluate(
    models: Mapping[str, Path],
    data_dir: Path,
    cfg: EvalConfig,
    runtime: RuntimeConfig,
    out_path: Path,
    reporter: Reporter,
    *,
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """Measure `models` ("teacher" and any students, in the order to show) and write `out_path`; returns what it wrote.

    Raises DataError when nothing is held out, CheckpointError for models that do not load or do not compare.
    """
    from kdscale.data.heldout import eval_batches
    from kdscale.data.token_store import TokenStore

    if TEACHER not in models:
        raise KdscaleError("evaluation needs the teacher", got=", ".join(models))
    started = time.monotonic()
    threads = set_threads(runtime.threads)
    device = resolve_device(runtime.device)
    settings = Settings(device, resolve_dtype(cfg.dtype, device), trust_remote_code)
    split = TokenStore.open(data_dir).split("heldout")
    batches = list(eval_batches(split, cfg.seq_len, cfg.micro_batch, cfg.tokens))
    tokenizer = load_tokenizer(models[TEACHER], trust_remote_code)
    prompting = Prompting(cfg.prompts, cfg.sample_tokens, tokenizer, Sampling(cfg.sample_temperature, cfg.sample_top_p))

    scores, sizes = score_models(models, batches, settings, reporter, prompting)
    text_bytes = sum(batch.text_bytes for batch in batches)
    measured: dict[str, dict[str, Any]] = {
        name: {
            "path": str(models[name]),
            "quality": summarise(score, text_bytes),
            "size": sizes[name],
        }
        for name, score in scores.items()
    }
    quality_seconds = time.monotonic() - started
    if cfg.efficiency:
        speeds = efficiency.measure(
            models, cfg, device=device.type, threads=threads, reporter=reporter, trust_remote_code=trust_remote_code
        )
        for name, figures in speeds.items():
            measured[name]["efficiency"] = figures
    result = {
        "schema_version": SCHEMA_VERSION,
        "settings": _describe(cfg, settings, threads, batches, scores[TEACHER], text_bytes),
        "models": measured,
        "differences": compare(scores),
        "gap_closed": gap_closed({name: figures["quality"]["ce"] for name, figures in measured.items()}),
        "samples": [
            {"prompt": prompt, "outputs": {name: texts[i] for name, texts in prompting.outputs.items()}}
            for i, prompt in enumerate(cfg.prompts)
        ],
        "seconds": {"quality_and_samples": quality_seconds, "total": time.monotonic() - started},
    }
    write_json(out_path, result)
    return result


def headline(result: Mapping[str, Any]) -> dict[str, str]:
    """The few figures worth a line on the terminal: perplexity of each model, and the share of the gap closed."""
    out = {
        f"{name} perplexity": f"{figures['quality']['perplexity']:,.2f}" for name, figures in result["models"].items()
    }
    if result["gap_closed"] is not None:
        out["gap closed"] = f"{result['gap_closed']:.0%}"
    return out


def score_models(
    models: Mapping[str, Path],
    batches: Sequence[EvalBatch],
    settings: Settings,
    reporter: Reporter,
    prompting: Prompting | None = None,
) -> tuple[dict[str, Scores], dict[str, dict[str, int]]]:
    """Per-token statistics and size of each model, in the order of `models`. Students are scored two at a time."""
    prompting = prompting or Prompting()
    labels_N, cluster_N = _scored_tokens(batches)
    students = [name for name in models if name != TEACHER]
    pairs: list[list[str]] = [students[i : i + 2] for i in range(0, len(students), 2)] or [[]]
    work = sum(batch.input_ids_BS.numel() for batch in batches)
    total = work * (1 + len(students)) + len(models) * len(prompting.prompts) * prompting.tokens
    found: dict[str, Scores] = {}
    sizes: dict[str, dict[str, int]] = {}
    with tempfile.TemporaryDirectory(prefix="kdscale-eval-") as folder, reporter.bar("evaluate", total) as bar:
        spool = Path(folder) / "teacher-hidden"
        with _loaded(TEACHER, models, settings) as teacher:
            teacher_head = checked_head(teacher, TEACHER).detached()
            shapes = _spool_hidden(teacher, batches, spool, settings.device, bar)
            sizes[TEACHER] = efficiency.sizes(teacher, models[TEACHER])
            _prompt(teacher, TEACHER, prompting, bar)
            del teacher
        for pair in pairs:
            parts: dict[str, list[TokenStats]] = {name: [] for name in (TEACHER, *pair)}
            with _load_pair(pair, models, settings) as loaded:
                heads = [checked_head(model, name) for name, model in loaded.items()]
                check_same_vocabulary([(TEACHER, teacher_head), *zip(pair, heads, strict=True)])
                hidden_of_teacher = _unspool_hidden(spool, shapes, teacher_head.weight_VH)
                for batch, teacher_NH in zip(batches, hidden_of_teacher, strict=True):
                    scored = [
                        (head, _valid_hidden(model, batch, settings.device))
                        for head, model in zip(heads, loaded.values(), strict=True)
                    ]
                    labels = batch.labels_BS[batch.labels_BS != IGNORED_LABEL].to(settings.device)
                    with torch.inference_mode():
                        own, theirs = token_stats(teacher_head, teacher_NH, scored, labels, settings.chunk_bytes)
                    for name, stats in zip((TEACHER, *pair), (own, *theirs), strict=True):
                        parts[name].append(stats)
                    bar.advance(batch.input_ids_BS.numel() * len(pair))
                for name in pair:
                    sizes[name] = efficiency.sizes(loaded[name], models[name])
                    _prompt(loaded[name], name, prompting, bar)
            found |= {n: _finite(n, Scores(TokenStats.concatenate(p), labels_N, cluster_N)) for n, p in parts.items()}
    return {name: found[name] for name in models}, {name: sizes[name] for name in models}


def _finite(name: str, scores: Scores) -> Scores:
    if not bool(torch.isfinite(scores.stats.ce_N).all()):
        raise CheckpointError(
            f"the {name} model gives a loss that is not finite",
            got=f"{int((~torch.isfinite(scores.stats.ce_N)).sum())} of {len(scores.labels_N)} tokens",
            hint="its weights hold NaN or Inf, or eval.dtype is too narrow for it: try --set eval.dtype=float32",
        )
    return scores


def _scored_tokens(batches: Sequence[EvalBatch]) -> tuple[np.ndarray, np.ndarray]:
    """Labels of all scored tokens and the running number of the document piece each belongs to, int64 [N] both.

    A piece is a run of one document within a sequence (positions restart at 0): the unit of the standard errors.
    """
    labels, clusters, first = [], [], 0
    for batch in batches:
        starts_BS = batch.position_ids_BS == 0
        starts_BS[:, 0] = True
        cluster_BS = (starts_BS.flatten().cumsum(0) - 1).view_as(starts_BS) + first
        first = int(cluster_BS.max()) + 1
        valid_BS = batch.labels_BS != IGNORED_LABEL
        labels.append(batch.labels_BS[valid_BS].numpy())
        clusters.append(cluster_BS[valid_BS].numpy())
    if not labels or not sum(map(len, labels)):
        raise DataError(
            "the held-out split has nothing to score",
            expected="at least one document of two tokens",
            hint="raise data.heldout_fraction or name data.heldout_sources",
        )
    return np.concatenate(labels), np.concatenate(clusters)


def _valid_hidden(model: PreTrainedModel, batch: EvalBatch, device: torch.device) -> Tensor:
    """Final hidden states of the scored positions only, [N of this batch, H]."""
    with torch.inference_mode():
        hidden_BSH = final_hidden(model, batch.input_ids_BS.to(device), batch.position_ids_BS.to(device))
    return hidden_BSH[(batch.labels_BS != IGNORED_LABEL).to(device)]


def _spool_hidden(
    model: PreTrainedModel, batches: Sequence[EvalBatch], path: Path, device: torch.device, bar: Bar
) -> list[int]:
    """Write what the teacher's head reads to `path`, batch after batch; returns the rows of each batch."""
    rows = []
    with explain_os_errors(path), path.open("wb") as stream:
        for batch in batches:
            hidden_NH = _valid_hidden(model, batch, device).cpu().contiguous()
            hidden_NH.view(torch.uint8).numpy().tofile(stream)
            rows.append(len(hidden_NH))
            bar.advance(batch.input_ids_BS.numel(), "teacher")
    return rows


def _unspool_hidden(path: Path, rows: Sequence[int], like_VH: Tensor) -> Iterator[Tensor]:
    hidden, dtype = like_VH.shape[1], like_VH.dtype
    with path.open("rb") as stream:
        for count in rows:
            raw = bytearray(stream.read(count * hidden * dtype.itemsize))
            # An empty buffer cannot be a tensor's storage.
            flat = torch.frombuffer(raw, dtype=dtype) if raw else torch.empty(0, dtype=dtype)
            yield flat.view(count, hidden).to(like_VH.device)


def _prompt(model: PreTrainedModel, name: str, prompting: Prompting, bar: Bar) -> None:
    if prompting.prompts:
        prompting.outputs[name] = continue_prompts(
            model,
            prompting.tokenizer,
            prompting.prompts,
            prompting.tokens,
            prompting.sampling,
            lambda made: bar.advance(made, "samples"),
        )


@contextmanager
def _loaded(name: str, models: Mapping[str, Path], settings: Settings) -> Iterator[PreTrainedModel]:
    with _load_pair([name], models, settings) as loaded:
        yield loaded.pop(name)


@contextmanager
def _load_pair(
    names: Sequence[str], models: Mapping[str, Path], settings: Settings
) -> Iterator[dict[str, PreTrainedModel]]:
    """Load up to two models; when the block ends their memory is given back before anything else is loaded."""
    loaded = {
        name: load_model(
            models[name],
            dtype=settings.dtype,
            device=settings.device,
            trust_remote_code=settings.trust_remote_code,
        )
        for name in names
    }
    try:
        yield loaded
    finally:
        loaded.clear()
        gc.collect()
        if settings.device.type == "cuda":
            torch.cuda.empty_cache()


def _describe(
    cfg: EvalConfig,
    settings: Settings,
    threads: int,
    batches: Sequence[EvalBatch],
    scores: Scores,
    text_bytes: int,
) -> dict[str, Any]:
    import transformers

    return {
        "split": "heldout",
        "tokens": len(scores.labels_N),
        "bytes": text_bytes,
        "document_pieces": len(np.unique(scores.cluster_N)),
        "sequences": sum(len(batch.input_ids_BS) for batch in batches),
        "seq_len": cfg.seq_len,
        "micro_batch": cfg.micro_batch,
        "dtype": str(settings.dtype).removeprefix("torch."),
        "device": settings.device.type,
        "device_name": efficiency.device_name(settings.device.type),
        "threads": threads,
        "sample_tokens": cfg.sample_tokens,
        "sample_temperature": cfg.sample_temperature,
        "sample_top_p": cfg.sample_top_p,
        "calibration_bins": CALIBRATION_BINS,
        "torch": str(torch.__version__),
        "transformers": transformers.__version__,
    }
