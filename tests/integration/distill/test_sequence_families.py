"""Every family's attention within documents, packed and windowed, is what transformers itself computes with a mask."""

from __future__ import annotations

import inspect

import pytest
import torch
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM, masking_utils

from kdscale.config.distill.objective import LayersRead
from kdscale.errors import CheckpointError, ConfigError
from kdscale.families import decoder_types, load_family
from kdscale.families.schema import COMPONENT_OF
from kdscale.families.windows import attention_windows
from kdscale.models import attention, sequence_parallel
from kdscale.models.attention import attend_within_documents, choice_for, documents_apart
from kdscale.models.documents import Documents
from kdscale.models.head import final_hidden
from kdscale.models.layer_records import LayerReader
from kdscale.models.sequence_parallel import Exchange, SequenceSlice
from tests.integration.prune.family_table import tiny_config

LENGTHS = [[5, 20, 7], [1, 1, 30], [32], [29, 1, 1, 1]]  # of the documents on each row, beyond every window
OWN_ATTENTION = {"nemotron", "stablelm"}  # their layers hand nothing on to their attention
# Families without recurrent mixers, whose documents tests/unit/models/test_documents.py keeps apart.
ATTENTION_ALONE = sorted(
    name
    for name in set(decoder_types()) - OWN_ATTENTION
    if all(COMPONENT_OF[t.role] != "mixer" for t in load_family(tiny_config(name), "test").data.tensors)
)
# softmax in fp32 whatever the model's dtype, in transformers' eager attention
TOLERANCE = {"gemma2": 1e-5}
# gpt-oss itself lets packed documents see each other, and Llama 4's chunks begin with the row: they have tests of their
# own
APART = [*sorted(set(ATTENTION_ALONE) - {"gpt_oss", "llama4_text"}), "gemma4_text, small"]
PLAIN = torch.arange(32).expand(len(LENGTHS), -1)


def positions():
    return torch.stack([torch.cat([torch.arange(n) for n in row]) for row in LENGTHS])


def token_ids():
    return torch.randint(1, 60, positions().shape, generator=torch.Generator().manual_seed(1))


def tiny_model(model_type, dtype=torch.float64, **changes):
    torch.manual_seed(3)
    config = AutoConfig.for_model(**{**tiny_config(model_type), **changes})
    config._experts_implementation = "eager"  # the grouped products of a mixture have no fp64
    return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def hidden_and_gradients(model, **to_attention):
    hidden = final_hidden(model, token_ids(), positions(), **to_attention)
    weights = torch.linspace(-1, 1, hidden.numel(), dtype=hidden.dtype).view_as(hidden)
    used = [p for p in model.base_model.parameters() if p.requires_grad]
    gradients = torch.autograd.grad((hidden * weights).sum(), used, allow_unused=True)
    return [hidden.detach(), *(g for g in gradients if g is not None)]


@pytest.mark.parametrize("model_type", APART)
def test_hidden_states_and_gradients_are_the_familys_own(model_type):
    model = tiny_model(model_type)
    want = hidden_and_gradients(model)
    SequenceSlice(0, 2).prepare(model)
    assert choice_for(model, torch.device("cpu")).backend.name == "sdpa"
    alone, exchanged = hidden_and_gradients(model), hidden_and_gradients(model, ulysses=Exchange(None, 1))
    for got in (alone, exchanged):
        assert len(got) == len(want)
        for one, other in zip(got, want, strict=True):
            largest = max(1.0, float(other.abs().max()))
            torch.testing.assert_close(one, other, atol=TOLERANCE.get(model_type, 1e-10) * largest, rtol=0)
    with torch.no_grad():
        mixed = final_hidden(model, token_ids(), PLAIN)
    assert float((mixed - want[0]).abs().max()) > 1e-2  # documents that see each other do differ


@pytest.mark.parametrize("model_type", APART)
def test_hidden_states_and_attention_of_layers_are_recorded(model_type):
    """As transformers' own `output_hidden_states` has them, whose last entry is after the final norm."""
    model = tiny_model(model_type)
    count = model.config.get_text_config().num_hidden_layers
    rows_N, whole = torch.arange(0, positions().numel(), 3), SequenceSlice()
    whole.prepare(model)
    reader = LayerReader(model, LayersRead(tuple(range(-1, count)), tuple(range(count))))
    records = reader.records()
    whole.hidden(model, token_ids(), positions(), rows_N, None, records)
    documents = Documents.of(positions())
    states = model.base_model(
        input_ids=token_ids(), position_ids=positions(), attention_mask=None, use_cache=False,
        output_hidden_states=True, documents=documents,
    ).hidden_states  # fmt: skip
    for layer in range(-1, count - 1):
        torch.testing.assert_close(records.layers_NH[layer], states[layer + 1].flatten(0, 1)[rows_N])
    normed = model.get_submodule(reader_family(model).sites.final_norm)(records.layers_NH[count - 1])
    torch.testing.assert_close(normed, states[-1].flatten(0, 1)[rows_N])
    assert sorted(records.attention) == list(range(count))
    assert {rows.query_TAD.shape[0] for rows in records.attention.values()} == {positions().numel()}


def test_attention_of_a_layer_without_it_is_refused():
    model = tiny_model("qwen3_5_text")
    SequenceSlice().prepare(model)
    LayerReader(model, LayersRead((), (1,)))
    with pytest.raises(ConfigError, match="layer 2 of Qwen3_5ForCausalLM"):
        LayerReader(model, LayersRead((), (1, 2)))
    with pytest.raises(ConfigError, match="no recurrent mixers"):
        SequenceSlice(0, 2).prepare(model)


def reader_family(model):
    return load_family(model.config.get_text_config().to_dict(), "test")


@pytest.mark.parametrize(
    ("model_type", "changes"),
    [
        *((model_type, {}) for model_type in ATTENTION_ALONE),
        ("mistral", {"sliding_window": None}),
        ("qwen2", {"use_sliding_window": False}),
        ("qwen3", {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 2}),
        ("qwen3_moe", {"use_sliding_window": True, "sliding_window": 6}),
        ("smollm3", {"use_sliding_window": True, "sliding_window": 6, "layer_types": ["sliding_attention"] * 3}),
        ("gemma2", {"layer_types": ["full_attention", "full_attention", "sliding_attention"]}),
    ],
)
def test_windows_are_those_that_the_familys_layers_ask_for(model_type, changes):
    asked = []

    def attention(_module, query, _key, value, *_, sliding_window=None, **__):
        asked.append(sliding_window)
        return query.new_zeros(*query.transpose(1, 2).shape[:3], value.shape[-1]), None

    model = tiny_model(model_type, torch.float32, **changes)
    AttentionInterface.register("asked", attention)
    model.config._attn_implementation = "asked"
    model(input_ids=token_ids(), use_cache=False)
    config = {**tiny_config(model_type), **changes}
    assert attention_windows(load_family(config, "test"), config) == asked


@pytest.mark.parametrize(
    ("model_type", "changes", "want"),
    [
        ("mistral", {}, [4096] * 3),
        ("gemma2", {}, [4096, None, 4096]),
        ("qwen2", {"use_sliding_window": True}, [None] * 3),  # from layer 28 on
        ("phi3", {}, [None] * 3),
    ],
)
def test_windows_that_a_config_leaves_out(model_type, changes, want):
    left_out = ("sliding_window", "use_sliding_window", "max_window_layers", "layer_types")
    config = {k: v for k, v in tiny_config(model_type).items() if k not in left_out} | changes
    assert attention_windows(load_family(config, "test"), config) == want


@pytest.mark.parametrize("window", [0, -1, "4096", True, 2.5])
def test_a_window_that_is_none_is_refused(window):
    config = {**tiny_config("mistral"), "sliding_window": window}
    with pytest.raises(CheckpointError, match="sliding_window"):
        attention_windows(load_family(config, "test"), config)


def make_no_masks(patch):
    """From here on transformers fails where it would make a mask."""
    for name in ("sdpa", "eager"):
        patch.setitem(masking_utils.ALL_MASK_ATTENTION_FUNCTIONS._global_mapping, name, None)


def test_no_mask_is_made_for_a_training_step(monkeypatch):
    make_no_masks(monkeypatch)
    for model_type in ("llama", "gemma2"):
        model = tiny_model(model_type, torch.float32)
        with pytest.raises(TypeError):  # as patched, a mask cannot be made
            final_hidden(model, token_ids(), positions())
        assert attend_within_documents(model)
        assert len(hidden_and_gradients(model)) > 1


def test_a_dropped_share_is_dropped_within_documents_too():
    model = tiny_model("llama", attention_dropout=0.5).train()
    attend_within_documents(model)
    with torch.no_grad():
        torch.manual_seed(1)
        once = final_hidden(model, token_ids(), positions())
        torch.manual_seed(2)
        assert not torch.equal(once, final_hidden(model, token_ids(), positions()))


def test_a_block_leaves_the_model_as_it_was_for_decoding():
    model = tiny_model("gemma2", torch.float32)
    before = model.config._attn_implementation
    want = model.generate(token_ids()[:1, :8], max_new_tokens=4, do_sample=False)
    with documents_apart(model), torch.inference_mode():
        apart = final_hidden(model, token_ids(), positions(), Documents.of(positions()))
    assert model.config._attn_implementation == before
    assert torch.equal(model.generate(token_ids()[:1, :8], max_new_tokens=4, do_sample=False), want)
    with torch.inference_mode():
        torch.testing.assert_close(apart, final_hidden(model, token_ids(), positions()), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("asked", [{"attention_mask": torch.ones(4, 1, 32, 32)}, {"documents": None}], ids=str)
def test_what_it_would_leave_out_is_refused(asked):
    model = tiny_model("llama")
    attend_within_documents(model)
    with pytest.raises(CheckpointError, match="kept within documents"):
        model.base_model(input_ids=token_ids(), **{"documents": Documents.of(positions()), **asked})


@pytest.mark.parametrize("model_type", ["llama", *sorted(OWN_ATTENTION)])
def test_a_model_with_an_attention_of_its_own_keeps_it(model_type):
    model = tiny_model(model_type, torch.float32)
    want = final_hidden(model, token_ids(), positions()).detach()
    if model_type == "llama":
        model._supports_attention_backend = False
    with pytest.raises(ConfigError, match=r"distill\.sequence_parallel"):
        SequenceSlice(0, 2).prepare(model)
    SequenceSlice().prepare(model)
    assert choice_for(model, torch.device("cpu")) is None
    assert torch.equal(final_hidden(model, token_ids(), positions()), want)
    assert (
        float((final_hidden(model, token_ids(), PLAIN).detach() - want).abs().max()) > 1e-2
    )  # documents are kept apart


def test_attention_with_sinks_is_the_models_own_and_keeps_documents_apart():
    """transformers' own attention of this family lets packed documents see each other."""
    model = tiny_model("gpt_oss")
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.sinks.fill_(2.0)
        parts = [final_hidden(model, ids_1S) for ids_1S in token_ids()[:1].split(LENGTHS[0], dim=1)]
        attend_within_documents(model)
        packed = final_hidden(model, token_ids()[:1], positions()[:1])
        torch.testing.assert_close(packed, torch.cat(parts, dim=1), atol=1e-10, rtol=0)
        model.model.layers[0].self_attn.sinks.fill_(-9.0)
        assert float((final_hidden(model, token_ids()[:1], positions()[:1]) - packed).abs().max()) > 1e-2


def test_it_is_registered_under_a_name_of_ours_alone():
    attend_within_documents(tiny_model("llama"))
    # a model that was compiled before in this process has it registered behind torch.compiler.disable
    assert inspect.unwrap(AttentionInterface()[attention._NAME]) is attention.attend
    assert AttentionInterface()["sdpa"] is not attention.attend
    assert attention._NAME not in masking_utils.ALL_MASK_ATTENTION_FUNCTIONS


def test_a_run_is_the_one_with_dense_masks_up_to_rounding(distil, tmp_path, monkeypatch):
    settings = {"tokens": 4 * 4 * 48, "gradient_checkpointing": "keep_attention"}
    with monkeypatch.context() as patch:
        make_no_masks(patch)
        rows = distil(tmp_path / "apart", **settings)
    monkeypatch.setattr(sequence_parallel, "attend_within_documents", lambda _model: False)
    for row, dense in zip(rows, distil(tmp_path / "dense", **settings), strict=True):
        assert row["loss"] == pytest.approx(dense["loss"], abs=1e-5)
        assert row.get("grad_norm", 0.0) == pytest.approx(dense.get("grad_norm", 0.0), rel=1e-4)


def test_chunks_begin_with_their_document():
    model = tiny_model("llama4_text", attention_chunk_size=6)
    with torch.no_grad():
        alone = [
            model.model(input_ids=part[None]).last_hidden_state[0]
            for row, lengths in zip(token_ids(), LENGTHS, strict=True)
            for part in row.split(lengths)
        ]
        attend_within_documents(model)
        packed = final_hidden(model, token_ids(), positions()).flatten(0, 1)
        torch.testing.assert_close(packed, torch.cat(alone), atol=1e-5, rtol=0)  # it rotates in fp32
        model = tiny_model("llama4_text", floor_scale=16)
        attend_within_documents(model)
        with pytest.raises(CheckpointError, match="rows of at most 16 positions"):
            final_hidden(model, token_ids(), positions())
