"""Tokens per second and memory of tokenising a file, beside `datasets.map` with the same tokenizer.

    python benchmarks/data/tokenizing.py --teacher FOLDER --work /tmp/tokenizing --megabytes 64 --processes 1 2
    python benchmarks/data/tokenizing.py --teacher FOLDER --work ... --megabytes 2000 --form txt --contestants kdscale

The text is that of --source (builtin:classics), repeated with a number in front of each document, in one .jsonl or
.txt file. Every contestant runs in a fresh process. Seconds are of the wall clock and of the processor (all processes
together); memory is the largest sum of the processes' proportional set sizes, seen every 0.25 s, libraries included.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from kdscale.config.data import DataConfig, SourceConfig
from kdscale.data.sources import read_documents


def write_text(path: Path, source: str, megabytes: float) -> None:
    """Write at least so many megabytes (1e6 bytes) of the text of `source`, over and over."""
    texts = [document.text for document in read_documents(SourceConfig(path=source))]
    written = number = 0
    with path.open("w", encoding="utf-8") as stream:
        while written < megabytes * 1e6:
            text = f"{number} {texts[number % len(texts)]}"
            stream.write(json.dumps({"text": text}) + "\n" if path.suffix == ".jsonl" else text + "\n\n")
            written, number = written + len(text.encode()), number + 1


def run_kdscale(teacher: Path, text: Path, out: Path, processes: int) -> int:
    """Build a token store; returns the number of tokens."""
    from kdscale.data.token_store import TokenStore
    from kdscale.models.loading import load_tokenizer
    from kdscale.models.tokenizer.tokenizing import document_end_id
    from kdscale.runtime.progress import Reporter

    tokenizer = load_tokenizer(teacher)
    store = TokenStore.build(
        out,
        DataConfig(sources=(SourceConfig(path=str(text)),), processes=processes),
        tokenizer,
        eos_id=document_end_id(tokenizer),
        reporter=Reporter(quiet=True),
    )
    return sum(store.split(name).tokens for name in ("train", "heldout"))


def run_datasets(teacher: Path, text: Path, out: Path, processes: int) -> int:
    """Tokenise with datasets.map, documents ended alike, into Arrow files; returns the number of tokens."""
    os.environ["TOKENIZERS_PARALLELISM"] = "true" if processes == 1 else "false"
    import datasets

    from kdscale.models.loading import load_tokenizer
    from kdscale.models.tokenizer.tokenizing import document_end_id

    datasets.disable_progress_bars()
    tokenizer = load_tokenizer(teacher)
    end = document_end_id(tokenizer)

    def encode(batch: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        encoded = tokenizer(batch["text"], add_special_tokens=False, return_attention_mask=False)["input_ids"]
        return {"input_ids": [[*ids, end] for ids in encoded]}

    dataset = datasets.load_dataset("json", data_files=str(text), split="train", cache_dir=str(out))
    mapped = dataset.map(encode, batched=True, num_proc=processes, remove_columns=["text"])
    return sum(map(len, mapped.with_format("numpy")["input_ids"]))


CONTESTANTS = {"kdscale": run_kdscale, "datasets": run_datasets}


def tree_memory(pid: int) -> int:
    """Proportional set size of a process and its descendants, in bytes."""
    try:
        rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:  # it has just ended
        return 0
    pss = next((int(line.split()[1]) << 10 for line in rollup.splitlines() if line.startswith("Pss:")), 0)
    return pss + sum(tree_memory(int(child)) for child in children)


def measure(command: list[str]) -> dict[str, Any]:
    """Run a contestant; returns what it prints, and its processor seconds and memory."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    peak, ended = [0], threading.Event()

    def watch() -> None:
        while not ended.wait(0.25):
            peak[0] = max(peak[0], tree_memory(process.pid))

    watcher = threading.Thread(target=watch)
    watcher.start()
    printed, _ = process.communicate()
    ended.set()
    watcher.join()
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} failed")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {**json.loads(printed.splitlines()[-1]), "cpu_seconds": cpu, "memory": peak[0]}


def main() -> None:
    """Measure every contestant, or be one."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--teacher", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--source", default="builtin:classics", help="a file or folder of text, or builtin:NAME")
    parser.add_argument("--megabytes", type=float, default=64)
    parser.add_argument("--form", choices=("jsonl", "txt"), default="jsonl")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--contestants", nargs="+", choices=CONTESTANTS, default=list(CONTESTANTS))
    parser.add_argument("--run", choices=CONTESTANTS, help="what a fresh process is started with")
    args = parser.parse_args()
    text, (processes, *_) = args.work / f"text-{args.megabytes:g}.{args.form}", args.processes
    if args.run:
        out = args.work / f"{args.run}-{processes}-{os.getpid()}"
        started = time.monotonic()
        tokens = CONTESTANTS[args.run](args.teacher, text, out, processes)
        print(json.dumps({"tokens": tokens, "seconds": time.monotonic() - started}))
        return
    args.work.mkdir(parents=True, exist_ok=True)
    write_text(text, args.source, args.megabytes)
    print("| contestant | processes | tokens/s | tokens/s a core | memory, MB |\n|---|---|---|---|---|", flush=True)
    for processes in args.processes:
        for name in args.contestants:
            options = ["--run", name, "--processes", str(processes), "--form", args.form]
            places = ["--teacher", str(args.teacher), "--work", str(args.work), "--megabytes", str(args.megabytes)]
            got = measure([sys.executable, __file__, *options, *places])
            rates = f"{got['tokens'] / got['seconds']:,.0f} | {got['tokens'] / got['cpu_seconds']:,.0f}"
            print(f"| {name} | {processes} | {rates} | {got['memory'] / 1e6:,.0f} |", flush=True)


if __name__ == "__main__":
    main()
