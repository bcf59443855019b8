"""All measures on all models of a run: what each model says, kept by (measure, model), and the figures made of it.

One model is in memory at a time. Ranks share the items. An answer on the disk is never asked for again.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from kdscale.config.evaluation.bias import BiasConfig, GeneratingConfig, MeasureConfig
from kdscale.errors import FileError
from kdscale.eval.bias.asking import Scorer, write_texts
from kdscale.eval.bias.changes import headline, summarise, verdict_line
from kdscale.eval.bias.items import Item, Likelihood, cluster_of, drawn
from kdscale.eval.bias.measures import MEASURES, values_of
from kdscale.eval.bias.scoring import Judge, make_judge
from kdscale.files import read_own_json, write_json, write_text
from kdscale.models.loading import load_model
from kdscale.runs.folder import BIAS_FILE
from kdscale.runs.models import TEACHER
from kdscale.runtime.device import release_memory, resolve_dtype
from kdscale.runtime.progress import Bar, Reporter
from kdscale.runtime.ranks import gather, is_writer, on_main, place_in_group, unequal_work

SCHEMA_VERSION = 1
_TOKENS_A_MESSAGE = 1 << 21  # of texts: as JSON far below what one rank may send another
_MAX_ANSWERS_BYTES = 1 << 32  # of a model to a measure: 25 texts to each of 100,000 prompts are some 300 MB
Answers = list[Any]  # of each item: [total, tokens] of each choice, or the texts that the model wrote


@dataclass(frozen=True)
class Task:
    """What is measured, in which order, and where the answers are kept."""

    settings: BiasConfig
    seed: int
    work: Path
    items: Mapping[str, list[Item]] = field(default_factory=dict)

    @classmethod
    def read(cls, settings: BiasConfig, seed: int, work: Path) -> Task:
        """Read the items of every measure. Raises DataError."""
        items = {
            entry.key: drawn(MEASURES[entry.name].read(entry), settings.limit, seed) for entry in settings.measures
        }
        return cls(settings, seed, work, items)

    def answers(self, entry: MeasureConfig, model: str) -> Path:
        """The file of what a model says to a measure."""
        return self.work / "answers" / entry.key / f"{model}.json"

    def kept(self, entry: MeasureConfig, model: str) -> Answers | None:
        """What a model said to a measure; None where it has not been asked, or the file is damaged."""
        count = len(self.items[entry.key])
        answers: Answers | None = read_own_json(
            self.answers(entry, model), lambda value: isinstance(value, list) and len(value) == count,
            limit=_MAX_ANSWERS_BYTES,
        )  # fmt: skip
        return answers


def ask_models(
    models: Mapping[str, Path], task: Task, tokenizer: Any, reporter: Reporter, *, device: torch.device,
    trust_remote_code: bool = False,
) -> None:  # fmt: skip
    """Ask every model what it has not been asked yet; rank 0 keeps the answers. A collective call.

    Raises CheckpointError for a model that does not load or whose loss is not finite, DataError for an item that it
    cannot read.
    """
    entries = {entry.key: entry for entry in task.settings.measures}
    missing: list[list[str]] = on_main(
        lambda: [[name, key] for name in models for key, entry in entries.items() if task.kept(entry, name) is None]
    )
    total = sum(len(task.items[key]) for _, key in missing)
    dtype = resolve_dtype(task.settings.dtype, device)
    _, ranks = place_in_group()
    with reporter.bar("measure bias", total / ranks, "item") as bar:
        for name, path in models.items():
            own = [entries[key] for model, key in missing if model == name]
            if not own:
                continue
            model: Any = load_model(path, dtype=dtype, device=device, trust_remote_code=trust_remote_code)
            for entry in own:
                answers = _ask(model, name, tokenizer, task, entry, bar)
                if is_writer():
                    write_json(task.answers(entry, name), answers)
            del model
            release_memory()


def _ask(model: Any, name: str, tokenizer: Any, task: Task, entry: MeasureConfig, bar: Bar) -> Answers:
    """What the model says to all items, on every rank. A collective call."""
    items = task.items[entry.key]
    rank, ranks = place_in_group()

    def done(count: int) -> None:
        bar.advance(count, f"{name}, {entry.key}")

    if isinstance(entry, GeneratingConfig):
        with unequal_work():
            texts = write_texts(model, tokenizer, items, entry, task.seed, rank=rank, ranks=ranks, done=done)
        return _of_all_ranks(
            texts, len(items), max(1, _TOKENS_A_MESSAGE // (entry.sampling.n * entry.sampling.max_tokens))
        )
    with unequal_work():
        own_scores = Scorer(model, name, tokenizer, task.settings.micro_batch)(items[rank::ranks], done)
    scores = gather(own_scores)
    return [scores[at % ranks][at // ranks] for at in range(len(items))]


def _of_all_ranks(texts: Mapping[int, list[str]], items: int, a_message: int) -> Answers:
    """The texts of all items, on every rank, from each rank's own; `a_message`: of how many items one may tell."""
    own, found = sorted(texts), dict[int, list[str]]()
    for start in range(0, items, a_message):  # all ranks send equally many, some of them empty
        part = {at: texts[at] for at in own[start : start + a_message]}
        found |= {int(at): told for of_rank in gather(part) for at, told in of_rank.items()}
    return [found[at] for at in range(items)]


def summarise_all(models: Sequence[str], task: Task, reporter: Reporter, out: Path) -> dict[str, Any]:
    """Write bias.json and the file of items of each measure into `out`; returns what bias.json holds.

    Asks the scorer. Raises FileError where answers are missing, and what an endpoint's failures are.
    """
    results: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        "settings": {
            "limit": task.settings.limit, "seed": task.seed, "dtype": task.settings.dtype,
            "kept_within": task.settings.kept_within,
        },
        "models": list(models),
        "measures": {
            entry.key: _measured(models, task, entry, reporter, out / "items" / f"{entry.key}.jsonl")
            for entry in task.settings.measures
        },
    }  # fmt: skip
    write_json(out / BIAS_FILE, results)
    return results


def _measured(
    models: Sequence[str], task: Task, entry: MeasureConfig, reporter: Reporter, file: Path
) -> dict[str, Any]:  # fmt: skip
    measure, items = MEASURES[entry.name], task.items[entry.key]
    judge = make_judge(entry, task.work / "scores", reporter) if isinstance(entry, GeneratingConfig) else None
    answers = {name: _kept(task, entry, name) for name in models}
    said = {name: _judged(own, judge) for name, own in answers.items()}
    rows = {
        name: [measure.row(item, scores, entry) for item, scores in zip(items, own, strict=True)]
        for name, own in said.items()
    }
    _write_items(file, items, rows, answers if judge else {})
    summary = summarise(
        measure, {name: values_of(measure, own) for name, own in rows.items()}, [item.group for item in items],
        [cluster_of(item) for item in items], kept_within=task.settings.kept_within, seed=task.seed,
    )  # fmt: skip
    chosen = headline(measure, summary["all"])
    figure = next((one for one in measure.figures if one.name == chosen), measure.figures[0])
    return {
        "measure": measure.name, "title": measure.title, "paper": measure.paper, "decision": measure.decision,
        "headline": figure.name, "note": measure.note(items),
        "figures": {one.name: {"title": one.title, "ideal": one.ideal, "range": one.range} for one in measure.figures},
        "verdicts": {
            name: verdict_line(summary["all"], figure, TEACHER, name) for name in summary["all"]["changes"]
        },
        **summary,
    }  # fmt: skip


def _kept(task: Task, entry: MeasureConfig, model: str) -> Answers:
    answers = task.kept(entry, model)
    if answers is None:
        raise FileError(f"{task.answers(entry, model)} is missing", hint="run the same command again")
    return answers


def _judged(answers: Answers, judge: Judge | None) -> list[list[Any]]:
    """What `row` of a measure takes: likelihoods of the choices, or what the judge says of each text."""
    if judge is None:
        return [[Likelihood(total, tokens) for total, tokens in choices] for choices in answers]
    verdicts = iter(judge([text for texts in answers for text in texts]))
    return [[next(verdicts) for _ in texts] for texts in answers]


def _write_items(
    file: Path, items: Sequence[Item], rows: Mapping[str, Sequence[Mapping[str, float]]], texts: Mapping[str, Answers]
) -> None:
    """One line an item: where it is, its group, and each model's columns (and texts, where it wrote some)."""
    lines = []
    for at, item in enumerate(items):
        models = {
            name: {**own[at], **({"texts": texts[name][at]} if name in texts else {})} for name, own in rows.items()
        }
        lines.append(json.dumps({"item": item.where, "group": item.group, "models": models}, ensure_ascii=False))
    write_text(file, "\n".join(lines) + "\n")
