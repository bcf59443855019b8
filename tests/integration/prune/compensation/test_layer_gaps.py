"""The repair of the gaps that dropped layers leave: what a linear map can give is repaired."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from kdscale.config.prune import PruneConfig
from kdscale.errors import ConfigError
from kdscale.models.hidden_states import Scratch
from kdscale.models.layer_stream import LayerStream
from kdscale.models.loading import load_model
from kdscale.prune import self_check
from kdscale.prune.apply import apply_plan
from kdscale.prune.compensation import layer_gaps
from kdscale.prune.compensation.layer_gaps import find_gaps, repaired_gaps
from kdscale.prune.search.planning import make_plan
from kdscale.prune.slicing import Slicer
from kdscale.runtime.progress import Reporter

CPU = torch.device("cpu")


def _model(teacher):
    return load_model(teacher.checkpoint.path, dtype=torch.float32, device=CPU)


def _joined(batches):
    return SimpleNamespace(
        input_ids_BS=torch.cat([batch.input_ids_BS for batch in batches]),
        position_ids_BS=torch.cat([batch.position_ids_BS for batch in batches]),
    )


def test_a_block_that_a_linear_map_can_give_is_mended_exactly(teacher, tmp_path):
    """Layers 1 and 2 take away 0.7 of what layer 0's MLP added, so 0.3 of its down projection gives what is left."""
    folder = tmp_path / "teacher"
    model = _model(teacher)
    with torch.no_grad():
        for layer in (1, 2):
            model.model.layers[layer].self_attn.o_proj.weight.zero_()
            model.model.layers[layer].mlp.down_proj.weight.zero_()
    model.save_pretrained(folder)
    silent = type(teacher)(folder)
    silent.batches, read = teacher.batches, LayerStream.layer
    layers = silent.family.dims(silent.config).layers
    cfg = PruneConfig(layers=layers - 2, layer_method="last", layer_repair="linear")
    plan = make_plan(silent.config, silent.family, None, cfg)
    assert plan.kept.layers == [0, *range(3, layers)]
    seen: dict[str, torch.Tensor] = {}

    def linear(self, index):
        layer = read(self, index)
        if index == 0:
            layer.site("mlp.down_proj").register_forward_hook(lambda _m, _a, out: seen.update(y=out))
        if index == 1:
            layer.module.register_forward_hook(lambda _m, _a, out: out - 0.7 * seen["y"])
        return layer

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LayerStream, "layer", linear)
        batches = [_joined(silent.batches)]  # one batch, so that `seen` is of the batch that layer 1 is given
        mended = repaired_gaps(
            LayerStream(silent.config, silent.family, silent.checkpoint.tensor, dtype=torch.float32, device=CPU),
            Slicer(silent.config, silent.family, plan), batches, PruneConfig(layers=2, ridge_lambda=1e-6),
            silent.checkpoint, Reporter(quiet=True),
        )  # fmt: skip
    whole = silent.checkpoint.tensor("model.layers.0.mlp.down_proj.weight").float()
    read_by_down = mended.get(0)["down"] - 0.3 * whole
    assert float(read_by_down.norm() / whole.norm()) < 1e-3
    assert mended.get(1) == {}


@pytest.mark.parametrize("compensate", ["two_stream", "ridge"])
def test_repair_goes_with_a_width_cut_and_with_kills(teacher, tmp_path, monkeypatch, compensate):
    prune = {"layers": 2, "ffn": 64, "heads": 4, "compensate": compensate, "layer_repair": "linear"}
    cfg, scratch = PruneConfig(**prune), Scratch(tmp_path / "scratch", 30_000)
    plan = make_plan(teacher.config, teacher.family, teacher.scores(tmp_path / "s", **prune), cfg)
    read = LayerStream.layer

    def run(out, scratch, die_at):
        calls: list[int] = []

        def spy(self, index):
            calls.append(index)
            if len(calls) == die_at:
                raise KeyboardInterrupt
            return read(self, index)

        monkeypatch.setattr(LayerStream, "layer", spy)
        silent = Reporter(quiet=True)
        apply_plan(
            teacher.checkpoint, teacher.family, plan, out, cfg, batches=teacher.batches, reporter=silent,
            scratch=scratch,
        )  # fmt: skip
        return calls

    whole = run(tmp_path / "whole", Scratch(), -1)
    depth = find_gaps(plan)[-1].last + 1
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "out", scratch, depth)  # in the repair's last layer
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "out", scratch, 3)  # in the compensation
    assert len(run(tmp_path / "out", scratch, -1)) < len(whole) - depth + 1
    monkeypatch.undo()
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "whole"))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert not list((tmp_path / "scratch").glob("gaps"))
    self_check.self_check(teacher.checkpoint, teacher.family, plan, tmp_path / "out", teacher.ids)


def test_repair_brings_the_student_closer_on_its_calibration_text(teacher, tmp_path):
    whole = _model(teacher)
    distance = {}
    for repair in ("none", "linear"):
        teacher.prune(tmp_path / repair, layers=2, layer_method="angular", layer_repair=repair, compensate="none")
        student = load_model(tmp_path / repair, dtype=torch.float32, device=CPU)
        batch = teacher.batches[0]
        with torch.inference_mode():
            ours, theirs = (
                m.model(input_ids=batch.input_ids_BS, position_ids=batch.position_ids_BS).last_hidden_state
                for m in (student, whole)
            )
        distance[repair] = float((ours - theirs).norm() / theirs.norm())
    assert distance["linear"] < 0.97 * distance["none"]  # random layers: little of them is linear


@pytest.fixture(scope="module")
def normed_teacher(teacher_class, tmp_path_factory):
    """Gemma 2: a norm behind each sublayer."""
    from transformers import Gemma2Config, Gemma2ForCausalLM

    torch.manual_seed(1)
    config = Gemma2Config(
        hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
        head_dim=8, vocab_size=320, max_position_embeddings=128, query_pre_attn_scalar=8, initializer_range=0.1,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("gemma")
    Gemma2ForCausalLM(config).save_pretrained(folder)
    return teacher_class(folder)


@pytest.mark.parametrize("compensate", ["none", "two_stream", "ridge"])
def test_a_gap_behind_a_norm_is_mended(normed_teacher, tmp_path, compensate):
    whole, distance = _model(normed_teacher), {}
    for repair in ("none", "linear"):
        out = tmp_path / repair
        cuts = {"layers": 2, "layer_method": "angular", "compensate": compensate, "ffn": 32}
        plan = normed_teacher.prune(out, **cuts, layer_repair=repair)
        self_check.self_check(normed_teacher.checkpoint, normed_teacher.family, plan, out, normed_teacher.ids)
        student, batch = load_model(out, dtype=torch.float32, device=CPU), normed_teacher.batches[0]
        with torch.inference_mode():
            ours, theirs = (
                m.model(input_ids=batch.input_ids_BS, position_ids=batch.position_ids_BS).last_hidden_state
                for m in (student, whole)
            )
        distance[repair] = float((ours - theirs).norm() / theirs.norm())
    assert distance["linear"] < 0.95 * distance["none"]


def test_a_factor_on_what_layers_add_is_taken_into_account(tmp_path, teacher_class):
    """Layers 1 and 2 add nothing, so what is in front of them stays as it is."""
    from transformers import GraniteConfig, GraniteForCausalLM

    torch.manual_seed(1)
    config = GraniteConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=320, max_position_embeddings=128, residual_multiplier=0.2, initializer_range=0.1,
    )  # fmt: skip
    model = GraniteForCausalLM(config)
    with torch.no_grad():
        for layer in (1, 2):
            model.model.layers[layer].self_attn.o_proj.weight.zero_()
            model.model.layers[layer].mlp.down_proj.weight.zero_()
    model.save_pretrained(tmp_path / "granite")
    teacher = teacher_class(tmp_path / "granite")
    plan = teacher.prune(tmp_path / "out", layers=2, layer_method="last", layer_repair="linear")
    assert plan.kept.layers == [0, 3]
    before, after = (
        load_file(folder / "model.safetensors")["model.layers.0.mlp.down_proj.weight"]
        for folder in (tmp_path / "granite", tmp_path / "out")
    )
    assert torch.allclose(before, after, atol=2e-3 * float(before.std()))
    assert not torch.equal(before, after)


def test_layers_that_do_more_than_add_are_refused(teacher, tmp_path, monkeypatch):
    monkeypatch.setattr(layer_gaps, "only_adds_sublayers", lambda *_: False)
    with pytest.raises(ConfigError, match=r"prune\.layer_repair"):
        teacher.prune(tmp_path / "out", layers=2, layer_repair="linear")


def test_dense_models_are_repaired_unless_nothing_is_to_be_fitted(teacher, tmp_path):
    assert teacher.prune(tmp_path / "a", layers=2).methods.layer_repair == "linear"
    assert teacher.prune(tmp_path / "b", layers=2, compensate="none").methods.layer_repair == "none"


def test_nothing_is_mended_where_nothing_was_dropped(teacher, tmp_path):
    plan = teacher.prune(tmp_path / "out", ffn=64, compensate="none", layer_repair="linear")
    assert plan.methods.layer_repair == "none"
    plain = teacher.prune(tmp_path / "plain", ffn=64, compensate="none")
    assert plan.kept == plain.kept
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "plain"))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_tokens_with_a_huge_stream_do_not_decide_alone(teacher, monkeypatch):
    """A dropped layer puts a vector of a thousand times the usual size on one token of each sequence."""
    layers, read = teacher.family.dims(teacher.config).layers, LayerStream.layer
    cfg = PruneConfig(layers=layers - 2, layer_method="last", layer_repair="linear")
    plan = make_plan(teacher.config, teacher.family, None, cfg)
    stream = LayerStream(teacher.config, teacher.family, teacher.checkpoint.tensor, dtype=torch.float32, device=CPU)
    huge = 1e3 * torch.randn(teacher.family.dims(teacher.config).hidden, generator=torch.Generator().manual_seed(1))

    def mended(size):
        def loud(self, index):
            layer = read(self, index)
            if index == 1:
                add = torch.zeros(48, 1)
                add[7] = size
                layer.module.register_forward_hook(lambda _m, _a, out: out + add * huge)
            return layer

        monkeypatch.setattr(LayerStream, "layer", loud)
        slicer = Slicer(teacher.config, teacher.family, plan)
        return repaired_gaps(
            stream, slicer, teacher.batches, cfg, teacher.checkpoint, Reporter(quiet=True)
        ).get(0)["down"]  # fmt: skip

    before = teacher.checkpoint.tensor("model.layers.0.mlp.down_proj.weight").float()
    without = mended(0.0)
    assert (mended(1.0) - without).norm() < 0.3 * (without - before).norm()


def _read_by_down(model, layer, batches):
    """(what the layer's down projection reads, the stream before it adds, the stream behind every layer), fp64."""
    seen: dict[str, list[torch.Tensor]] = {"u": [], "y": [], "after": [], "end": []}

    def see(**tensors):
        for name, tensor in tensors.items():
            seen[name].append(tensor.flatten(0, 1).double())

    modules = model.model.layers[layer].mlp.down_proj, model.model.layers[layer], model.model.norm
    handles = [
        modules[0].register_forward_hook(lambda _m, args, out: see(u=args[0], y=out)),
        modules[1].register_forward_hook(lambda _m, _a, out: see(after=out)),
        modules[2].register_forward_pre_hook(lambda _m, args: see(end=args[0])),
    ]
    for batch in batches:
        with torch.inference_mode():
            model.model(input_ids=batch.input_ids_BS, position_ids=batch.position_ids_BS, use_cache=False)
    for handle in handles:
        handle.remove()
    u, y, after, end = (torch.cat(seen[name]) for name in ("u", "y", "after", "end"))
    return u, after - y, end


@pytest.mark.parametrize("beta", [0.0, 0.5])
def test_a_second_gap_is_fitted_on_what_the_student_reads_too(teacher, tmp_path, beta):
    """The written student's second front against a plain fp64 regression over both models' own activations."""
    out, ridge = tmp_path / "out", 1e-2
    out.mkdir()
    cfg = PruneConfig(layers=2, stream_correction=beta, ridge_lambda=ridge)
    order = {"layers.one_by_one": torch.tensor([3.0, 1.0, 4.0, 2.0]).numpy()}
    plan = make_plan(teacher.config, teacher.family, order, cfg)
    assert plan.kept.layers == [0, 2]
    apply_plan(
        teacher.checkpoint, teacher.family, plan, out, cfg, batches=teacher.batches, reporter=Reporter(quiet=True)
    )
    whole, student = _model(teacher), load_model(out, dtype=torch.float32, device=CPU)
    u_T, middle_T, end = _read_by_down(whole, 2, teacher.batches)
    u_S, middle_S, _ = _read_by_down(student, 1, teacher.batches)
    prior = whole.model.layers[2].mlp.down_proj.weight.detach().double()
    size = end.square().mean(-1, keepdim=True).sqrt()
    x = torch.cat([u_T / size, u_S / size])
    t = torch.cat([(end - middle_T) / size, (end - middle_T + beta * (middle_T - middle_S)) / size])
    gram = x.T @ x
    gram += ridge * gram.diagonal().mean() * torch.eye(len(gram), dtype=torch.float64)
    moved = torch.linalg.solve(gram, x.T @ (t - x @ prior.T)).T
    found = student.model.layers[1].mlp.down_proj.weight.detach().double() - prior
    assert float((found - moved).norm() / moved.norm()) < 2e-3
