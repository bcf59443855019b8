"""How well models tell the classes of held-out texts: against the texts' own classes, and against the teacher.

N texts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from kdscale.data.batches import Batch
from kdscale.data.store_format import UNKNOWN_CLASS
from kdscale.eval.quality import ScoringOptions, score_models
from kdscale.eval.scored_positions import scored_tokens
from kdscale.eval.summary import Scores, mean_and_error, of_every_two
from kdscale.runs.models import TEACHER
from kdscale.runtime.progress import Reporter


def tell_classes(
    models: Mapping[str, Path], batches: Sequence[Batch], options: ScoringOptions, reporter: Reporter
) -> tuple[dict[str, dict[str, Any]], dict[str, dict[str, Any]], dict[str, dict[str, Any]]]:
    """(figures of each model, sizes of each, differences between every two of them), of batches of classes.

    `class_accuracy`: the share of the texts of a known class that the model puts there, None where none is known.
    `class_agreement`: the share of all texts that it puts where the teacher does. `class_kl`: the mean divergence of
    its distribution from the teacher's, in nats. Standard errors are over texts. A collective call.
    """
    known_N = scored_tokens(batches)[0] != UNKNOWN_CLASS
    # any class stands for one that is not known: what it scores is left out
    scored = [replace(batch, labels_BS=batch.labels_BS.where(batch.labels_BS != UNKNOWN_CLASS, 0)) for batch in batches]
    scores, sizes = score_models(models, scored, options, reporter)
    each = {name: _values(score, known_N) for name, score in scores.items()}
    figures = {name: _means(values) for name, values in each.items()}
    figures[TEACHER] |= {"texts": len(known_N), "texts_of_known_class": int(known_N.sum())}
    return figures, dict(sizes), of_every_two(each, lambda late, early: _means(_gaps(late, early)))


Values = dict[str, np.ndarray | None]


def _values(scores: Scores, known_N: np.ndarray) -> Values:
    """One number for each text that a figure is over."""
    stats, correct_N = scores.stats, scores.stats.correct_N.double().numpy()
    return {
        "class_accuracy": correct_N[known_N] if known_N.any() else None,
        "class_agreement": None if stats.agrees_N is None else stats.agrees_N.double().numpy(),
        "class_kl": None if stats.kl_N is None else stats.kl_N.double().numpy(),
    }


def _gaps(late: Values, early: Values) -> Values:
    """The same of the differences between two models, text by text."""
    return {key: None if (one := late[key]) is None or (other := early[key]) is None else one - other for key in late}


def _means(values: Values) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, each in values.items():
        out[key], out[f"{key}_standard_error"] = (
            (None, None) if each is None else mean_and_error(each, np.arange(len(each)))
        )
    return out
