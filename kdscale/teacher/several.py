"""Several teachers: each has a source of its own, and every row learns from those that teach its source of text.

What a row learns is the mixture Σ w·p_i of its teachers. For the forward KL divergence KL(Σ w·p_i ‖ q) and Σ w·KL(p_i ‖
q) differ by a constant and have the same gradient, so no mixture is formed: each teacher's targets stay apart, and
distill/objectives/base.py adds the losses up. Other divergences are refused by the config where a row has more teachers
than one.

N rows of a micro-batch, L tags.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace

import torch
from torch import nn

from kdscale.config.distill.targets import Needs
from kdscale.config.distill.teachers import TeacherEntry, shares
from kdscale.errors import ConfigError
from kdscale.teacher.folders import teacher_folders
from kdscale.teacher.source import (
    LabelChoice,
    LabelledText,
    MicroBatch,
    OpenedSource,
    SourceRequest,
    TargetSource,
    open_source,
)
from kdscale.teacher.targets import Targets, TeacherPart
from kdscale.teacher.vocabulary.across import AcrossTokenizers, across_tokenizers, has_other_tokens
from kdscale.teacher.vocabulary.mapped import Alignment
from kdscale_kernels.types import IGNORE_INDEX


@dataclass(frozen=True)
class Colleague:
    """One of several teachers: its source, and its share of a row of each tag.

    `always_asked`: its forward is one that all ranks make together, whether or not a rank has rows for it.
    """

    source: TargetSource
    shares_L: torch.Tensor
    always_asked: bool = False

    def taught(self, batch: MicroBatch) -> torch.Tensor:
        """Which of the batch's rows it teaches: their numbers, on the CPU as the tags are."""
        assert batch.tags_N is not None
        return self.shares_L[batch.tags_N].nonzero().squeeze(1)

    def question(self, batch: MicroBatch, taught: torch.Tensor) -> MicroBatch | None:
        """The batch with the rows that it teaches; None where there are none, and it need not be asked."""
        if not len(taught) and not self.always_asked:
            return None
        return batch if len(taught) == batch.rows else batch.part(taught)

    def parts(self, batch: MicroBatch) -> list[TeacherPart]:
        """Its targets of the rows that it teaches; apart, where its share is not the same of all."""
        taught, parts = self.taught(batch), []
        question = self.question(batch, taught)
        if question is None:
            return []
        targets = self.source.targets(question)
        assert batch.tags_N is not None
        shares = self.shares_L[batch.tags_N[taught]]
        for share in shares.unique().tolist():
            own = (shares == share).nonzero().squeeze(1)
            rows = None if len(own) == batch.rows else taught[own]
            parts.append(TeacherPart(share, rows, targets if len(own) == len(taught) else targets.part(own)))
        return parts


class SeveralTeachers:
    """A source of targets that asks several; their rows and shares are found on the CPU, without waiting for a GPU."""

    def __init__(self, colleagues: Mapping[str, Colleague], gives: Needs):
        self._colleagues, self.gives = dict(colleagues), gives
        # a teacher's name may have a dot, which a module's may not; the number keeps two such names apart
        self.model = nn.ModuleDict(
            {
                f"{number}_{name.replace('.', '_')}": one.source.model
                for number, (name, one) in enumerate(colleagues.items())
            }
        )

    def prefetch(self, batch: MicroBatch) -> None:
        """Tell each teacher what it will be asked."""
        for one in self._colleagues.values():
            if (question := one.question(batch, one.taught(batch))) is not None:
                one.source.prefetch(question)

    def targets(self, batch: MicroBatch) -> Targets:
        """The targets of every teacher, for the rows that it teaches."""
        parts = [part for one in self._colleagues.values() for part in one.parts(batch)]
        return Targets(rows=batch.rows, teachers=tuple(parts))

    @property
    def across(self) -> bool:
        """Whether any of them has another tokenizer."""
        return any(isinstance(one.source, AcrossTokenizers) for one in self._colleagues.values())

    def alignments(self, batch: MicroBatch) -> dict[str, Alignment]:
        """Of each teacher with another tokenizer, by name: how much of what it says the student has tokens for."""
        found = {}
        for name, one in self._colleagues.items():
            question = one.question(batch, one.taught(batch))
            if isinstance(one.source, AcrossTokenizers):
                found[name] = Alignment() if question is None else one.source.alignment(question)
        return found

    def close(self) -> None:
        """Close all sources, whatever becomes of one."""
        with ExitStack() as stack:
            for one in self._colleagues.values():
                stack.callback(one.source.close)


def check_tags(teachers: Sequence[TeacherEntry], tags: Sequence[str]) -> None:
    """Raises ConfigError when text with one of the `tags` has no teacher, or a teacher names a tag that is not there.

    A run with its own teacher alone has none in `teachers`, and no tags matter.
    """
    unknown = sorted({tag for entry in teachers for tag in entry.tags} - set(tags))
    untaught = [tag for tag in tags if not shares(teachers, tag)]
    problems = [f"no text has the tag {', '.join(unknown)}"] if unknown else []
    problems += [f"no teacher teaches {', '.join(untaught)}"] if untaught else []
    if teachers and problems:
        raise ConfigError(
            "distill.teachers: tags",
            expected=f"a teacher for each tag of the text: {', '.join(tags)}",
            got="; ".join(problems),
            hint="a teacher without tags teaches all that no other one names",
        )


def open_several(request: SourceRequest) -> OpenedSource:
    """Open the source of each entry of distill.teachers. A collective call."""
    distill = request.cfg.distill
    folders, opened, always_asked = teacher_folders(request.cfg, request.teacher_dir), {}, {}
    alignments = {entry.name: entry.alignment for entry in distill.teachers}
    for name, settings in distill.by_teacher().items():
        own = request.cfg.model_copy(update={"distill": settings})
        of_teacher = replace(request, cfg=own, teacher_dir=folders[name])
        opened[name] = open_source(of_teacher)
        if has_other_tokens(settings, folders[name], request):
            opened[name] = across_tokenizers(opened[name], of_teacher, alignments[name])
        elif request.needs.unmatched:
            raise ConfigError(
                f"distill.teachers ({name}): an objective compares tokens that only one of two tokenizers has",
                expected="a teacher with another tokenizer, in the ranks or served",
                got="one with the student's tokens",
                hint="leave the objective uld out, or this teacher",
            )
        gathers = settings.teacher_placement == "partitioned" or settings.sequence_parallel > 1
        always_asked[name] = settings.source.in_process and gathers

    def start(vocab_size: int) -> SeveralTeachers:
        colleagues = {}
        for name, one in opened.items():
            shares_L = torch.tensor([shares(distill.teachers, tag).get(name, 0.0) for tag in request.tags])
            colleagues[name] = Colleague(one.start(vocab_size), shares_L, always_asked[name])
            if missing := request.needs.missing_from(colleagues[name].source.gives):
                raise ConfigError(f"distill.teachers ({name})", expected=f"a source that gives {missing}")
        return SeveralTeachers(colleagues, request.needs)

    rows = [one.rows for one in opened.values() if one.rows is not None]
    average = next((one.average for one in opened.values() if one.average is not None), None)
    choices = {name: one.choose_labels for name, one in opened.items() if one.choose_labels is not None}
    choose = labels_of_all(distill.teachers, request.tags, choices) if choices else None
    return OpenedSource(min(rows, default=None), start, choose, average)


def labels_of_all(
    teachers: Sequence[TeacherEntry], tags: Sequence[str], choices: Mapping[str, LabelChoice]
) -> LabelChoice:
    """The labels of which every teacher has targets that teaches text of their tag."""
    taught_L = {name: torch.tensor([bool(shares(teachers, tag).get(name)) for tag in tags]) for name in choices}

    def choose(text: LabelledText, keys: Sequence[tuple[str, int]]) -> torch.Tensor:
        labels_BS = text.labels_BS
        for name, choice in choices.items():
            untold_BS = choice(text, keys) == IGNORE_INDEX
            labels_BS = labels_BS.masked_fill(untold_BS & taught_L[name][text.tags_BS], IGNORE_INDEX)
        return labels_BS

    return choose
