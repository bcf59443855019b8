"""From one value per token to the figures of a table, with standard errors over documents. Sums are fp64.

Letters: N scored tokens, D document pieces (a run of one document in one sequence).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from kdscale.data.batches import Batch
from kdscale.data.packing import IGNORED_LABEL
from kdscale.eval.token_stats import TokenStats
from kdscale.runs.models import DISTILLED, TEACHER, before_learning

CALIBRATION_BINS = 15
MOST_TAGS = 12  # that are shown one by one

Each = TypeVar("Each")
Figures = TypeVar("Figures")


@dataclass(frozen=True)
class Scores:
    """All scored tokens of one model."""

    stats: TokenStats
    labels_N: np.ndarray
    cluster_N: np.ndarray  # running number of the document piece of each token


def summarise(scores: Scores, text_bytes: int) -> dict[str, Any]:
    """All quality figures of one model. `text_bytes`: UTF-8 bytes of the text that the scored tokens stand for."""
    stats = scores.stats
    ce_N = _double(stats.ce_N)
    ce, ce_error = mean_and_error(ce_N, scores.cluster_N)
    figures: dict[str, Any] = {
        "ce": ce,
        "ce_standard_error": ce_error,
        "perplexity": math.exp(ce),
        # First order: d exp(x) = exp(x) dx.
        "perplexity_standard_error": None if ce_error is None else math.exp(ce) * ce_error,
        "bits_per_byte": bits_per_byte(ce_N, text_bytes),
        "top1_accuracy": float(_double(stats.correct_N).mean()),
        "expected_calibration_error": calibration_error(stats),
        "kl_to_teacher": None,
        "kl_to_teacher_standard_error": None,
        "top1_agreement": None,
        "top1_agreement_standard_error": None,
        "acceptance": None,
        "acceptance_standard_error": None,
    }
    compared = {"kl_to_teacher": stats.kl_N, "top1_agreement": stats.agrees_N, "acceptance": stats.overlap_N}
    for key, values in compared.items():
        if values is not None:
            figures[key], figures[f"{key}_standard_error"] = mean_and_error(_double(values), scores.cluster_N)
    return figures


def headline(result: Mapping[str, Any]) -> dict[str, str]:
    """What the terminal shows: perplexities, what encoders keep and tell, and how much of the gap was closed."""
    out = {}
    for name, model in result["models"].items():
        quality = model["quality"]
        if quality["perplexity"] is not None:
            out[f"{name} perplexity"] = f"{quality['perplexity']:,.2f}"
        if "similarity_kept" in quality:
            out[f"{name} similarity kept"] = f"{quality['similarity_kept']:.3f}"
        for key, title in (("class_accuracy", "accuracy"), ("class_agreement", "class as the teacher's")):
            if quality.get(key) is not None:
                out[f"{name} {title}"] = f"{quality[key]:.1%}"
    if result["gap_closed"] is not None:
        out["gap closed"] = f"{result['gap_closed']:.0%}"
    return out


def scored_tags(batches: Sequence[Batch]) -> np.ndarray:
    """The number of each scored token's tag, batch after batch, [N]."""
    return np.concatenate([batch.tags_BS[batch.labels_BS != IGNORED_LABEL].numpy() for batch in batches])


def perplexity_by_tag(scores: Scores, tags_N: np.ndarray, tags: Sequence[str]) -> dict[str, float]:
    """Perplexity of the tokens of each tag, for the tags with the most tokens; empty where all have one.

    `tags_N` has the index into `tags` of each token's source.
    """
    counts = np.bincount(tags_N, minlength=len(tags))
    if np.count_nonzero(counts) < 2:
        return {}
    means = np.bincount(tags_N, _double(scores.stats.ce_N), len(tags)) / np.maximum(counts, 1)
    shown = np.argsort(-counts, kind="stable")[: min(MOST_TAGS, np.count_nonzero(counts))]
    return {tags[tag]: math.exp(means[tag]) for tag in shown}


def compare(scores: Mapping[str, Scores]) -> dict[str, dict[str, float | None]]:
    """Differences of the figures between every two models, later minus earlier, with paired standard errors.

    Both models scored the same tokens, so their difference is known far better than either figure.
    """
    return of_every_two(scores, _differences)


def of_every_two(each: Mapping[str, Each], difference: Callable[[Each, Each], Figures]) -> dict[str, Figures]:
    """`difference(later, earlier)` of every two models, by `later_minus_earlier`."""
    names = list(each)
    pairs = [(late, early) for i, late in enumerate(names) for early in names[:i]]
    return {f"{late}_minus_{early}": difference(each[late], each[early]) for late, early in pairs}


def _differences(late: Scores, early: Scores) -> dict[str, float | None]:
    values = {
        "ce": (late.stats.ce_N, early.stats.ce_N),
        "top1_accuracy": (late.stats.correct_N, early.stats.correct_N),
        "kl_to_teacher": (late.stats.kl_N, early.stats.kl_N),
        "top1_agreement": (late.stats.agrees_N, early.stats.agrees_N),
        "acceptance": (late.stats.overlap_N, early.stats.overlap_N),
    }
    out: dict[str, float | None] = {}
    for key, (late_N, early_N) in values.items():
        if late_N is not None and early_N is not None:
            gap_N = _double(late_N) - _double(early_N)
            out[key], out[f"{key}_standard_error"] = mean_and_error(gap_N, late.cluster_N)
    key = "expected_calibration_error"
    out[key], out[f"{key}_standard_error"] = _calibration_difference(late, early)
    return out


def _calibration_difference(late: Scores, early: Scores) -> tuple[float, float | None]:
    """Difference of the calibration errors, and its standard error by the jackknife over document pieces.

    Source: Efron and Tibshirani, An Introduction to the Bootstrap, §11.5. A calibration error is Σ_b |S_b| / N, where
    S_b is the sum of (correct − confidence) over the tokens of bin b.
    """
    _, number_N = np.unique(late.cluster_N, return_inverse=True)
    count_D = np.bincount(number_N)
    gaps, without_D = [], np.zeros(len(count_D))
    for sign, stats in ((1, late.stats), (-1, early.stats)):
        confidence_N = _double(stats.confidence_N)
        bin_N = np.clip(np.ceil(confidence_N * CALIBRATION_BINS), 1, CALIBRATION_BINS).astype(np.int64) - 1
        sum_DB = np.bincount(
            number_N * CALIBRATION_BINS + bin_N,
            weights=_double(stats.correct_N) - confidence_N,
            minlength=len(count_D) * CALIBRATION_BINS,
        ).reshape(-1, CALIBRATION_BINS)
        sum_B = sum_DB.sum(0)
        gaps.append(sign * float(np.abs(sum_B).sum()) / len(number_N))
        if len(count_D) > 1:
            without_D += sign * np.abs(sum_B - sum_DB).sum(1) / (len(number_N) - count_D)
    if len(count_D) < 2:
        return sum(gaps), None
    spread = float(np.square(without_D - without_D.mean()).sum())
    return sum(gaps), math.sqrt(spread * (len(count_D) - 1) / len(count_D))


def gap_closed(ce: Mapping[str, float]) -> float | None:
    """How much of the loss to the teacher distillation won back; None without all three models or without a loss."""
    before = before_learning(ce)
    if before is None or not {TEACHER, DISTILLED} <= set(ce) or ce[before] <= ce[TEACHER]:
        return None
    return (ce[before] - ce[DISTILLED]) / (ce[before] - ce[TEACHER])


def mean_and_error(value_N: np.ndarray, cluster_N: np.ndarray) -> tuple[float, float | None]:
    """Mean over tokens, and its standard error over document pieces (None when there is only one).

    The mean is a ratio Σ_d s_d / Σ_d n_d of sums over documents, so its error is the ratio estimator's
    (Cochran, Sampling Techniques, 3rd ed., §6.4): √(D/(D−1) · Σ_d (s_d − mean·n_d)²) / N.
    """
    mean = float(value_N.mean())
    _, number_N = np.unique(cluster_N, return_inverse=True)
    sum_D, count_D = np.bincount(number_N, weights=value_N), np.bincount(number_N)
    documents = len(count_D)
    if documents < 2:
        return mean, None
    spread = float(np.square(sum_D - mean * count_D).sum()) * documents / (documents - 1)
    return mean, math.sqrt(spread) / len(value_N)


def bits_per_byte(ce_N: np.ndarray, text_bytes: int) -> float | None:
    """Σ nats / (ln 2 · UTF-8 bytes); None where the tokens stand for no text at all."""
    return float(ce_N.sum()) / (math.log(2) * text_bytes) if text_bytes else None


def calibration_error(stats: TokenStats, bins: int = CALIBRATION_BINS) -> float:
    """Expected calibration error of the most likely token: Σ_b n_b/N · |accuracy_b − confidence_b|, equal-width bins.

    Source: Guo et al. 2017, arXiv 1706.04599, section 2. Computed as the binary metric on (confidence, correct): the
    multi-class metric of torchmetrics would keep N×V probabilities.
    """
    from torchmetrics.functional.classification import binary_calibration_error

    error = binary_calibration_error(stats.confidence_N.double(), stats.correct_N.long(), n_bins=bins, norm="l1")
    return float(error)


def _double(values: Any) -> np.ndarray:
    return values.double().numpy()
