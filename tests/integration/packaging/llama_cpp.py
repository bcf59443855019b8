"""llama.cpp in this process: a tiny GGUF file loaded by xllamacpp, asked for log-probabilities, text and token ids."""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import xllamacpp


class LlamaCpp:
    """One loaded file; the cache is in fp32 and attention unfused, so that only the model can make a difference."""

    def __init__(self, path: Path, context: int = 256):
        parameters = xllamacpp.CommonParams()
        parameters.model.path = str(path)
        parameters.n_ctx, parameters.n_parallel, parameters.warmup, parameters.verbosity = context, 1, False, -1
        parameters.cpuparams.n_threads = 1
        parameters.cache_type_k = parameters.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        parameters.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        self._server = xllamacpp.Server(parameters)

    def log_probabilities(self, ids: Sequence[int], vocab: int, plain_token: int) -> dict[int, float]:
        """Of every token after `ids`. `plain_token`, whose text is whole characters, is made to be drawn."""
        answer = self._complete(
            list(ids), 1, n_probs=vocab, logit_bias=[[plain_token, 1e4]]
        )  # the bias comes after the log-probabilities
        return {entry["id"]: entry["logprob"] for entry in answer["logprobs"]["content"][0]["top_logprobs"]}

    def continuation(self, prompt: str, tokens: int) -> str:
        """The greedy continuation of a text."""
        text: str = self._complete(prompt, tokens)["text"]
        return text

    def tokenize(self, text: str) -> list[int]:
        """The ids of a text, with what the tokenizer adds by itself."""
        content = {"content": text, "add_special": True, "parse_special": True}
        request = urllib.request.Request(f"{self._server.listening_address}/tokenize", json.dumps(content).encode())
        with urllib.request.urlopen(request, timeout=60) as answer:
            ids: list[int] = json.load(answer)["tokens"]
        return ids

    def _complete(self, prompt: str | list[int], tokens: int, **more: Any) -> dict[str, Any]:
        question = {"prompt": prompt, "n_predict": tokens, "temperature": 0.0, "seed": 0, **more}
        answer = self._server.handle_completions(question)
        assert "choices" in answer, answer
        choice: dict[str, Any] = answer["choices"][0]
        return choice
