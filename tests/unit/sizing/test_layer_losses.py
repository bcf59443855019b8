"""Operations and bytes of losses on layers, beside what the objectives do."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from kdscale.config.distill.layer_objectives import AttentionConfig, HiddenStatesConfig
from kdscale.config.distill.objective import ModelPair
from kdscale.config.distill.objectives import TokenDivergenceConfig
from kdscale.distill.objectives import attention
from kdscale.distill.objectives.base import StudentOutput
from kdscale.models.attention import AttentionRows
from kdscale.models.attention_backends import AttentionKind
from kdscale.models.head import OutputHead
from kdscale.sizing.layer_losses import NO_LAYERS, LayerLosses
from kdscale.sizing.model_shape import ModelShape
from kdscale.teacher.source import MicroBatch
from kdscale.teacher.targets import Targets
from tests.unit.sizing.test_flops import LLAMA

STUDENT = ModelShape.of_config({**LLAMA, "hidden_size": 48, "num_attention_heads": 4, "head_dim": 8})
TEACHER = ModelShape.of_config(LLAMA)
HIDDEN = HiddenStatesConfig(layers={0: 0, 2: 2})
MAPS = AttentionConfig(layers={2: 2}, compare=("query", "value", "map"))
TOKENS = 40


def output(**layers):
    return StudentOutput(torch.empty(0, 1), OutputHead(torch.empty(1, 1)), 1, **layers)


def run(entry):
    """Operations of forward and backward, and the bytes that the forward keeps, of one objective on TOKENS tokens."""
    pair = ModelPair(3, 3, 64, 48, (64, 32, 32, 16))
    objective = entry.settled(pair, 10).build(pair)
    rows = torch.arange(TOKENS)
    batch = MicroBatch(rows[None], rows[None], rows, rows)
    if isinstance(entry, HiddenStatesConfig):
        student = output(layers_NH={layer: torch.randn(TOKENS, 48, requires_grad=True) for layer in entry.layers})
        targets = Targets(rows=TOKENS, hidden_NG={layer: torch.randn(TOKENS, 64) for layer in (0, 2)})
        targets_bytes = sum(part.nbytes for part in targets.hidden_NG.values())
    else:
        read = {
            size: [torch.randn(TOKENS, heads, size, requires_grad=size == 8) for heads in (4, 2, 2)] for size in (8, 16)
        }
        own, other = (AttentionRows(*parts, AttentionKind(size**-0.5)) for size, parts in read.items())
        student, targets = output(attention={2: own}), Targets(rows=TOKENS, attention={2: other})
        targets_bytes = sum(part.nbytes for part in read[16])
    with FlopCounterMode(display=False) as flops:
        loss, _ = objective(student, targets, batch)
        kept = saved_bytes(loss)
        loss.backward()
    return flops.get_total_flops(), kept, targets_bytes


def saved_bytes(loss):
    """Of the arrays with a row for every token that wait for the backward."""
    nodes, saved = [loss.grad_fn], {}
    while nodes:
        node = nodes.pop()
        values = [getattr(node, name) for name in dir(node) if name.startswith("_saved_")]
        for value in [*values, *getattr(node, "saved_tensors", ())]:
            if isinstance(value, torch.Tensor) and value.ndim > 1 and len(value) % TOKENS == 0:
                saved[value.untyped_storage().data_ptr()] = value.nbytes
        nodes += [before for before, _ in node.next_functions if before is not None]
    return sum(saved.values())


@pytest.mark.parametrize("entry", [HIDDEN, MAPS], ids=lambda entry: entry.name)
def test_bytes_and_operations_are_those_of_the_objective(entry, monkeypatch):
    """Blocks multiply pairs that no query sees: with one query a block there are none."""
    monkeypatch.setattr(attention, "_MOST_QUERIES", 1)
    losses = LayerLosses.of([TokenDivergenceConfig(), entry], STUDENT)
    flops, kept, targets = run(entry)
    assert losses.flops(STUDENT, TEACHER).forward(TOKENS, TOKENS, [TOKENS]) == flops
    assert TOKENS * losses.teacher_bytes(TEACHER, 4) == targets
    assert TOKENS * losses.student_bytes(STUDENT, TEACHER, 4) == kept


def test_pairs_that_are_chosen_later_are_counted():
    entries = [HiddenStatesConfig(pairs=8), AttentionConfig()]
    assert LayerLosses.of(entries, STUDENT) == LayerLosses(3, 1, ("query", "key", "value"))
    assert LayerLosses.of([TokenDivergenceConfig()], STUDENT) == NO_LAYERS
    assert NO_LAYERS.flops(STUDENT, TEACHER).forward(9, 9, [9]) == 0.0
