"""llama.cpp computes from a GGUF file of each family what transformers computes from the folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from kdscale.families import gguf_families
from kdscale.models.loading import load_model, load_tokenizer, open_teacher
from kdscale.packaging.gguf_teacher.folder import import_gguf
from kdscale.packaging.gguf_writer import write_gguf
from kdscale.runtime.progress import Reporter
from tests.integration.prune.family_table import save_teacher

pytest.importorskip("gguf")
pytest.importorskip("xllamacpp")

from tests.integration.packaging.llama_cpp import LlamaCpp

QUIET = Reporter(quiet=True)
TEXT = "The river ran past an old mill, and the children who lived there knew every stone of it by name: 1984."
VOCAB = 320
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
LONG = {"rope_type": "longrope", "short_factor": [1.0, 1.1, 1.3, 2.0], "long_factor": [1.0, 2.0, 3.0, 4.0]}
PLAIN_WINDOW: dict[str, Any] = {"sliding_window": None}
FIVE_LAYERS = {"num_hidden_layers": 5, "no_rope_layer_interval": 4}
FULL = ["full_attention"] * 3
# what is tried → family, changes to its tiny model
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama, rope of Llama 3": ("llama", {"rope_scaling": {**LLAMA3, "original_max_position_embeddings": 32}}),
    "llama, yarn": ("llama", {"rope_scaling": {**YARN, "attention_factor": 1.5, "beta_fast": 16.0}}),
    "llama, sizes of a student": ("llama", {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 12}),
    "mistral": ("mistral", PLAIN_WINDOW),
    "ministral": ("ministral", {"layer_types": FULL}),
    "qwen2": ("qwen2", {"use_sliding_window": False}),
    "qwen2, linear": ("qwen2", {"use_sliding_window": False, "rope_scaling": {"rope_type": "linear", "factor": 2.0}}),
    "qwen3": ("qwen3", {}),
    "qwen3, yarn, tied": ("qwen3", {"rope_scaling": YARN, "tie_word_embeddings": True}),
    "smollm3": ("smollm3", FIVE_LAYERS),
    "granite": ("granite", {"attention_bias": True, "mlp_bias": True}),
    "olmo2": ("olmo2", {}),
    "phi3": ("phi3", PLAIN_WINDOW),
    "phi3, longrope": (
        "phi3",
        {
            **PLAIN_WINDOW, "partial_rotary_factor": 1.0, "rope_scaling": LONG,
            "max_position_embeddings": 512, "original_max_position_embeddings": 256,
        },
    ),
    "gemma3_text": ("gemma3_text", {}),
    "gemma3_text, linear, untied": (
        "gemma3_text", {"rope_scaling": {"rope_type": "linear", "factor": 8.0}, "tie_word_embeddings": False},
    ),
    "gemma3_text, no windows": ("gemma3_text", {"layer_types": FULL}),
    "gemma2": ("gemma2", {}),
    "gemma2, no windows": ("gemma2", {"layer_types": FULL}),
    "gpt2": ("gpt2", {}),
    "mixtral": ("mixtral", PLAIN_WINDOW),
    "qwen3_moe": ("qwen3_moe", {"norm_topk_prob": True}),
    "glm": ("glm", {}),
    "glm4": ("glm4", {}),
    "ernie4_5": ("ernie4_5", {"use_bias": False}),
    "hunyuan_v1_dense": ("hunyuan_v1_dense", {}),
    "nemotron": ("nemotron", {"head_dim": 8}),
    "cohere": ("cohere", {"use_qk_norm": False, "head_dim": 8}),
    "stablelm": ("stablelm", {}),
    "starcoder2": ("starcoder2", PLAIN_WINDOW),
    "olmoe": ("olmoe", {"clip_qkv": None}),
}  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer(tiny_llama_dir: Path) -> Any:
    return load_tokenizer(tiny_llama_dir)


def model_of(case: str, tokenizer: Any, folder: Path, **changes: Any) -> Path:
    family, special = CASES[case]
    save_teacher(family, folder, **{"vocab_size": VOCAB, **special, **changes})
    tokenizer.save_pretrained(folder)
    return folder


def expected(folder: Path, ids: list[int]) -> torch.Tensor:
    model: Any = load_model(folder, dtype=torch.float32, device=torch.device("cpu"))
    with torch.inference_mode():
        logits: torch.Tensor = model(torch.tensor([ids])).logits[0, -1]
    return logits.log_softmax(-1)


def test_every_family_with_a_table_is_tried() -> None:
    assert {family for family, _ in CASES.values()} == set(gguf_families())


@pytest.mark.parametrize("case", CASES)
def test_log_probabilities_are_those_of_transformers(case: str, tokenizer: Any, tmp_path: Path) -> None:
    folder = model_of(case, tokenizer, tmp_path / "model")
    written = write_gguf(folder, tmp_path / "model.gguf", "f32", QUIET)
    assert not written.notes
    ids = tokenizer(TEXT)["input_ids"]
    assert len(ids) > 24  # beyond every window of a tiny model
    found = LlamaCpp(written.path).log_probabilities(ids, VOCAB, tokenizer.convert_tokens_to_ids("a"))
    wanted = expected(folder, ids)
    worst = max(abs(wanted[token].item() - value) for token, value in found.items())
    assert len(found) == VOCAB
    # llama.cpp looks GELU up in a table of fp16
    assert worst < (2e-3 if case.startswith(("gemma", "gpt2", "starcoder2")) else 2e-5)
    comes_back(folder, import_gguf(written.path, tmp_path / "back", QUIET, dtype="float32"), ids, wanted)


def comes_back(folder: Path, back: Path, ids: list[int], wanted: torch.Tensor) -> None:
    """The folder that is read from a GGUF file holds the tensors that it was written from, and computes the same."""
    (source, family), (read, again) = open_teacher(folder), open_teacher(back)
    assert family.data.gguf is not None and again.data.gguf is not None
    assert again.data.gguf.architecture == family.data.gguf.architecture
    # norms of which 1 is subtracted, and queries whose scale the file has no place for, are rounded
    exact = family.data.norm.gain == "weight" and family.data.gguf.query_scale is None
    assert sorted(read.names) == sorted(source.names)
    if exact:
        assert all(torch.equal(read.tensor(name), source.tensor(name)) for name in source.names)
    factors = read.config.get("rope_parameters", {}).get("rope_type") == "longrope"  # in fp32 there, in fp64 here
    torch.testing.assert_close(expected(back, ids), wanted, rtol=0, atol=0 if exact and not factors else 2e-5)
    assert load_tokenizer(back)(TEXT)["input_ids"] == ids


@pytest.mark.parametrize("case", ["mistral", "gemma2"])
def test_windows_that_llama_cpp_does_not_compute_limit_the_context(case: str, tokenizer: Any, tmp_path: Path) -> None:
    special = {"layer_types": ["sliding_attention", *FULL[1:]]} if case == "gemma2" else {"sliding_window": 8}
    folder = model_of(case, tokenizer, tmp_path / "model", **special)
    written = write_gguf(folder, tmp_path / "model.gguf", "f32", QUIET)
    assert "the context is limited to 8 tokens" in written.notes[0]
    ids = tokenizer(TEXT)["input_ids"][:7]
    found = LlamaCpp(written.path).log_probabilities(ids, VOCAB, tokenizer.convert_tokens_to_ids("a"))
    wanted = expected(folder, ids)
    assert max(abs(wanted[token].item() - value) for token, value in found.items()) < 2e-3


@pytest.mark.parametrize("kind", ["bf16", "f16", "q8_0"])
def test_greedy_continuations_are_those_of_transformers(kind: str, tiny_llama_dir: Path, tmp_path: Path) -> None:
    from kdscale.eval.samples import Sampling, continue_prompts

    written = write_gguf(tiny_llama_dir, tmp_path / "model.gguf", kind, QUIET)
    model = load_model(tiny_llama_dir, dtype=torch.float32, device=torch.device("cpu"))
    prompts = ["The miller counted", "winter light"]
    wanted = continue_prompts(model, load_tokenizer(tiny_llama_dir), prompts, 10, Sampling())
    llama_cpp = LlamaCpp(written.path)
    assert [llama_cpp.continuation(prompt, 10) for prompt in prompts] == wanted
