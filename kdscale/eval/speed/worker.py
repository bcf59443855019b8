"""The process that measures one model: it answers each request, a line of JSON, with another.

Requests (`do`): `load`; `generate`, which reads `batch` prompts of `context` tokens and decodes `new_tokens` after the
first; `grow`, which decodes `batch` sequences that have read the same prompt. A request for more memory than there is
is answered with `lacks_memory`, and the next may ask for less.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from kdscale.errors import KdscaleError, MachineError

if TYPE_CHECKING:
    from kdscale.models.generation.times import Decoder

_SHARE_OF_FREE_MEMORY = 0.8  # what a request may take of it; beyond, the system may end the process without a word


def arguments_of(model: Path, device: str, dtype: str, threads: int, cuda_graphs: bool, code: bool) -> list[str]:
    """The command line of a worker, without the interpreter."""
    flags = (["--cuda-graphs"] if cuda_graphs else []) + (["--trust-remote-code"] if code else [])
    return ["-m", "kdscale.eval.speed.worker", str(model), "--device", device, "--dtype", dtype,
            "--threads", str(threads), *flags]  # fmt: skip


def main(arguments: list[str] | None = None) -> None:
    """Answer the requests on standard input; what libraries print goes to standard error."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    serve(arguments, sys.stdin, lambda answer: print(json.dumps(answer), file=answers, flush=True))


def parsed(arguments: list[str] | None) -> argparse.Namespace:
    """The options on a worker's command line."""
    parser = argparse.ArgumentParser(prog="python -m kdscale.eval.speed.worker", description=main.__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), default="float32")
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--cuda-graphs", action="store_true")
    parser.add_argument("--trust-remote-code", action="store_true")
    return parser.parse_args(arguments)


def serve(arguments: list[str] | None, requests: Iterable[str], answer: Callable[[Mapping[str, Any]], None]) -> None:
    """Call `answer` with what each of the requests gives."""
    options = parsed(arguments)
    model: Measured | None = None
    for line in requests:
        request = json.loads(line)
        model = model or Measured(options)  # not before the first request: its turn to load has come
        answer(model.answer(request))


class Measured:
    """A loaded model, and how each request is measured on it."""

    def __init__(self, options: argparse.Namespace):
        from kdscale.eval.speed.energy import EnergyCounter
        from kdscale.families import load_family
        from kdscale.models.loading import load_model
        from kdscale.runtime.device import peak_memory, resolve_device, resolve_dtype, set_threads
        from kdscale.weights import read_config

        threads = set_threads(options.threads)
        self._device = resolve_device(options.device)
        self._dtype = resolve_dtype(options.dtype, self._device)
        before = int(peak_memory(self._device))
        self._model = load_model(
            options.model, dtype=self._dtype, device=self._device, trust_remote_code=options.trust_remote_code
        )
        embedding: Any = self._model.get_input_embeddings()
        self._vocab = int(embedding.weight.shape[0])
        config = read_config(options.model)
        self._dims = load_family(config, str(options.model / "config.json")).dims(config)
        self._energy = EnergyCounter(self._device)
        self._graphs = options.cuda_graphs and self._device.type == "cuda"
        self._graph: tuple[tuple[int, int, int], Decoder] | None = None
        self._graphs_refused: str | None = None
        self._prompt: Any = None  # a decoder's cache of one prompt, by its length
        self.loaded = {
            "peak_memory_before_loading_bytes": before,
            "dtype": str(self._dtype).removeprefix("torch."),
            "device": self._device.type,
            "threads": threads,
            "no_energy_because": self._energy.why_not,
        }

    def answer(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """What a request gives, or `lacks_memory` and why."""
        from kdscale.runtime.device import is_lack_of_memory, release_memory

        if request["do"] == "load":
            return self.loaded
        needed = self._bytes_of(request)
        if needed > self._free_bytes():
            return {"lacks_memory": f"about {needed / 1e9:.1f} GB"}
        try:
            return self._generate(**request) if request["do"] == "generate" else self._grow(**request)
        except Exception as error:
            if not is_lack_of_memory(error):
                raise
            self._graph = None
            release_memory()
            return {"lacks_memory": " ".join(str(error).split())[:200]}

    def _generate(self, batch: int, context: int, new_tokens: int, **_: Any) -> dict[str, Any]:
        from kdscale.models.generation.times import time_generation
        from kdscale.runtime.device import peak_memory

        decoder = self._decoder(batch, context, new_tokens)
        between: list[float | None] = []
        times = time_generation(
            decoder, self._ids(batch, context), new_tokens, lambda: between.append(self._energy.joules())
        )
        return {
            "first_token": times.first_token,
            "gaps": times.gaps,
            "joules": self._joules_since(between[0]),
            "peak_memory_bytes": int(peak_memory(self._device)),
            "cuda_graphs_refused": self._graphs_refused,
        }

    def _grow(self, batch: int, context: int, new_tokens: int, **_: Any) -> dict[str, Any]:
        from kdscale.models.generation.times import PlainDecoder, time_decoding

        if self._graphs:  # its cache has a fixed number of sequences
            decoder: Any = self._decoder(batch, context, new_tokens)
            decoder.first(self._ids(batch, context))
        else:
            if self._prompt is None or self._prompt[0] != context:
                self._prompt = (context, PlainDecoder(self._model))
                self._prompt[1].first(self._ids(1, context))
            decoder = PlainDecoder(self._model)
            decoder.go_on_from(self._prompt[1], batch, self._ids(batch, 1))
        decoder.following()  # warms up this batch size
        joules = self._energy.joules()
        gaps = time_decoding(decoder, new_tokens)
        return {"gaps": gaps, "joules": self._joules_since(joules)}

    def _decoder(self, batch: int, context: int, new_tokens: int) -> Decoder:
        """A plain decoder, or one with a CUDA graph for this request where graphs are wanted and possible."""
        from kdscale.models.generation.graph import GraphDecoder, GraphRefusedError
        from kdscale.models.generation.times import PlainDecoder

        if not self._graphs or self._graphs_refused:
            return PlainDecoder(self._model)
        key = (batch, context, new_tokens)
        if self._graph is None or self._graph[0] != key:
            self._graph = None  # its memory first
            try:
                decoder = GraphDecoder(self._model, batch, context + new_tokens + 1)
                decoder.record(self._ids(batch, context))
            except GraphRefusedError as refused:
                self._graphs_refused = str(refused)
                return PlainDecoder(self._model)
            self._graph = (key, decoder)
        return self._graph[1]

    def _ids(self, batch: int, tokens: int) -> Any:
        import torch

        generator = torch.Generator().manual_seed(0)
        return torch.randint(self._vocab, (batch, tokens), generator=generator).to(self._device)

    def _joules_since(self, before: float | None) -> float | None:
        now = self._energy.joules()
        return None if before is None or now is None else now - before

    def _bytes_of(self, request: Mapping[str, Any]) -> int:
        """About what a request allocates: the KV cache, what a layer holds while prompts are read, and the logits."""
        dims, batch = self._dims, request["batch"]
        read = request["context"] if request["do"] == "generate" else 1
        length = request["context"] + request["new_tokens"] + 1
        cache = 2 * dims.layers * dims.kv_heads * dims.head_dim * length
        layer = read * (6 * dims.hidden + 3 * dims.ffn)
        return int(batch * (cache + layer + 2 * self._vocab) * self._dtype.itemsize)

    def _free_bytes(self) -> float:
        if self._device.type == "cuda":
            return float("inf")  # too much is an exception there
        import psutil

        return float(_SHARE_OF_FREE_MEMORY * psutil.virtual_memory().available)


def main_of_process() -> NoReturn:
    """`main`, leaving with the exit code of an error and its message alone, as the command line does."""
    try:
        main()
    except KdscaleError as error:
        print(error, file=sys.stderr)
        sys.exit(error.exit_code)
    except Exception as error:
        from kdscale.runtime.device import is_lack_of_memory

        if not is_lack_of_memory(error):
            raise
        print(f"out of memory: {error}", file=sys.stderr)
        sys.exit(MachineError.exit_code)
    sys.exit(0)


if __name__ == "__main__":
    main_of_process()
