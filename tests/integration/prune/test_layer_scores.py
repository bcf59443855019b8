"""Scores of whole layers are those of whole-model computations, and every method writes a checked student."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from kdscale.config.criteria import methods
from kdscale.config.prune import ImportanceConfig, PruneConfig
from kdscale.models.hidden_states import Scratch
from kdscale.models.layer_stream import LayerStream
from kdscale.models.loading import load_model
from kdscale.prune import self_check
from kdscale.prune.importance import collect, layer_removal
from kdscale.prune.importance.layer_scores import next_tokens
from kdscale.runtime.progress import Reporter

CPU = torch.device("cpu")


def _model(teacher):
    return load_model(teacher.checkpoint.path, dtype=torch.float32, device=CPU)


def _loss(model, batches) -> float:
    total, count = 0.0, 0
    for batch in batches:
        with torch.inference_mode():
            logits = model(
                input_ids=batch.input_ids_BS, position_ids=batch.position_ids_BS, use_cache=False
            ).logits.double()
        labels = next_tokens(batch)
        total += float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum"))
        count += int((labels >= 0).sum())
    return total / count


def test_labels_stay_inside_a_document(teacher):
    batch = teacher.batches[0]
    labels = next_tokens(batch)
    assert (labels[:, [19, 47]] == -100).all()
    assert torch.equal(labels[:, 20:47], batch.input_ids_BS[:, 21:48])


def test_streamed_losses_are_those_of_the_model_without_each_layer(teacher, tmp_path):
    got = teacher.scores(tmp_path / "s", layers=2, layer_method="loss")["layers.loss"]
    whole, removed = _loss(_model(teacher), teacher.batches), []
    for layer in range(len(got)):
        model = _model(teacher)
        del model.model.layers[layer]
        removed.append(_loss(model, teacher.batches) - whole)
    expected = np.array(removed) - min(0.0, *removed)
    assert expected.max() > 1e-2  # or any score would do
    np.testing.assert_allclose(got, expected, atol=2e-5)


def test_angles_are_those_of_the_whole_model(teacher, tmp_path):
    got = teacher.scores(tmp_path / "s", layers=2, layer_method="angular")["layers.angular"]
    states: list[list[torch.Tensor]] = []
    for batch in teacher.batches:
        seen: list[torch.Tensor] = []
        model = _model(teacher)
        for layer in model.model.layers:
            layer.register_forward_pre_hook(lambda _m, args, into=seen: into.append(args[0]))
        model.model.norm.register_forward_pre_hook(lambda _m, args, into=seen: into.append(args[0]))
        with torch.inference_mode():
            model(input_ids=batch.input_ids_BS, position_ids=batch.position_ids_BS, use_cache=False)
        states.append(seen)
    layers = len(got)
    for start in range(layers):
        for end in range(layers + 1):
            cosine = torch.cat(
                [torch.nn.functional.cosine_similarity(s[start], s[end], dim=-1).flatten() for s in states]
            )
            expected = float((cosine.clamp(-1, 1).arccos() / torch.pi).mean()) if end > start else 0.0
            assert got[start, end] == pytest.approx(expected, abs=1e-5)


def _divergence(teacher, dropped) -> float:
    """KL of the model without layers from the whole one, over all tokens, by whole models in fp64."""
    log_p, log_q = [], []
    for into, gone in ((log_p, []), (log_q, dropped)):
        model = load_model(teacher.checkpoint.path, dtype=torch.float64, device=CPU)
        kept = [layer for index, layer in enumerate(model.model.layers) if index not in gone]
        model.model.layers = torch.nn.ModuleList(kept)
        model.config.num_hidden_layers = len(kept)
        for batch in teacher.batches:
            with torch.inference_mode():
                logits = model(input_ids=batch.input_ids_BS, position_ids=batch.position_ids_BS, use_cache=False).logits
            into.append(logits.log_softmax(-1).flatten(0, 1))
    p, q = torch.cat(log_p), torch.cat(log_q)
    return float((p.exp() * (p - q)).sum(-1).mean())


def test_layers_go_one_by_one_in_the_order_of_whole_models(teacher, tmp_path):
    layers = teacher.family.dims(teacher.config).layers
    got = teacher.scores(tmp_path / "s", layers=layers - 3, layer_method="one_by_one")["layers.one_by_one"]
    dropped: list[int] = []
    for _ in range(3):
        tried = {layer: _divergence(teacher, [*dropped, layer]) for layer in range(layers) if layer not in dropped}
        dropped.append(min(tried, key=tried.get))
        assert got[dropped[-1]] == pytest.approx(tried[dropped[-1]], rel=1e-3)
    assert np.argsort(got)[:3].tolist() == dropped


def test_later_rounds_try_the_cheapest_alone(teacher, tmp_path, monkeypatch):
    monkeypatch.setattr(layer_removal, "_TRIED", 2)
    asked: list[list[int]] = []
    spied = layer_removal._round

    def spy(stream, batches, kept, tried, *rest):
        asked.append(list(tried))
        found.append(spied(stream, batches, kept, tried, *rest))
        return found[-1]

    found: list[dict[int, float]] = []
    monkeypatch.setattr(layer_removal, "_round", spy)
    scores = teacher.scores(tmp_path / "s", layers=2, layer_method="one_by_one")["layers.one_by_one"]
    first = sorted(found[0], key=found[0].get)
    assert asked == [sorted(first), sorted(first[1:3])]
    assert np.argsort(scores)[0] == first[0] and np.argsort(scores)[1] in first[1:3]
    assert len(np.unique(scores)) == len(scores)


def test_only_the_layer_tokens_are_used(teacher, tmp_path):
    def score(batches, tokens):
        return collect.score_teacher(
            teacher.checkpoint, teacher.family, batches, ImportanceConfig(dtype="float32", layer_tokens=tokens),
            PruneConfig(layers=2, layer_method="angular"), None, CPU, Reporter(quiet=True),
        )["layers.angular"]  # fmt: skip

    first = score(teacher.batches[:1], 10_000)
    assert np.array_equal(score(teacher.batches, 100), first)
    assert not np.array_equal(score(teacher.batches, 10_000), first)


def test_a_killed_round_goes_on(teacher, tmp_path, monkeypatch):
    expected = teacher.scores(tmp_path / "whole", layers=2)["layers.one_by_one"]
    scratch, read = Scratch(tmp_path / "scratch", 30_000), LayerStream.layer
    layers, calls = teacher.family.dims(teacher.config).layers, 0

    def run(die_at: int):
        nonlocal calls
        calls = 0

        def spy(self, index):
            nonlocal calls
            calls += 1
            if calls == die_at:
                raise KeyboardInterrupt
            return read(self, index)

        monkeypatch.setattr(LayerStream, "layer", spy)
        return collect.score_teacher(
            teacher.checkpoint, teacher.family, teacher.batches, ImportanceConfig(dtype="float32"),
            PruneConfig(layers=2), None, CPU, Reporter(quiet=True), scratch,
        )["layers.one_by_one"]  # fmt: skip

    with pytest.raises(KeyboardInterrupt):
        run(2)  # in the first round
    with pytest.raises(KeyboardInterrupt):
        run(layers + 1)  # in the second one
    assert np.array_equal(run(-1), expected)
    assert calls < layers - 1 + layers  # the first round was not run again
    assert not any(scratch.folder.iterdir())


@pytest.mark.parametrize("method", ["loss", "angular"])
def test_a_killed_pass_over_layers_goes_on(teacher, tmp_path, monkeypatch, method):
    prune = {"layers": 2, "layer_method": method}
    expected = teacher.scores(tmp_path / "whole", **prune)
    scratch, read = Scratch(tmp_path / "scratch", 30_000), LayerStream.layer
    calls: list[int] = []

    def run(die_at: int):
        calls.clear()

        def spy(self, index):
            calls.append(index)
            if len(calls) == die_at:
                raise KeyboardInterrupt
            return read(self, index)

        monkeypatch.setattr(LayerStream, "layer", spy)
        return collect.score_teacher(
            teacher.checkpoint, teacher.family, teacher.batches, ImportanceConfig(dtype="float32"),
            PruneConfig(**prune), None, CPU, Reporter(quiet=True), scratch,
        )  # fmt: skip

    layers = teacher.family.dims(teacher.config).layers
    with pytest.raises(KeyboardInterrupt):
        run(3)  # inside the pass over copies
    with pytest.raises(KeyboardInterrupt):
        run(layers)  # inside the pass after it
    assert calls[0] == 2
    scores = run(-1)
    assert calls == list(range(calls[0], layers)) and calls[0] > 0  # the first pass is not run again
    assert all(np.array_equal(scores[name], expected[name]) for name in expected)
    assert not any(scratch.folder.iterdir())


@pytest.mark.parametrize("repair", ["none", "linear"])
@pytest.mark.parametrize("method", methods("layers"))
def test_every_method_writes_a_checked_student(teacher, tmp_path, method, repair):
    plan = teacher.prune(tmp_path / "out", layers=2, layer_method=method, layer_repair=repair)
    assert plan.methods.layers == method
    assert plan.methods.layer_repair == repair
    self_check.self_check(teacher.checkpoint, teacher.family, plan, tmp_path / "out", teacher.ids)
