"""A model's GGUF files in llama.cpp beside the model in transformers: greedy continuations, perplexity, size, speed.

python benchmarks/packaging/gguf_beside_transformers.py RUN [--model distilled] [--tokens 512] --work DIR

Perplexity is over the first held-out tokens of RUN, one window, in both programs. llama.cpp gets one token at a time,
as when it writes, with a cache in fp32.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any

import torch
import xllamacpp

from kdscale.cli.arguments import model_folder
from kdscale.data.token_store import TokenStore
from kdscale.eval.samples import Sampling, continue_prompts
from kdscale.models.loading import load_model, load_tokenizer
from kdscale.packaging.gguf_writer import write_gguf
from kdscale.runs.folder import RunFolder
from kdscale.runtime.progress import Reporter

PROMPTS = (
    "The capital of France is",
    "Once upon a time there was a miller who",
    "def fibonacci(n):\n",
    "The difference between a noun and a verb is that",
    "In 1984 the price of bread",
    "She opened the door and saw",
    "Water boils at",
    "To install the program, first",
)


def server(path: Path, context: int) -> Any:
    parameters = xllamacpp.CommonParams()
    parameters.model.path = str(path)
    parameters.n_ctx, parameters.n_parallel, parameters.verbosity = context, 1, -1
    parameters.cpuparams.n_threads = torch.get_num_threads()
    parameters.cache_type_k = parameters.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    parameters.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    return xllamacpp.Server(parameters)


def continuation(llama_cpp: Any, prompt: str, tokens: int) -> tuple[str, float]:
    """The greedy continuation, and llama.cpp's own rate in tokens a second."""
    started = time.perf_counter()
    answer = llama_cpp.handle_completions({"prompt": prompt, "n_predict": tokens, "temperature": 0.0})
    return answer["choices"][0]["text"], answer["usage"]["completion_tokens"] / (time.perf_counter() - started)


def log_probability(llama_cpp: Any, ids: list[int], following: int) -> float:
    """Of the token `following` after `ids`: it is made to be drawn, and the bias comes after the probabilities."""
    question = {"prompt": ids, "n_predict": 1, "temperature": 0.0, "n_probs": 1, "logit_bias": [[following, 1e4]]}
    answer = llama_cpp.handle_completions({**question, "cache_prompt": True})
    said = answer["choices"][0]["logprobs"]
    return math.nan if not said else float(said["content"][0]["logprob"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--model", default="distilled")
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--types", default="bf16,q8_0,q4_0")
    parser.add_argument("--work", type=Path, required=True)
    options = parser.parse_args()
    folder = model_folder(options.run, options.model)
    tokenizer = load_tokenizer(folder)
    ids = TokenStore.open(RunFolder(options.run).data).split("heldout").tokens_T[: options.tokens].tolist()
    rows: dict[str, dict[str, Any]] = {}
    wanted: list[str] = []
    reference = torch.empty(0)
    for dtype in (torch.float32, torch.bfloat16):
        model: Any = load_model(folder, dtype=dtype, device=torch.device("cpu"))
        with torch.inference_mode():
            log_p = model(torch.tensor([ids])).logits[0, :-1].float().log_softmax(-1)
        said = continue_prompts(model, tokenizer, PROMPTS, options.new_tokens, Sampling())
        wanted = wanted or said
        drawn = log_p.gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
        reference = drawn if len(reference) == 0 else reference
        rows[f"transformers {dtype}"] = {
            "perplexity": math.exp(-drawn.mean().item()),
            "same continuations": sum(a == b for a, b in zip(said, wanted, strict=True)),
        }
        del model
    for kind in options.types.split(","):
        written = write_gguf(folder, options.work / f"{options.model}-{kind}.gguf", kind, Reporter())
        llama_cpp = server(written.path, options.tokens + 64)
        answers = [continuation(llama_cpp, prompt, options.new_tokens) for prompt in PROMPTS]
        found = [log_probability(llama_cpp, ids[:at], ids[at]) for at in range(1, len(ids))]
        pairs = [(a, b) for a, b in zip(found, reference.tolist(), strict=True) if not math.isnan(a)]
        rows[kind] = {
            "MB": round(written.bytes / 1e6, 1),
            "perplexity": math.exp(-sum(a for a, _ in pairs) / len(pairs)),
            "transformers on the same tokens": math.exp(-sum(b for _, b in pairs) / len(pairs)),
            "of tokens": len(pairs),
            "largest difference of a log-probability": max(abs(a - b) for a, b in pairs),
            "same continuations": sum(a == b for (a, _), b in zip(answers, wanted, strict=True)),
            "first characters alike": [common(a, b) for (a, _), b in zip(answers, wanted, strict=True)],
            "tokens/s": round(max(rate for _, rate in answers), 1),
        }
        print(json.dumps({kind: rows[kind]}), flush=True)
    print(json.dumps(rows, indent=1))


def common(a: str, b: str) -> str:
    """How far two texts agree: `57/130`."""
    same = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    return f"{same}/{len(b)}"


if __name__ == "__main__":
    main()
