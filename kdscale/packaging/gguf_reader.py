"""A Llama GGUF file, read back into the standard format: safetensors, config.json, tokenizer.json.

Written against the GGUF specification (ggml/docs/gguf.md) and the permutation that llama.cpp's converter applies to
query and key rows. Only what the catalog's teachers need is here: architecture `llama`, a byte-level BPE tokenizer.

Dimension letters: Q rows of a projection, H hidden.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from kdscale.errors import CheckpointError
from kdscale.families import load_family
from kdscale.files import write_json, write_text
from kdscale.packaging.gguf_names import gguf_name, halves_from_pairs
from kdscale.runtime.packages import require_packages

if TYPE_CHECKING:
    import torch
    from tokenizers import Tokenizer

_CONTROL_TOKEN = 3  # gguf token type: special, never split, left out of decoded text


def gguf_reader_class() -> Any:
    """The package gguf's GGUFReader. Raises ConfigError where the package is not installed."""
    require_packages("this teacher comes as a GGUF file", ("gguf",), "gguf")
    from gguf import GGUFReader

    return GGUFReader


class GgufLlama:
    """One opened GGUF file. Raises ConfigError without the `gguf` package, CheckpointError on another architecture."""

    def __init__(self, path: Path):
        self.path = path
        reader_class = gguf_reader_class()
        try:
            self._reader = reader_class(path)
        except (ValueError, IndexError, OSError) as error:
            raise CheckpointError(f"{path} is not a readable GGUF file", got=str(error)) from error
        if (architecture := self.field("general.architecture")) != "llama":
            raise CheckpointError(f"{path} cannot be converted", expected="architecture llama", got=repr(architecture))

    def field(self, key: str) -> Any:
        """A metadata value as plain Python. Raises CheckpointError when the file does not carry it."""
        field = self._reader.get_field(key)
        if field is None:
            raise CheckpointError(f"{self.path} lacks the field {key}")
        return field.contents()

    def config(self, dtype: str, eos_ids: list[int]) -> dict[str, Any]:
        """config.json of a LlamaForCausalLM; the head is tied when the file carries no `output.weight`."""
        hidden, heads = int(self.field("llama.embedding_length")), int(self.field("llama.attention.head_count"))
        return {
            "architectures": ["LlamaForCausalLM"],
            "attention_bias": False,
            "attention_dropout": 0.0,
            "bos_token_id": int(self.field("tokenizer.ggml.bos_token_id")),
            "dtype": dtype,
            "eos_token_id": eos_ids[0],
            "head_dim": int(self.field("llama.rope.dimension_count")),
            "hidden_act": "silu",
            "hidden_size": hidden,
            "initializer_range": 0.02,
            "intermediate_size": int(self.field("llama.feed_forward_length")),
            "max_position_embeddings": int(self.field("llama.context_length")),
            "mlp_bias": False,
            "model_type": "llama",
            "num_attention_heads": heads,
            "num_hidden_layers": int(self.field("llama.block_count")),
            "num_key_value_heads": int(self.field("llama.attention.head_count_kv")),
            "pad_token_id": int(self.field("tokenizer.ggml.padding_token_id")),
            # stored as float32: 9.99999975e-06 was written as 1e-05
            "rms_norm_eps": float(f"{self.field('llama.attention.layer_norm_rms_epsilon'):.7g}"),
            "rope_parameters": {"rope_type": "default", "rope_theta": float(self.field("llama.rope.freq_base"))},
            "tie_word_embeddings": all(tensor.name != "output.weight" for tensor in self._reader.tensors),
            "use_cache": True,
            "vocab_size": int(self.field("llama.vocab_size")),
        }

    def tensors(self, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        """Every tensor under its transformers name: dequantised in fp32, rounded once to `dtype`."""
        import torch
        from gguf.quants import dequantize

        heads, kv_heads = (
            int(self.field("llama.attention.head_count")),
            int(self.field("llama.attention.head_count_kv")),
        )
        config = self.config("float32", [0])
        specs = load_family(config, str(self.path)).tensors(config)
        standard = {gguf_name(spec.role, spec.layer): name for name, spec in specs.items()}
        out = {}
        for tensor in self._reader.tensors:
            if (name := standard.get(tensor.name)) is None:
                raise CheckpointError(f"{self.path} holds a tensor that a Llama does not have", got=tensor.name)
            weight = np.asarray(dequantize(tensor.data, tensor.tensor_type), dtype=np.float32)
            if name.endswith("q_proj.weight"):
                weight = halves_from_pairs(weight, heads)
            elif name.endswith("k_proj.weight"):
                weight = halves_from_pairs(weight, kv_heads)
            out[name] = torch.from_numpy(np.array(weight)).to(dtype)
        return out

    def tokenizer(self) -> Tokenizer:
        """The byte-level BPE tokenizer. Raises CheckpointError for a pre-tokenizer other than `smollm`.

        The pre-tokenizer decides the splits that the merges were learned on, and GGUF carries only its name. `smollm`
        splits off every digit, then applies GPT-2's byte-level regex.
        """
        from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

        model, splitter = self.field("tokenizer.ggml.model"), self.field("tokenizer.ggml.pre")
        if (model, splitter) != ("gpt2", "smollm"):
            raise CheckpointError(
                f"{self.path}: unknown tokenizer", expected="gpt2 with pre-tokenizer smollm", got=f"{model}, {splitter}"
            )
        tokens, types = self.field("tokenizer.ggml.tokens"), self.field("tokenizer.ggml.token_type")
        merges = [tuple(merge.split(" ")) for merge in self.field("tokenizer.ggml.merges")]
        tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=True, use_regex=True),
            ]
        )
        tokenizer.decoder = decoders.ByteLevel()
        special = [token for token, token_type in zip(tokens, types, strict=True) if token_type == _CONTROL_TOKEN]
        tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
        return tokenizer


def write_checkpoint(gguf: GgufLlama, folder: Path, dtype: str, eos_ids: list[int]) -> None:
    """Write the standard files of `gguf` into `folder` (which exists): weights, configs, tokenizer, chat template."""
    import torch
    from safetensors.torch import save_file

    config = gguf.config(dtype, eos_ids)
    write_json(folder / "config.json", config)
    tensors = gguf.tensors(getattr(torch, dtype))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "model.safetensors").chmod((folder / "config.json").stat().st_mode)  # safetensors writes it as 0600
    special = {key: config[key] for key in ("bos_token_id", "pad_token_id")}
    write_json(folder / "generation_config.json", {**special, "eos_token_id": eos_ids})
    gguf.tokenizer().save(str(folder / "tokenizer.json"), pretty=True)
    tokens = gguf.field("tokenizer.ggml.tokens")
    tokenizer_config = {
        "add_prefix_space": False,
        "bos_token": tokens[config["bos_token_id"]],
        "clean_up_tokenization_spaces": False,
        "eos_token": tokens[eos_ids[0]],
        "model_max_length": config["max_position_embeddings"],
        "pad_token": tokens[config["pad_token_id"]],
        # not GPT2Tokenizer: transformers 5 gives that class its own pre-tokenizer, whatever tokenizer.json says
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": tokens[int(gguf.field("tokenizer.ggml.unknown_token_id"))],
    }
    write_json(folder / "tokenizer_config.json", tokenizer_config)
    write_text(folder / "chat_template.jinja", gguf.field("tokenizer.chat_template"))
    _check_reload(folder, gguf)


def _check_reload(folder: Path, gguf: GgufLlama) -> None:
    """Check that AutoTokenizer loads what was built: it splits alike, and text comes back exactly."""
    from kdscale.models.loading import load_tokenizer

    loaded, built = load_tokenizer(folder), gguf.tokenizer()
    for text in ("In 1984 it cost 12,345.67, or 3x less.", "  tabs\tand\n\nlines; naïve café — 東京 🙂 don't 10:30"):
        ids = loaded(text, add_special_tokens=False)["input_ids"]
        if ids != built.encode(text, add_special_tokens=False).ids or loaded.decode(ids) != text:
            raise CheckpointError(
                f"{folder} does not load with the tokenizer that was written",
                got=f"{text!r} becomes {json.dumps(loaded.convert_ids_to_tokens(ids))}",
                hint="this version of transformers changes the pre-tokenizer; please report it",
            )
