"""What counts as a spike of the loss, and which documents are named."""

from __future__ import annotations

import math

import torch

from kdscale.config.telemetry import SpikeConfig
from kdscale.distill.telemetry.spikes import SpikeDetector, name_documents


def losses(steps: int) -> list[float]:
    """A falling curve with seeded noise."""
    noise = torch.randn(steps, generator=torch.Generator().manual_seed(0)) * 0.05
    return [3.0 * math.exp(-i / 200) + 1.0 + float(noise[i]) for i in range(steps)]


def test_noise_and_progress_are_no_spikes():
    detector = SpikeDetector(SpikeConfig())
    assert not any(detector.look(loss) for loss in losses(400))


def test_a_spike_is_seen_and_does_not_hide_the_next():
    detector = SpikeDetector(SpikeConfig())
    found = [detector.look(loss + (2.0 if i in (100, 101, 150) else 0.0)) for i, loss in enumerate(losses(200))]
    assert [i for i, spike in enumerate(found) if spike] == [100, 101, 150]
    assert found[100].limit < found[100].loss


def test_a_resumed_detector_sees_what_an_unbroken_one_does():
    curve = losses(120)
    curve[110] += 2.0
    whole, cut = SpikeDetector(SpikeConfig()), SpikeDetector(SpikeConfig(), curve[:90])
    unbroken = [whole.look(loss) for loss in curve]
    assert [cut.look(loss) for loss in curve[90:]] == unbroken[90:]
    assert unbroken[110] is not None


def test_the_first_losses_infinite_ones_and_a_switched_off_detector_say_nothing():
    detector = SpikeDetector(SpikeConfig(after=4), [1.0, 1.0])
    assert [detector.look(loss) for loss in (1.0, math.nan, math.inf)] == [None] * 3
    assert detector.look(90.0) is None  # only three are known before it
    assert SpikeDetector(SpikeConfig(after=4), [1.0] * 4).look(90.0)
    off = SpikeDetector(SpikeConfig(enabled=False), [1.0] * 64)
    assert off.look(90.0) is None


def test_documents_of_the_worst_micro_batch_come_first():
    def row(loss, documents):
        return {"loss": loss, "sequences": [{"documents": documents, "sources": ["web"] * len(documents)}]}

    assert name_documents([row(1.0, [4, 5]), row(9.0, [7, 4])]) == "7 (web), 4 (web), 5 (web)"
    assert name_documents([row(9.0, [4]), row(None, [8])]).startswith("8 (web)")
    assert name_documents([row(1.0, list(range(30)))]).endswith("11 (web) and 18 more")
