"""Documents found in position ids."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.masking_utils import find_packed_sequence_indices

from kdscale.models.attention import attend_within_documents
from kdscale.models.documents import Documents, recurrent_mixers

ROWS = st.lists(st.integers(1, 6), min_size=1, max_size=5)


def positions(lengths):
    return torch.cat([torch.arange(n) for n in lengths])[None]


@given(ROWS)
def test_documents_are_those_that_restart(lengths):
    documents = Documents.of(positions(lengths))
    assert documents.lengths == tuple(lengths)
    assert documents.bounds_D1.tolist() == [sum(lengths[:i]) for i in range(len(lengths) + 1)]
    assert documents.bounds_D1.dtype == torch.int32
    assert documents.longest == max(lengths)
    assert [length for count, length in documents.runs() for _ in range(count)] == lengths


def test_a_row_ends_a_document_even_where_positions_go_on():
    assert Documents.of(torch.tensor([[4, 5, 6], [7, 8, 0]])).lengths == (3, 2, 1)


@given(st.lists(st.lists(st.integers(0, 9), min_size=4, max_size=4), min_size=1, max_size=3))
def test_any_positions_are_cut_where_transformers_cuts_them(rows):
    position_BS = torch.tensor(rows)
    packed_BS = find_packed_sequence_indices(position_BS)
    document_BS = torch.zeros_like(position_BS) if packed_BS is None else packed_BS
    want = [int(count) for row in document_BS for count in row.unique_consecutive(return_counts=True)[1]]
    assert list(Documents.of(position_BS).lengths) == want


def test_what_layers_share_is_made_once():
    made, documents = [], Documents.of(positions([3]))
    assert [documents.once("key", lambda: made.append(1) or len(made)) for _ in range(2)] == [1, 1]
    assert documents.once("other", lambda: 5) == 5


_MAMBA = {"mamba_d_ssm": 48, "mamba_n_heads": 6, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_chunk_size": 8}
_DELTA = {
    "layer_types": ["linear_attention", "full_attention"], "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    "linear_num_key_heads": 2, "linear_num_value_heads": 4,
}  # fmt: skip


@pytest.mark.parametrize(("model_type", "mixers", "sizes"), [("falcon_h1", 2, _MAMBA), ("qwen3_5_text", 1, _DELTA)])
def test_recurrent_mixers_begin_anew_with_each_document(model_type, mixers, sizes):
    """Mamba 2 and the gated delta rule: a packed row gives what each of its documents gives alone."""
    torch.manual_seed(0)
    sizes |= {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 64, "head_dim": 8}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.15, "pad_token_id": 0}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **sizes)).eval()
    ids_BS = torch.randint(1, 64, (2, 21))
    position_BS = positions([5, 5, 11, 21]).view(2, 21)
    with torch.inference_mode():
        alone = [ids_BS[:1, :5], ids_BS[:1, 5:10], ids_BS[:1, 10:], ids_BS[1:]]
        want_TV = torch.cat([model(input_ids=ids).logits[0] for ids in alone])
        assert attend_within_documents(model)
        calls = []
        for mixer in recurrent_mixers(model):
            mixer.out_proj.register_forward_hook(lambda _module, args, _output: calls.append(args[0].shape[:2]))
        packed = {"position_ids": position_BS, "documents": Documents.of(position_BS), "use_cache": False}
        got_TV = model(input_ids=ids_BS, **packed).logits.flatten(0, 1)
    torch.testing.assert_close(got_TV, want_TV, atol=1e-4, rtol=1e-4)
    assert calls == [(2, 21)] * mixers  # whole rows, whoever hooks onto it
