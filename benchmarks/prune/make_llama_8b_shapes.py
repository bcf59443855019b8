"""Write a checkpoint of true Llama-3.1-8B shapes: random bf16 weights, standard shards, and a small tokenizer.

    python benchmarks/prune/make_llama_8b_shapes.py /tmp/llama-8b-shapes            # 16.1 GB
    python benchmarks/prune/make_llama_8b_shapes.py /tmp/llama-8b-shapes --layers 4 # 3.8 GB, layers of the same size

For measuring time and memory, which depend on shapes alone. Needs little more memory than torch itself; all values are
cut from one pool of normal numbers, since drawing eight billion of them would take longer than writing them.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from kdscale.families import TensorSpec, load_family
from kdscale.weights import ShardWriter, TensorInfo

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 14336,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 8.0,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "vocab_size": 128256,
}
POOL = (1 << 24) + 12_289  # not a multiple of any row, so that no two rows are equal
SPREAD = 0.02


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, default=CONFIG["num_hidden_layers"])
    parser.add_argument("--shard-bytes", type=int, default=5_000_000_000)
    arguments = parser.parse_args()
    started = time.monotonic()
    size = make(arguments.folder, arguments.layers, arguments.shard_bytes)
    print(json.dumps({"folder": str(arguments.folder), "bytes": size, "seconds": round(time.monotonic() - started, 1)}))


def make(folder: Path, layers: int, shard_bytes: int) -> int:
    """Write the checkpoint; returns the bytes of its tensors."""
    config = CONFIG | {"num_hidden_layers": layers}
    tensors = load_family(config, str(folder / "config.json")).tensors(config)
    specs = {name: TensorInfo(spec.shape, "BF16") for name, spec in tensors.items()}
    pool = torch.empty(POOL).normal_(0, SPREAD, generator=torch.Generator().manual_seed(0)).bfloat16()
    with ShardWriter(folder, specs, shard_bytes) as writer:
        start = 0
        for name, spec in tensors.items():
            writer.add_blocks(name, values(spec, pool, start))
            start += math.prod(spec.shape)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    write_tokenizer(folder)
    return 2 * sum(math.prod(spec.shape) for spec in tensors.values())


def values(spec: TensorSpec, pool: torch.Tensor, start: int) -> Iterator[torch.Tensor]:
    """The tensor's rows, about 64 MB at a time, read round and round from the pool."""
    if len(spec.shape) == 1:  # norms
        yield 1 + pool[: spec.shape[0]]
        return
    rows, width = spec.shape
    step = max(1, (1 << 25) // width)
    for row in range(0, rows, step):
        count = min(step, rows - row) * width
        at = (start + row * width) % len(pool)
        pieces = [pool[at:]]
        while sum(map(len, pieces)) < count:
            pieces.append(pool)
        yield torch.cat(pieces)[:count].view(-1, width)


def write_tokenizer(folder: Path) -> None:
    """Bytes and nothing else: every text has tokens, and all ids are in the vocabulary."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=["<|end|>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(["the shapes are what is measured here"], trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<|end|>", "eos_token": "<|end|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
