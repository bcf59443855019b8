"""The teacher and any students on the same held-out tokens: quality, size, speed and samples in one JSON file.

Letters: B sequences of a batch, S their length, N scored tokens, H hidden size, V vocabulary.

The teacher runs once. The hidden states that its head reads are written to disk and compared with every student's, so
that no more than two students are in memory at a time. Ranks share the batches and the prompts; the figures are those
of one rank. Definitions of all figures: docs/reference/figures.md.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from kdscale.config.evaluation.settings import EvalConfig
from kdscale.config.root import RuntimeConfig
from kdscale.data.batches import Batch
from kdscale.data.heldout import eval_batches
from kdscale.data.packing import IGNORED_LABEL
from kdscale.data.token_store import TokenStore
from kdscale.errors import CheckpointError, ConfigError
from kdscale.eval.draft.measure import measure_drafts
from kdscale.eval.samples import Sampling, continue_prompts, prompt_tokens
from kdscale.eval.scored_positions import ScoredHidden, scored_hidden, scored_tokens
from kdscale.eval.sizes import model_sizes
from kdscale.eval.speed.measure import left_out, measure
from kdscale.eval.summary import (
    CALIBRATION_BINS,
    Scores,
    compare,
    gap_closed,
    perplexity_by_tag,
    scored_tags,
    summarise,
)
from kdscale.eval.token_stats import CHUNK_BYTES, TokenStats, checked_head, of_same_tokens, token_stats
from kdscale.files import write_json
from kdscale.models.head import OutputHead
from kdscale.models.loading import load_model, load_tokenizer
from kdscale.runs.models import TEACHER
from kdscale.runtime.device import device_name, release_memory, resolve_device, resolve_dtype, set_threads
from kdscale.runtime.progress import Bar, Reporter
from kdscale.runtime.ranks import gather, gather_rows, place_in_group

if TYPE_CHECKING:
    from collections.abc import Iterator

    from transformers import PreTrainedModel

SCHEMA_VERSION = 1


@dataclass(frozen=True)
class ScoringOptions:
    """How models are loaded and scored."""

    device: torch.device
    dtype: torch.dtype
    trust_remote_code: bool = False
    chunk_bytes: int = CHUNK_BYTES


@dataclass
class SampleTexts:
    """The prompts that every model continues while it is loaded, and in `outputs` what each has written."""

    prompts: Sequence[str] = ()
    tokens: int = 0
    tokenizer: Any = None
    sampling: Sampling = field(default_factory=Sampling)
    outputs: dict[str, list[str]] = field(default_factory=dict)
    prefix_ids: Sequence[int] = ()  # before each prompt, as before each document

    @property
    def share(self) -> Sequence[str]:
        """The prompts that this rank's models continue."""
        rank, ranks = place_in_group()
        return self.prompts[rank::ranks]

    def gather(self) -> None:
        """Put what all ranks have written into `outputs`, in the order of the prompts. A collective call."""
        by_rank = gather(self.outputs)
        for name in self.outputs:
            self.outputs[name] = [by_rank[i % len(by_rank)][name][i // len(by_rank)] for i in range(len(self.prompts))]


def evaluate(
    models: Mapping[str, Path],
    data_dir: Path,
    cfg: EvalConfig,
    runtime: RuntimeConfig,
    out_path: Path | None,
    reporter: Reporter,
    *,
    device: torch.device | None = None,
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """Measure `models` ("teacher" and any students, in the order to show) and write `out_path`; returns what it wrote.

    `device`: this rank's, where several ranks share the work; one of them has an `out_path`, the others return {}.
    Raises ConfigError without a teacher, DataError when nothing is held out, and CheckpointError for models that do not
    load or cannot be compared.
    """
    if TEACHER not in models:
        raise ConfigError(
            "the models to evaluate", expected="one named teacher, to compare with", got=", ".join(models)
        )
    started = time.monotonic()
    threads = set_threads(runtime.threads, place_in_group()[1])
    device = device or resolve_device(runtime.device)
    options = ScoringOptions(device, resolve_dtype(cfg.dtype, device), trust_remote_code)
    split = TokenStore.open(data_dir).split("heldout")
    batches = eval_batches(split, cfg.seq_len, cfg.micro_batch, cfg.tokens)
    tokenizer = load_tokenizer(models[TEACHER], trust_remote_code)
    sampling = Sampling(cfg.sample_temperature, cfg.sample_top_p)
    samples = SampleTexts(cfg.prompts, cfg.sample_tokens, tokenizer, sampling, prefix_ids=split.prefix_ids)

    scores, sizes = score_models(models, batches, options, reporter, samples)
    if out_path is None:
        return {}
    text_bytes = sum(batch.text_bytes for batch in batches)
    tags_N = scored_tags(batches)
    measured: dict[str, dict[str, Any]] = {
        name: {
            "path": str(models[name]),
            "quality": summarise(score, text_bytes),
            "by_source": perplexity_by_tag(score, tags_N, split.tags),
            "size": sizes[name],
        }
        for name, score in scores.items()
    }
    quality_seconds = time.monotonic() - started
    if cfg.efficiency:
        speeds = measure(
            models, cfg, device=device.type, threads=set_threads(runtime.threads), reporter=reporter,
            trust_remote_code=trust_remote_code,
        )  # fmt: skip
        for name, figures in speeds.items():
            measured[name]["efficiency"] = figures
        for name, reason in left_out(models).items():
            measured[name]["efficiency_left_out"] = reason
    if cfg.draft is not None:
        prompts = [torch.tensor([prompt_tokens(tokenizer, prompt, split.prefix_ids)]) for prompt in cfg.prompts]
        of_drafts = measure_drafts(
            models, scores, prompts, cfg.draft, reporter, device=device, dtype=options.dtype,
            trust_remote_code=trust_remote_code,
        )  # fmt: skip
        for name, figures in of_drafts.items():
            measured[name]["draft"] = figures
    result = {
        "schema_version": SCHEMA_VERSION,
        "settings": _describe(cfg, options, threads, batches, scores[TEACHER], text_bytes),
        "models": measured,
        "differences": compare(scores),
        "gap_closed": gap_closed({name: figures["quality"]["ce"] for name, figures in measured.items()}),
        "samples": [
            {"prompt": prompt, "outputs": {name: texts[i] for name, texts in samples.outputs.items()}}
            for i, prompt in enumerate(cfg.prompts)
        ],
        "seconds": {"quality_and_samples": quality_seconds, "total": time.monotonic() - started},
    }
    write_json(out_path, result)
    return result


def score_models(
    models: Mapping[str, Path],
    batches: Sequence[Batch],
    options: ScoringOptions,
    reporter: Reporter,
    samples: SampleTexts | None = None,
) -> tuple[dict[str, Scores], dict[str, dict[str, int]]]:
    """Per-token statistics and size of each model, in the order of `models`. Students are scored two at a time.

    Several ranks share `batches` and the prompts, and each gets everything.
    Raises CheckpointError for a model whose loss is not finite or whose vocabulary differs from the teacher's by more
    than padding.
    """
    samples = samples or SampleTexts()
    labels_N, cluster_N = scored_tokens(batches)
    students = [name for name in models if name != TEACHER]
    rank, ranks = place_in_group()
    share = batches[rank::ranks]
    positions = sum(batch.input_ids_BS.numel() for batch in share)
    total = positions * (1 + len(students)) + len(models) * len(samples.share) * samples.tokens
    scores: dict[str, Scores] = {}
    sizes: dict[str, dict[str, int]] = {}

    def tokens() -> int:
        return max(load_tokenizer(models[TEACHER], options.trust_remote_code).get_vocab().values()) + 1

    with tempfile.TemporaryDirectory(prefix="kdscale-eval-") as folder, reporter.bar("evaluate", total) as bar:
        with _loaded([TEACHER], models, options) as loaded:
            teacher = loaded.pop(TEACHER)
            head = checked_head(teacher, TEACHER).detached()
            hidden_states = ScoredHidden.write(teacher, share, Path(folder) / "teacher-hidden", options.device, bar)
            sizes[TEACHER] = model_sizes(teacher, models[TEACHER])
            _continue_prompts(teacher, TEACHER, samples, bar)
            del teacher
        for pair in [students[i : i + 2] for i in range(0, len(students), 2)] or [[]]:
            with _loaded(pair, models, options) as loaded:
                of_share = _score_pair(loaded, (head, hidden_states), share, options, tokens, bar)
                stats = {name: _of_all_ranks(parts, batches, name != TEACHER) for name, parts in of_share.items()}
                scores |= {name: _checked(name, Scores(value, labels_N, cluster_N)) for name, value in stats.items()}
                for name in pair:  # not before the check: no text can be drawn from logits that are not finite
                    sizes[name] = model_sizes(loaded[name], models[name])
                    _continue_prompts(loaded[name], name, samples, bar)
    samples.gather()
    return {name: scores[name] for name in models}, {name: sizes[name] for name in models}


def _score_pair(
    students: Mapping[str, PreTrainedModel],
    teacher: tuple[OutputHead, ScoredHidden],
    batches: Sequence[Batch],
    options: ScoringOptions,
    tokens: Callable[[], int],
    bar: Bar,
) -> dict[str, list[TokenStats]]:
    """Statistics of the scored tokens, batch after batch, of the teacher and of each loaded student.

    `tokens`: how many the tokenizer has; asked for where heads differ in their padding.
    """
    teacher_head, teacher_hidden = teacher
    own_heads = {name: checked_head(model, name) for name, model in students.items()}
    whole = {TEACHER: teacher_head, **own_heads}
    teacher_head, *heads = of_same_tokens(whole, tokens)
    by_batch: dict[str, list[TokenStats]] = {name: [] for name in (TEACHER, *students)}
    for batch, teacher_NH in zip(batches, teacher_hidden.read(teacher_head.weight_VH), strict=True):
        student_hidden = [
            (head, scored_hidden(model, batch, options.device))
            for head, model in zip(heads, students.values(), strict=True)
        ]
        labels_N = batch.labels_BS[batch.labels_BS != IGNORED_LABEL].to(options.device)
        with torch.inference_mode():
            of_teacher, of_students = token_stats(
                teacher_head, teacher_NH, student_hidden, labels_N, options.chunk_bytes
            )
        for name, stats in zip(by_batch, (of_teacher, *of_students), strict=True):
            by_batch[name].append(stats)
        bar.advance(batch.input_ids_BS.numel() * len(students))
    return by_batch


def _of_all_ranks(share: Sequence[TokenStats], batches: Sequence[Batch], compared: bool) -> TokenStats:
    """The statistics of all `batches` in order; this rank's are `share`, `compared` with the teacher or its own.

    A collective call.
    """
    _, ranks = place_in_group()
    if ranks == 1:
        return TokenStats.concatenate(share)
    rows = [stats.as_columns(compared) for stats in share] or [TokenStats.no_columns(compared)]
    tokens = [int((batch.labels_BS != IGNORED_LABEL).sum()) for batch in batches]
    by_rank = [rows.split(tokens[number::ranks]) for number, rows in enumerate(gather_rows(torch.cat(rows)))]
    return TokenStats.from_columns(torch.cat([by_rank[i % ranks][i // ranks] for i in range(len(batches))]))


def _checked(name: str, scores: Scores) -> Scores:
    """The scores, if every loss is finite."""
    if not bool(torch.isfinite(scores.stats.ce_N).all()):
        raise CheckpointError(
            f"the {name} model gives a loss that is not finite",
            got=f"{int((~torch.isfinite(scores.stats.ce_N)).sum())} of {len(scores.labels_N)} tokens",
            hint="its weights hold NaN or Inf, or eval.dtype is too narrow for it: try --set eval.dtype=float32",
        )
    return scores


def _continue_prompts(model: PreTrainedModel, name: str, samples: SampleTexts, bar: Bar) -> None:
    if samples.prompts:
        samples.outputs[name] = continue_prompts(
            model,
            samples.tokenizer,
            samples.share,
            samples.tokens,
            samples.sampling,
            lambda tokens: bar.advance(tokens, "samples"),
            samples.prefix_ids,
        )


@contextmanager
def _loaded(
    names: Sequence[str], models: Mapping[str, Path], options: ScoringOptions
) -> Iterator[dict[str, PreTrainedModel]]:
    """Load up to two models; when the block ends their memory is free before anything else is loaded."""
    loaded = {
        name: load_model(
            models[name], dtype=options.dtype, device=options.device, trust_remote_code=options.trust_remote_code
        )
        for name in names
    }
    try:
        yield loaded
    finally:
        loaded.clear()
        release_memory()


def _describe(
    cfg: EvalConfig, options: ScoringOptions, threads: int, batches: Sequence[Batch], scores: Scores, text_bytes: int
) -> dict[str, Any]:
    """What a reader needs to judge or repeat the figures."""
    import transformers

    return {
        "split": "heldout",
        "tokens": len(scores.labels_N),
        "bytes": text_bytes,
        "document_pieces": len(np.unique(scores.cluster_N)),
        "sequences": sum(len(batch.input_ids_BS) for batch in batches),
        "seq_len": cfg.seq_len,
        "micro_batch": cfg.micro_batch,
        "dtype": str(options.dtype).removeprefix("torch."),
        "device": options.device.type,
        "device_name": device_name(options.device.type),
        "threads": threads,
        "sample_tokens": cfg.sample_tokens,
        "sample_temperature": cfg.sample_temperature,
        "sample_top_p": cfg.sample_top_p,
        "calibration_bins": CALIBRATION_BINS,
        "torch": str(torch.__version__),
        "transformers": transformers.__version__,
    }
