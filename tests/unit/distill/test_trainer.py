"""The order in which a step is written down."""

from __future__ import annotations

from types import SimpleNamespace

from kdscale.distill.trainer import Trainer


def test_the_log_reaches_the_disk_before_the_checkpoint_that_a_resume_cuts_it_to() -> None:
    order: list[str] = []
    trainer = object.__new__(Trainer)
    vars(trainer).update(
        observer=SimpleNamespace(sync=lambda: order.append("log")),
        saver=SimpleNamespace(save=lambda step, state, wait: order.append(f"checkpoint {step}")),
        guard=SimpleNamespace(state=dict),
        _validation_due=False,
    )
    trainer._save(SimpleNamespace(step=3, to_json=dict), wait=False)
    assert order == ["log", "checkpoint 3"]
