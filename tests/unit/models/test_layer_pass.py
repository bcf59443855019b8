"""A walk through layers: any source will do, and a kill costs one layer at most."""

from __future__ import annotations

import signal
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from kdscale.errors import Interrupted
from kdscale.models import layer_pass
from kdscale.models.hidden_states import IN_MEMORY, HiddenStates, Scratch
from kdscale.models.layer_pass import LayerPass, layer_progress
from kdscale.models.layer_stream import TokenBatch

DEPTH, WIDTH = 3, 4


class ToyLayer:
    """A layer is a matrix."""

    def __init__(self, index: int):
        self.index = index
        self.weight_DD = torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(index))

    def __call__(self, hidden_BSD: Tensor, position_ids_BS: Tensor) -> Tensor:
        return hidden_BSD @ self.weight_DD

    def release(self) -> None:
        del self.weight_DD


class ToySource:
    """No transformers, no files, no family: all that a LayerSource is."""

    depth, device = DEPTH, torch.device("cpu")

    def __init__(self) -> None:
        self.given: list[int] = []

    def embed(self, batches: Sequence[TokenBatch], scratch: Scratch) -> HiddenStates:
        states = HiddenStates(scratch, self.device)
        for batch in batches:
            states.append(torch.nn.functional.one_hot(batch.input_ids_BS, WIDTH).float())
        return states

    def layer(self, index: int) -> ToyLayer:
        self.given.append(index)
        return ToyLayer(index)


@pytest.fixture
def batches() -> list[TokenBatch]:
    generator = torch.Generator().manual_seed(1)
    ids = [torch.randint(0, WIDTH, (2, 5), generator=generator) for _ in range(3)]
    return [SimpleNamespace(input_ids_BS=ids_BS, position_ids_BS=torch.arange(5).expand(2, -1)) for ids_BS in ids]


def scored(source: ToySource, batches: list[TokenBatch], scratch: Scratch, until: int = DEPTH) -> LayerPass[ToyLayer]:
    """The norm of each layer's outputs, and their sum in `running`; stops like a kill before `until`."""
    walk = LayerPass(source, batches, scratch)
    for layer in walk.layers():
        if layer.index == until:
            break
        norms: list[Tensor] = []
        walk.run(layer, lambda _before, after_BSD, norms=norms: norms.append(after_BSD.norm()))
        walk.running["sum"] = walk.running.get("sum", torch.zeros(1)) + torch.stack(norms).sum()
        walk.finish({"norm": torch.stack(norms)})
    return walk


def test_any_source_of_layers_can_be_walked(batches: list[TokenBatch]) -> None:
    walk = scored(ToySource(), batches, IN_MEMORY)
    product_DD = torch.eye(WIDTH)
    for index in range(DEPTH):
        product_DD = product_DD @ ToyLayer(index).weight_DD
        expected = [product_DD[batch.input_ids_BS].norm() for batch in batches]
        torch.testing.assert_close(walk.results[index]["norm"], torch.stack(expected))
    torch.testing.assert_close(walk.states[2], product_DD[batches[2].input_ids_BS])


@pytest.mark.parametrize("layer", range(1, DEPTH))
@pytest.mark.parametrize("budget", [0, 1 << 20])
def test_a_killed_walk_goes_on_at_the_first_unfinished_layer(
    batches: list[TokenBatch], tmp_path: Path, layer: int, budget: int
) -> None:
    unbroken = scored(ToySource(), batches, IN_MEMORY)
    scored(ToySource(), batches, Scratch(tmp_path, budget), until=layer)
    source = ToySource()
    resumed = scored(source, batches, Scratch(tmp_path, budget))
    assert source.given == list(range(layer, DEPTH))
    assert [result["norm"].tolist() for result in resumed.results] == [r["norm"].tolist() for r in unbroken.results]
    assert torch.equal(resumed.running["sum"], unbroken.running["sum"])
    assert all(map(torch.equal, resumed.states, unbroken.states))
    resumed.close()
    assert not list(tmp_path.iterdir())


def test_saving_takes_a_tenth_of_the_time_at_most(
    batches: list[TokenBatch], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A save takes 1 s and a layer 4: after the first layer, and then after every third."""
    now = [0.0]
    real_layer, real_save = ToySource.layer, HiddenStates.save

    def layer(self: ToySource, index: int) -> ToyLayer:
        now[0] += 4.0
        return real_layer(self, index)

    def save(self: HiddenStates, path: Path) -> list[dict[str, object]]:
        now[0] += 1.0
        return real_save(self, path)

    monkeypatch.setattr(ToySource, "depth", 9)
    unbroken = scored(ToySource(), batches, IN_MEMORY, until=9)
    monkeypatch.setattr(layer_pass, "_CHEAP_BYTES", 0)
    monkeypatch.setattr(layer_pass.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(ToySource, "layer", layer)
    monkeypatch.setattr(HiddenStates, "save", save)
    scored(ToySource(), batches, Scratch(tmp_path), until=6)
    assert {item.name for item in tmp_path.glob("[ps]*-*")} == {"progress-4.json", "states-4.bin"}
    source = ToySource()
    resumed = scored(source, batches, Scratch(tmp_path), until=9)
    assert source.given == [4, 5, 6, 7, 8]
    assert [result["norm"].tolist() for result in resumed.results] == [r["norm"].tolist() for r in unbroken.results]
    assert torch.equal(resumed.running["sum"], unbroken.running["sum"])
    assert (tmp_path / "progress-8.json").exists()  # after 5, the first of this process


def test_a_signal_waits_for_a_save_where_there_are_layers_to_lose(
    batches: list[TokenBatch], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Layers 1 and 2 of 9 are finished, the first of them is saved; the signal comes in the third."""
    monkeypatch.setattr(ToySource, "depth", 9)
    monkeypatch.setattr(layer_pass, "_CHEAP_BYTES", 0)
    monkeypatch.setattr(layer_pass, "_WORK_PER_SAVE", 1e12)
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        walk, caught = LayerPass(ToySource(), batches, Scratch(tmp_path)), False
        try:
            for layer in walk.layers():
                if layer.index == 2:
                    signal.raise_signal(signal.SIGTERM)
                walk.run(layer)
                walk.finish()
        except Interrupted as stop:
            caught = str(stop) == "stopped by SIGTERM after layer 3, which is saved"
        assert caught
        assert signal.getsignal(signal.SIGTERM) is signal.default_int_handler
        assert LayerPass(ToySource(), batches, Scratch(tmp_path)).done == 3
        walk = LayerPass(ToySource(), batches, Scratch(tmp_path))
        with pytest.raises(KeyboardInterrupt):  # the handler from before: nothing is lost
            for _ in walk.layers():
                signal.raise_signal(signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, before)


def test_progress_counts_each_batch_in_each_layer(batches: list[TokenBatch]) -> None:
    amounts: list[tuple[float, str]] = []
    bar = SimpleNamespace(advance=lambda amount, note: amounts.append((amount, note)))
    walk = LayerPass(ToySource(), batches, advance=layer_progress(bar, DEPTH))  # type: ignore[arg-type]
    for layer in walk.layers():
        walk.run(layer)
        walk.finish()
    assert sum(amount for amount, _ in amounts) == pytest.approx(30)
    assert amounts[-1] == (10 / DEPTH, "layer 3/3")
