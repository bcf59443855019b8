"""Checkpoints of one rank, saved without an engine."""

from __future__ import annotations

import torch

from kdscale.distill.checkpoint import folder as checkpoint_folder
from kdscale.distill.checkpoint import rank_files, saver
from kdscale.models.parameter_map import ParameterRange

FINGERPRINT = {"seed": 1, "distill": {"seq_len": 8}}


class Values:
    """Stands in for ZeroState: one parameter of 30 values, all of them `step`."""

    quantities = rank_files.QUANTITIES

    def __init__(self):
        self.shapes, self.tied, self.helpers, self.adam_step = {"w": (5, 6)}, {"head": "w"}, [], 7
        self.ranges, self.value = [ParameterRange("w", 0, 20), ParameterRange("w", 20, 10)], 0.0

    def blocks(self):
        for _ in self.quantities:
            for span in self.ranges:
                yield torch.full((span.length,), self.value)


def make_saver(folder, keep=5, **rules):
    values = Values()
    return values, saver.Saver(
        folder, values, {"fingerprint": FINGERPRINT}, saver.SavePolicy(keep, **rules), torch.device("cpu")
    )


def save(folder, *steps, **rules):
    values, made = make_saver(folder, **rules)
    for step in steps:
        values.value = float(step)
        made.save(step, {"state": {"step": step}}, wait=True)
    return checkpoint_folder.step_dir(folder, steps[-1])


def sealed_names(folder):
    return [path.name for path in checkpoint_folder.sealed_checkpoints(folder)]
