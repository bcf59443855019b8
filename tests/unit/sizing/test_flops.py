"""FLOPs of a step, counted one product at a time."""

from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from kdscale.sizing.flops import ModelFlops, attention_pairs, step_flops

LLAMA = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 64, "intermediate_size": 96,
    "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 320,
    "tie_word_embeddings": True, "hidden_act": "silu", "rms_norm_eps": 1e-5, "max_position_embeddings": 128,
}  # fmt: skip


def test_flops_are_those_of_the_products():
    """Counted one product at a time: q, k, v, o, gate, up, down; QKᵀ and AV within documents; the tied head."""
    products = 64 * 64 + 2 * 64 * 32 + 64 * 64 + 3 * 64 * 96
    flops = ModelFlops.of(LLAMA)
    assert flops.per_token == 3 * 2 * products
    assert flops.per_label == 2 * 64 * 320
    pairs = (4 + 3 + 2 + 1) + 2 * (2 + 1) + 1  # documents of 4, 2, 2 and 1 tokens: each query and the keys up to it
    attention = 3 * 2 * 2 * 64 * pairs
    assert flops.forward(9, 5, [4, 2, 2, 1]) == 9 * flops.per_token + 5 * flops.per_label + attention
    assert flops.of_a_token([4, 2, 2, 1]) == flops.forward(9, 9, [4, 2, 2, 1]) / 9
    other, step = ModelFlops(per_token=7.0, per_label=5.0), (9, 5, [4, 2, 2, 1])
    assert step_flops(other, flops, *step) == 9 * 7 + 5 * 5 + 3 * flops.forward(*step)
    assert step_flops(None, flops, *step) == 3 * flops.forward(*step)
    adapted = step_flops(None, flops, *step, adapters=50)  # frozen weights: no products for their gradients
    assert adapted == 2 * flops.forward(*step) + 6 * 50 * 9


@given(st.lists(st.integers(1, 12), min_size=1, max_size=6), st.one_of(st.none(), st.integers(1, 14)))
def test_pairs_are_those_that_attention_sees(lengths, window):
    seen = sum(1 for n in lengths for query in range(n) for key in range(query + 1) if query - key < (window or n))
    assert attention_pairs(Counter(lengths), window) == seen


def test_layers_that_slide_see_less():
    sizes = {**LLAMA, "model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "use_sliding_window": True,
             "sliding_window": 2, "max_window_layers": 1}  # fmt: skip
    flops = ModelFlops.of(sizes)
    whole, near = 4 + 3 + 2 + 1, 2 + 2 + 2 + 1
    assert flops.forward(4, 0, [4]) == 4 * flops.per_token + 4 * 64 * (1 * whole + 2 * near)


def test_a_mixture_counts_the_experts_a_token_is_routed_to():
    sizes = {**LLAMA, "model_type": "mixtral", "architectures": ["MixtralForCausalLM"], "num_local_experts": 8,
             "num_experts_per_tok": 2, "tie_word_embeddings": False}  # fmt: skip
    products = 64 * 64 + 2 * 64 * 32 + 64 * 64 + 2 * 3 * 64 * 96 + 8 * 64  # the router sees every expert
    assert ModelFlops.of(sizes).per_token == 3 * 2 * products
