"""FLOPs of a step, counted one product at a time."""

from __future__ import annotations

from kdscale.sizing.flops import ModelFlops, step_flops

LLAMA = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 64, "intermediate_size": 96,
    "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 320,
    "tie_word_embeddings": True, "hidden_act": "silu", "rms_norm_eps": 1e-5, "max_position_embeddings": 128,
}  # fmt: skip


def test_flops_are_those_of_the_products():
    """Counted one product at a time: q, k, v, o, gate, up, down; QKᵀ and AV over the sequence; the tied head."""
    products = 64 * 64 + 2 * 64 * 32 + 64 * 64 + 3 * 64 * 96
    flops = ModelFlops.of(LLAMA, seq_len=10)
    assert flops.per_token == 3 * (2 * products + 2 * 2 * 64 * 10)
    assert flops.per_label == 2 * 64 * 320
    other = ModelFlops(per_token=7.0, per_label=5.0)
    assert step_flops(other, flops, 100, 90) == 100 * (7 + 3 * flops.per_token) + 90 * (5 + 3 * flops.per_label)
    assert step_flops(None, flops, 100, 90) == 3 * (100 * flops.per_token + 90 * flops.per_label)


def test_a_mixture_counts_the_experts_a_token_is_routed_to():
    sizes = {**LLAMA, "model_type": "mixtral", "architectures": ["MixtralForCausalLM"], "num_local_experts": 8,
             "num_experts_per_tok": 2, "tie_word_embeddings": False}  # fmt: skip
    products = 64 * 64 + 2 * 64 * 32 + 64 * 64 + 2 * 3 * 64 * 96 + 8 * 64  # the router sees every expert
    assert ModelFlops.of(sizes, seq_len=10).per_token == 3 * (2 * products + 2 * 2 * 64 * 10)
