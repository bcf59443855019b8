"""What is found out about teachers on held-out text before the first step, said, and refused where it is too bad."""

from __future__ import annotations

import dataclasses

import torch

from kdscale.config.distill.settings import EIGHT_BITS
from kdscale.config.root import Config
from kdscale.data.heldout import eval_batches
from kdscale.data.token_store import TokenStore
from kdscale.distill.load_models import Folders
from kdscale.distill.step import to_device
from kdscale.errors import ConfigError
from kdscale.files import write_json
from kdscale.runs.folder import ALIGNMENT
from kdscale.runtime.progress import Reporter
from kdscale.runtime.ranks import is_main
from kdscale.teacher.placement.eight_bits import rounding_error
from kdscale.teacher.several import SeveralTeachers
from kdscale.teacher.source import MicroBatch, TargetSource
from kdscale.teacher.vocabulary.mapped import Alignment

_LENGTH, _FEW, _MORE = 512, 256, 2048  # tokens: of a sequence at most, and of a sample


def compare_teachers(
    cfg: Config, folders: Folders, source: TargetSource, device: torch.device, reporter: Reporter
) -> None:
    """Say what 8 bits change of a teacher, and how much of one with another tokenizer is understood.

    All ranks read the same text: a collective call. Raises ConfigError where too little is understood.
    """
    if (dtype := cfg.distill.teacher_dtype) in EIGHT_BITS:
        sample = _samples(cfg, folders, device, _FEW)[0]
        reporter.say(rounding_error(folders.teacher, dtype, source.model, sample).in_words())
    if not isinstance(source, SeveralTeachers) or not source.across:
        return
    found: dict[str, Alignment] = {}
    for sample in _samples(cfg, folders, device, _MORE):
        for name, alignment in source.alignments(sample).items():
            found[name] = found.get(name, Alignment()) + alignment
    for name, alignment in found.items():
        reporter.say(f"teacher {name}, with another tokenizer: {alignment.in_words()}")
    if is_main():
        told = {name: {**dataclasses.asdict(one), "in_words": one.in_words()} for name, one in found.items()}
        write_json(folders.run / ALIGNMENT.path, told)
    _check(cfg, found)


def _check(cfg: Config, found: dict[str, Alignment]) -> None:
    """Raise ConfigError for a teacher that is aligned less than its limits."""
    for entry in cfg.distill.teachers:
        alignment, limits = found.get(entry.name), entry.alignment
        if alignment is None or not alignment.labels:  # it teaches none of this text
            continue
        for field, share, least in (
            ("min_same_tokens", alignment.same_share, limits.min_same_tokens),
            ("min_same_probability", alignment.exact_share, limits.min_same_probability),
        ):
            if share < least:
                raise ConfigError(
                    f"distill.teachers ({entry.name}): alignment.{field}", expected=f"at least {least:.0%}",
                    got=f"{share:.1%} of held-out text",
                    hint="choose a teacher whose tokenizer is nearer, or lower the limit if that is enough for you",
                )  # fmt: skip


def _samples(cfg: Config, folders: Folders, device: torch.device, tokens: int) -> list[MicroBatch]:
    held_out = TokenStore.open(folders.data).split("heldout")
    batches = eval_batches(held_out, min(cfg.distill.seq_len, _LENGTH), 1, tokens)
    return [to_device(batch, device) for batch in batches]
