"""Published models by their sizes: what the files count is what their authors and the weights' indices say."""

from __future__ import annotations

from typing import Any

import pytest

from kdscale.families import load_family


def _sizes(hidden: int, ffn: int, layers: int, heads: int, kv_heads: int, vocab: int, **more: Any) -> dict[str, Any]:
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    return {**dict(zip(names, (hidden, ffn, layers, heads, kv_heads), strict=True)), "vocab_size": vocab, **more}


_MIXTRAL = _sizes(4096, 14336, 32, 32, 8, 32000, num_local_experts=8, num_experts_per_tok=2)
_QWEN3_MOE = _sizes(
    2048, 6144, 48, 32, 4, 151936, head_dim=128, moe_intermediate_size=768, num_experts=128, num_experts_per_tok=8
)
_OLMOE = _sizes(2048, 1024, 16, 16, 16, 50304, num_experts=64, num_experts_per_tok=8)
_GPT_OSS = {"head_dim": 64, "num_experts_per_tok": 4}
_GLM = {"head_dim": 128, "moe_intermediate_size": 1408, "n_routed_experts": 128, "attention_bias": True}
_MLA = {"kv_lora_rank": 512, "qk_rope_head_dim": 64, "qk_nope_head_dim": 128, "v_head_dim": 128}
_V3 = {**_MLA, "moe_intermediate_size": 2048, "n_routed_experts": 256, "n_group": 8, "topk_group": 4}
_V2 = {**_MLA, "moe_intermediate_size": 1536, "n_routed_experts": 160, "n_group": 8, "topk_group": 3}
_V2_LITE = {**_MLA, "moe_intermediate_size": 1408, "n_routed_experts": 64, "q_lora_rank": None}
_TWO_SHARED = {"n_shared_experts": 2, "first_k_dense_replace": 1, "num_experts_per_tok": 6}
_ERNIE = {"moe_intermediate_size": 1536, "moe_num_experts": 64, "moe_k": 6}
_GRANITE = {"num_local_experts": 40, "num_experts_per_tok": 8, "tie_word_embeddings": True}
_PYTHIA = {"vocab_size": 50304, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 24}
_GPT2 = {"vocab_size": 50257, "n_embd": 768, "n_layer": 12, "n_head": 12, "n_positions": 1024, "n_ctx": 1024}
_FALCON_H1 = {
    "head_dim": 64, "mamba_d_ssm": 1536, "mamba_n_heads": 24, "mamba_d_head": 64, "mamba_d_state": 128,
    "mamba_n_groups": 1,
}  # fmt: skip
_GEMMA_4 = {"attention_k_eq_v": True, "num_global_key_value_heads": 4, "hidden_size_per_layer_input": 0}
_GEMMA_4_MOE = {
    **_GEMMA_4, "num_global_key_value_heads": 2, "enable_moe_block": True, "num_experts": 128, "top_k_experts": 8,
    "moe_intermediate_size": 704,
}  # fmt: skip
_GRANITE_4 = {
    "shared_intermediate_size": 1536, "mamba_n_heads": 128, "mamba_d_head": 64, "mamba_d_state": 128,
    "layer_types": ["attention" if layer % 10 == 5 else "mamba" for layer in range(40)], "tie_word_embeddings": True,
}  # fmt: skip
_NEMOTRON_3 = {
    "hybrid_override_pattern": "MEMEM*E" + "MEMEM*E" * 4 + "MEMEMEM*E" + "MEMEMEME", "head_dim": 128, "n_groups": 8,
    "mamba_num_heads": 64, "mamba_head_dim": 64, "moe_intermediate_size": 1856, "n_routed_experts": 128,
    "moe_shared_expert_intermediate_size": 3712, "num_experts_per_tok": 6,
}  # fmt: skip
_EXAONE = _sizes(2048, 4096, 30, 32, 8, 102400, head_dim=64, tie_word_embeddings=True)
_BERT = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
_DISTILBERT = {"dim": 768, "hidden_dim": 3072, "n_layers": 6, "n_heads": 12, "vocab_size": 30522}


def _bert(architecture: str, vocab: int = 30522, **more: Any) -> dict[str, Any]:
    return {**_BERT, "architectures": [architecture], "vocab_size": vocab, **more}


PUBLISHED: dict[str, tuple[str, dict[str, Any], int]] = {
    "Llama-3.1-8B": ("llama", _sizes(4096, 14336, 32, 32, 8, 128256), 8_030_261_248),
    "Mistral-7B-v0.3": ("mistral", _sizes(4096, 14336, 32, 32, 8, 32768), 7_248_023_552),
    "Qwen2.5-7B": ("qwen2", _sizes(3584, 18944, 28, 28, 4, 152064), 7_615_616_512),
    "Qwen3-8B": ("qwen3", _sizes(4096, 12288, 36, 32, 8, 151936), 8_190_735_360),
    "gemma-2-2b": ("gemma2", _sizes(2304, 9216, 26, 8, 4, 256000, head_dim=256), 2_614_341_888),
    "gemma-3-1b": ("gemma3_text", _sizes(1152, 6912, 26, 4, 1, 262144, head_dim=256), 999_885_952),
    "Phi-3-mini": ("phi3", _sizes(3072, 8192, 32, 32, 32, 32064), 3_821_079_552),
    "OLMo-2-7B": ("olmo2", _sizes(4096, 11008, 32, 32, 32, 100352), 7_298_617_344),
    "SmolLM3-3B": ("smollm3", _sizes(2048, 11008, 36, 16, 4, 128256), 3_075_098_624),
    "granite-3.1-2b": ("granite", _sizes(2048, 8192, 40, 32, 8, 49155, tie_word_embeddings=True), 2_533_531_648),
    "pythia-1.4b": ("gpt_neox", {**_PYTHIA, "num_attention_heads": 16}, 1_414_647_808),
    "gpt2": ("gpt2", _GPT2, 124_439_808),
    "Falcon3-7B": ("llama", _sizes(3072, 23040, 28, 12, 4, 131072, head_dim=256, activation="swiglu"), 7_455_550_464),
    "Mistral-Small-24B": ("mistral", _sizes(5120, 32768, 40, 32, 8, 131072, head_dim=128), 23_572_403_200),
    "Ministral-8B": ("ministral", _sizes(4096, 12288, 36, 32, 8, 131072, head_dim=128), 8_019_808_256),
    "OLMo-3-7B": ("olmo3", _sizes(4096, 11008, 32, 32, 32, 100278), 7_298_011_136),
    "glm-4-9b": ("glm", _sizes(4096, 13696, 40, 32, 2, 151552, head_dim=128), 9_399_951_360),
    "GLM-4-9B-0414": ("glm4", _sizes(4096, 13696, 40, 32, 2, 151552, head_dim=128), 9_400_279_040),
    "EXAONE-4.0-1.2B": ("exaone4", _EXAONE, 1_279_391_488),
    "ERNIE-4.5-0.3B": ("ernie4_5", _sizes(1024, 3072, 18, 16, 2, 103424, head_dim=128), 360_748_032),
    "Seed-OSS-36B": ("seed_oss", _sizes(5120, 27648, 64, 80, 8, 155136, head_dim=128), 36_151_104_512),
    "Apertus-8B": ("apertus", _sizes(4096, 21504, 32, 32, 8, 131072), 8_053_338_176),
    "command-r": ("cohere", _sizes(8192, 22528, 40, 64, 64, 256000), 34_980_831_232),
    "command-r7b": ("cohere2", _sizes(4096, 14336, 32, 32, 8, 256000), 8_028_033_024),
    "stablelm-3b-4e1t": ("stablelm", _sizes(2560, 6912, 32, 32, 32, 50304), 2_795_443_200),
    "starcoder2-3b": ("starcoder2", _sizes(3072, 12288, 30, 24, 2, 49152), 3_030_371_328),
    "Mixtral-8x7B": ("mixtral", _MIXTRAL, 46_702_792_704),
    "Qwen3-30B-A3B": ("qwen3_moe", _QWEN3_MOE, 30_532_122_624),
    "Qwen3-Next-80B-A3B": ("qwen3_next", _sizes(2048, 5120, 48, 16, 2, 151936), 79_674_391_296),
    "Falcon-H1-0.5B": ("falcon_h1", _sizes(1024, 2048, 36, 8, 2, 32784, **_FALCON_H1), 521_411_104),
    "OLMoE-1B-7B": ("olmoe", _OLMOE, 6_919_161_856),
    "gpt-oss-20b": ("gpt_oss", _sizes(2880, 2880, 24, 64, 8, 201088, num_local_experts=32, **_GPT_OSS), 20_914_757_184),
    "gpt-oss-120b": ("gpt_oss", _sizes(2880, 2880, 36, 64, 8, 201088, **_GPT_OSS), 116_829_156_672),
    "DeepSeek-V3": ("deepseek_v3", _sizes(7168, 18432, 61, 128, 128, 129280, **_V3), 671_026_404_352),
    "DeepSeek-V2": ("deepseek_v2", _sizes(5120, 12288, 60, 128, 128, 102400, **_V2, **_TWO_SHARED), 235_741_434_880),
    "DeepSeek-V2-Lite": (
        "deepseek_v2",
        _sizes(2048, 10944, 27, 16, 16, 102400, **_V2_LITE, **_TWO_SHARED),
        15_706_484_224,
    ),
    "ERNIE-4.5-21B-A3B": ("ernie4_5_moe", _sizes(2560, 12288, 28, 20, 4, 103424, **_ERNIE), 21_825_437_888),
    "bert-base-uncased": ("bert", _bert("BertForMaskedLM"), 109_514_298),
    "bge-base-en": ("bert", _bert("BertModel"), 109_482_240),
    "all-MiniLM-L6-v2": (
        "bert",
        _bert("BertModel", hidden_size=384, intermediate_size=1536, num_hidden_layers=6),
        22_713_216,
    ),
    "distilbert-base-uncased": ("distilbert", {**_DISTILBERT, "architectures": ["DistilBertForMaskedLM"]}, 66_985_530),
    "ModernBERT-base": (
        "modernbert",
        {
            "architectures": ["ModernBertForMaskedLM"],
            "hidden_size": 768,
            "intermediate_size": 1152,
            "vocab_size": 50368,
            "num_hidden_layers": 22,
            "num_attention_heads": 12,
        },
        149_655_232,
    ),
    "roberta-base": (
        "roberta",
        _bert("RobertaForMaskedLM", 50265, max_position_embeddings=514, type_vocab_size=1),
        124_697_433,
    ),
}


# Models of which only the rounded figures of their authors are at hand: billions of parameters, all and active.
ROUNDED: dict[str, tuple[str, dict[str, Any], float, float]] = {
    "GLM-4.5-Air": ("glm4_moe", _sizes(4096, 10944, 46, 96, 8, 151552, **_GLM), 106, 13),
    "Qwen3.5-35B-A3B": ("qwen3_5_moe_text", _sizes(2048, 0, 40, 16, 2, 248320), 35, 3.46),
    "gemma-4-31B": ("gemma4_text", _sizes(5376, 21504, 60, 32, 16, 262144, head_dim=256, **_GEMMA_4), 30.7, 30.7),
    "gemma-4-26B-A4B": ("gemma4_text", _sizes(2816, 2112, 30, 16, 8, 262144, head_dim=256, **_GEMMA_4_MOE), 25.2, 3.8),
    "Llama-4-Scout": ("llama4_text", _sizes(5120, 8192, 48, 40, 8, 202048), 108, 17),
    "Llama-4-Maverick": (
        "llama4_text",
        _sizes(5120, 8192, 48, 40, 8, 202048, num_local_experts=128, interleave_moe_layer_step=2),
        400,
        17,
    ),
    "granite-4.0-h-small": (
        "granitemoehybrid",
        _sizes(4096, 768, 40, 32, 8, 100352, num_local_experts=72, num_experts_per_tok=10, **_GRANITE_4),
        32.2,
        9,
    ),
    "Nemotron-3-Nano-30B-A3B": ("nemotron_h", _sizes(2688, 1856, 52, 32, 2, 131072, **_NEMOTRON_3), 31.6, 3.6),
    "granite-3.1-3b-a800m": ("granitemoe", _sizes(1536, 512, 32, 24, 8, 49155, **_GRANITE), 3.3, 0.88),
}


@pytest.mark.parametrize("name", ROUNDED)
def test_parameters_of_published_models_as_their_authors_round_them(name: str) -> None:
    model_type, sizes, total, active = ROUNDED[name]
    config = {"model_type": model_type, **sizes}
    counted = load_family(config, "config.json").count_params(config)
    assert (counted.total / 1e9, counted.active / 1e9) == pytest.approx((total, active), rel=0.04)


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_of_published_models(name: str) -> None:
    model_type, sizes, total = PUBLISHED[name]
    config = {"model_type": model_type, **sizes}
    assert load_family(config, "config.json").count_params(config).total == total


@pytest.mark.parametrize(
    ("model_type", "sizes", "billions"),
    [
        ("nemotron", _sizes(3072, 9216, 32, 24, 8, 256000, head_dim=128), 4.19),  # Minitron-4B
        ("ministral3", _sizes(4096, 14336, 34, 32, 8, 131072, head_dim=128), 8.4),  # Ministral 3 8B, its language model
    ],
)
def test_parameters_that_authors_round(model_type: str, sizes: dict[str, Any], billions: float) -> None:
    config = {"model_type": model_type, **sizes}
    assert load_family(config, "config.json").count_params(config).total / 1e9 == pytest.approx(billions, rel=0.015)


@pytest.mark.parametrize(
    ("name", "billions"),
    [
        *(("Mixtral-8x7B", 12.9), ("Qwen3-30B-A3B", 3.3), ("OLMoE-1B-7B", 1.3), ("gpt2", 0.124)),
        # the card of gpt-oss does not count the embedding: 3.6 and 5.1 billion without its 0.58
        *(("gpt-oss-20b", 4.19), ("gpt-oss-120b", 5.71), ("DeepSeek-V3", 37), ("DeepSeek-V2", 21)),
    ],
)
def test_active_parameters_of_published_models(name: str, billions: float) -> None:
    model_type, sizes, _ = PUBLISHED[name]
    config = {"model_type": model_type, **sizes}
    counted = load_family(config, "config.json").count_params(config)
    assert counted.active / 1e9 == pytest.approx(billions, rel=0.03)  # authors round, some of them down


@pytest.mark.parametrize(
    ("name", "kibibytes"),
    [("Llama-3.1-8B", 128), ("gpt2", 36), ("Qwen3-30B-A3B", 96), ("Mixtral-8x7B", 128), ("DeepSeek-V3", 68.625)],
)
def test_cache_of_published_models(name: str, kibibytes: float) -> None:
    """Two bytes a value, keys and values or what they are made from, all layers."""
    model_type, sizes, _ = PUBLISHED[name]
    config = {"model_type": model_type, **sizes}
    assert 2 * load_family(config, "config.json").cached_numbers(config) == kibibytes * 1024
