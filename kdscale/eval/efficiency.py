"""Speed and memory of a model as plain transformers runs it, batch of one, greedy.

Peak memory is only exact in a process that never held anything else, and timings are only fair when other load on the
machine slows all models alike. So each model gets a process of its own (`python -m kdscale.eval.efficiency MODEL_DIR`),
all of them stay alive, and the parent lets them work strictly in turn, one round at a time. Where the models do not fit
in memory together they run one after another, and the result says so (`interleaved: false`).
"""

from __future__ import annotations

import argparse
import json
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NoReturn

from kdscale.config.evaluation.settings import EvalConfig
from kdscale.errors import ERRORS_BY_CODE, Interrupted, KdscaleError, MachineError
from kdscale.eval.sizes import fit_together

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from kdscale.runtime.progress import Reporter

REPEATS = 5


def measure(
    models: Mapping[str, Path],
    cfg: EvalConfig,
    *,
    device: str,
    threads: int,
    reporter: Reporter,
    trust_remote_code: bool = False,
    repeats: int = REPEATS,
) -> dict[str, dict[str, Any]]:
    """Speed and peak memory of each model.

    Raises what a model's process raised, MachineError when it ran out of memory or was killed, RuntimeError with its
    trace when it failed as it never should.
    """
    options = ["--device", device, "--dtype", cfg.dtype, "--threads", str(threads), "--repeats", str(repeats)]
    options += ["--prefill-tokens", str(cfg.prefill_tokens), "--decode-tokens", str(cfg.decode_tokens)]
    options += ["--trust-remote-code"] if trust_remote_code else []

    def command(name: str) -> list[str]:
        return [sys.executable, "-m", "kdscale.eval.efficiency", str(models[name]), "--in-turns", *options]

    together = fit_together(models, cfg.dtype, device)
    groups = [list(models)] if together else [[name] for name in models]
    results: dict[str, dict[str, Any]] = {}
    with reporter.bar("speed and memory", len(models) * (repeats + 1), unit="round") as bar:
        for names in groups:
            with ExitStack() as stack:
                workers = {name: stack.enter_context(worker(models[name], command(name))) for name in names}
                # Load in turn too: a model that loads while another is timed would slow it down.
                for name, process in workers.items():
                    process.take_turn()
                    bar.advance(1, name)
                for round_number in range(repeats):
                    order = names if round_number % 2 == 0 else names[::-1]
                    for name in order:
                        workers[name].take_turn()
                        bar.advance(1, name)
                for name, process in workers.items():
                    results[name] = {**process.take_turn(), "interleaved": together and len(models) > 1}
    return results


@dataclass(frozen=True)
class Worker:
    """The process that measures one model."""

    path: Path
    process: subprocess.Popen[str]
    errors: IO[str]

    def take_turn(self) -> dict[str, Any]:
        """Let the process do its next round and wait for the one line that it answers with."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        try:
            self.process.stdin.write("go\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise self._failure()
        return json.loads(line)

    def _failure(self) -> BaseException:
        """What to raise for a process that has ended early: its own kind of error."""
        code, what = self.process.wait(), f"measuring {self.path} failed"
        self.errors.seek(0)
        said = self.errors.read().strip()[-2000:] or "no output"
        if -code in (signal.SIGINT, signal.SIGTERM):
            return Interrupted(-code, f"while {self.path} was measured")
        if code < 0:
            hint = "the system may have run out of memory: lower eval.prefill_tokens, or set eval.efficiency to false"
            return MachineError(what, got=f"its process was ended by {signal.Signals(-code).name}\n{said}", hint=hint)
        if code in ERRORS_BY_CODE:
            return ERRORS_BY_CODE[code](what, got=said)
        return RuntimeError(f"{what}\n{said}")


@contextmanager
def worker(path: Path, command: Sequence[str]) -> Iterator[Worker]:
    """Run `command`, which measures the model in `path` in turns, as long as the block lasts."""
    with tempfile.TemporaryFile("w+", encoding="utf-8") as errors:
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True, env=_child_environment()
        )
        try:
            yield Worker(path, process, errors)
        finally:
            process.kill()
            process.communicate()


def _child_environment() -> dict[str, str]:
    """The parent's environment and module path, so that the child finds kdscale where the parent found it."""
    import os

    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "HF_HUB_OFFLINE": "1"}


def main(arguments: list[str] | None = None) -> None:
    """Measure one model and print one JSON line; `--in-turns` waits for a line on stdin before each round."""
    parser = argparse.ArgumentParser(prog="python -m kdscale.eval.efficiency", description=main.__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), default="float32")
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--repeats", type=int, default=REPEATS)
    parser.add_argument("--prefill-tokens", type=int, default=256)
    parser.add_argument("--decode-tokens", type=int, default=32)
    parser.add_argument("--trust-remote-code", action="store_true")
    parser.add_argument("--in-turns", action="store_true")
    options = parser.parse_args(arguments)
    rounds = _rounds(options)
    answer: dict[str, Any] = {}
    while not answer:
        if options.in_turns and not sys.stdin.readline():
            return  # the parent has gone
        answer = next(rounds)
        if options.in_turns and not answer:
            print("{}", flush=True)
    print(json.dumps(answer), flush=True)


def _rounds(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Load and warm up, then `repeats` rounds, each yielding {}; last the figures."""
    import torch

    from kdscale.models.loading import load_model
    from kdscale.runtime.device import peak_memory, resolve_device, resolve_dtype, set_threads

    threads = set_threads(options.threads)
    device = resolve_device(options.device)
    dtype = resolve_dtype(options.dtype, device)
    before = int(peak_memory(device))
    model = load_model(options.model, dtype=dtype, device=device, trust_remote_code=options.trust_remote_code)
    embedding: Any = model.get_input_embeddings()
    vocab = int(embedding.weight.shape[0])
    generator = torch.Generator().manual_seed(0)
    prompt_1S = torch.randint(vocab, (1, options.prefill_tokens), generator=generator).to(device)
    _time_round(model, prompt_1S, min(4, options.decode_tokens))
    yield {}
    timed = []
    for _ in range(options.repeats):
        timed.append(_time_round(model, prompt_1S, options.decode_tokens))
        yield {}
    prefill = [options.prefill_tokens / seconds for seconds, _ in timed]
    decode = [options.decode_tokens / seconds for _, seconds in timed]
    yield {
        "prefill_tokens_per_second": statistics.median(prefill),
        "prefill_tokens_per_second_range": [min(prefill), max(prefill)],
        "decode_tokens_per_second": statistics.median(decode),
        "decode_tokens_per_second_range": [min(decode), max(decode)],
        "peak_memory_bytes": int(peak_memory(device)),
        "peak_memory_before_loading_bytes": before,
        "prefill_tokens": options.prefill_tokens,
        "decode_tokens": options.decode_tokens,
        "repeats": options.repeats,
        "dtype": str(dtype).removeprefix("torch."),
        "device": device.type,
        "threads": threads,
    }


def _time_round(model: PreTrainedModel, prompt_1S: Any, decode_tokens: int) -> tuple[float, float]:
    """Seconds for the prompt (up to the first new token) and for `decode_tokens` further tokens after it."""
    import torch

    from kdscale.eval.samples import Sampling, next_tokens

    def now() -> float:
        if prompt_1S.is_cuda:
            torch.cuda.synchronize()
        return time.perf_counter()

    start = now()
    tokens = next_tokens(model, prompt_1S, Sampling())
    next(tokens)
    prefilled = now()
    for _ in range(decode_tokens):
        next(tokens)
    return prefilled - start, now() - prefilled


def _main_of_process() -> NoReturn:
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
    _main_of_process()
