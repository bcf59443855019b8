"""All kernels of kdscale_kernels against every peer that is installed: time, peak memory, gradient error.

    PYTHONPATH=.:kernels OMP_NUM_THREADS=2 python benchmarks/kernels/run.py                   the CPU table
    PYTHONPATH=.:kernels OMP_NUM_THREADS=2 python benchmarks/kernels/run.py --table official  its first shape
    PYTHONPATH=.:kernels python benchmarks/kernels/run.py --device cuda                      the GPU table
    PYTHONPATH=.:kernels python benchmarks/kernels/run.py --measure errors --shape 64 576 8192 64

Writes <out>/kernels-<device>-<date>.csv and .html, and prints the targets met and missed. Every contestant gets a row
for every op, shape and direction; one that is not installed or cannot run says so in `status` and `reason`. Peers come
with `pip install kdscale[bench]`.
"""

from __future__ import annotations

import argparse
import datetime
import platform
import re
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch
from contestants import BACKWARD, BOTH, KDSCALE, Contestant
from measure import Key, Setting, gradient_errors, interleaved, registry
from memory import peak_bytes
from page import write_page
from peers import version
from rows import ERROR_COLUMNS, Row, add_times, write_csv
from shapes import TABLES, LossShape
from verdicts import verdicts

OPS = ("linear_sparse_kl", "teacher_and_student", "linear_topk_lse", "sparse_kl")
WHAT = ("times", "peaks", "errors")
OUT = Path(__file__).resolve().parents[1] / "results"


def device_name(device: torch.device) -> str:
    """The GPU's or the processor's name."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    match = re.search(r"model name\s*:\s*(.+)", info.read_text()) if info.exists() else None
    return (match[1].strip() if match else platform.processor()) or platform.machine()


def _named(contestant: Contestant, wanted: list[str]) -> bool:
    """Whether a contestant, as the progress shows it, begins with one of these."""
    return any(", ".join(contestant.key).startswith(text) for text in wanted)


class Table:
    """Collects rows; what is common to all of them is looked up once."""

    def __init__(self, args: argparse.Namespace):
        self.args = args
        self.device = torch.device(args.device)
        self.dtype = getattr(torch, args.dtype)
        self.rows: list[Row] = []
        self.common = {
            "dtype": args.dtype,
            "device": device_name(self.device),
            "threads": torch.get_num_threads() if self.device.type == "cpu" else "",
            "torch": torch.__version__,
            "triton": version("triton"),
            "date": datetime.date.today().isoformat(),
        }

    def contestants(self, op: str) -> list[Contestant]:
        """Who takes part in an op, given the options."""
        contestants = [c for c in registry(self.device) if c.op == op]
        if self.args.contestants:
            contestants = [c for c in contestants if c.key == KDSCALE or _named(c, self.args.contestants)]
        if not self.args.no_compile:
            return contestants
        return [replace(c, absent=c.absent or "left out by --no-compile") if c.compiled else c for c in contestants]

    def row(self, contestant: Contestant, shape: LossShape, direction: str, failure: str) -> Row:
        """A row without numbers: ok, or why there are none."""
        status, _, reason = failure.partition(": ") if failure else ("ok", "", "")
        n, h, v, k = shape
        row = Row(
            contestant.op,
            contestant.name,
            contestant.mode,
            contestant.loss or "",
            direction,
            status,
            reason,
            n,
            h,
            v,
            k,
            **self.common,
        )
        row.peer = f"{contestant.package} {version(contestant.package)}".strip()
        return row

    def measure(self, op: str, shape: LossShape) -> None:
        """Add the rows of an op at one shape."""
        contestants = self.contestants(op)
        torch.compiler.reset()  # or the limit of recompilations turns the later shapes into eager ones, silently
        errors: dict[Key, dict[str, float]] = {}
        if "errors" in self.args.measure and "forward+backward" in self.args.directions:
            say(f"{op}  {shape}  gradient errors")
            errors = gradient_errors(contestants, Setting(shape, self.dtype, self.device, "forward+backward"))
        for direction in self.args.directions:
            taking_part = [c for c in contestants if direction in c.directions]
            if not taking_part:
                continue
            setting = Setting(shape, self.dtype, self.device, direction)
            rounds = self.args.rounds if "times" in self.args.measure else 0
            say(f"{op}  {shape}  {direction}: {len(taking_part)} contestants, {rounds} rounds")
            times, wrong = interleaved(taking_part, setting, rounds)
            for contestant in taking_part:
                row = self.row(contestant, shape, direction, wrong.get(contestant.key, ""))
                if times.get(contestant.key):
                    add_times(row, times[contestant.key], times.get(KDSCALE), self.device.type == "cpu")
                if row.status == "ok" and "peaks" in self.args.measure:
                    self.add_peak(row, contestant, setting)
                if direction in BACKWARD:
                    for name, error in errors.get(contestant.key, {}).items():
                        setattr(row, f"error_{name}", float(f"{error:.2g}"))
                self.rows.append(row)
                say_row(row)

    def add_peak(self, row: Row, contestant: Contestant, setting: Setting) -> None:
        """Enter the peak memory of one contestant."""
        peak, failure = peak_bytes(contestant, setting)
        if peak is not None:
            row.peak_bytes = peak
        row.reason = failure and f"peak memory: {failure}"


def say(text: str) -> None:
    """Print a line of progress."""
    print(f"{time.strftime('%H:%M:%S')}  {text}", file=sys.stderr, flush=True)


def say_row(row: Row) -> None:
    """Print what was measured for a row."""
    if row.status != "ok":
        say(f"    {row.label}: {row.status}: {row.reason}")
        return
    peak = f"{int(row.peak_bytes) / 2**20:.0f} MiB" if row.peak_bytes != "" else "-"
    errors = " ".join(str(getattr(row, column)) or "-" for column in ERROR_COLUMNS)
    ratios = f"ratio {row.ratio_to_ours or '-'}, processor time {row.cpu_ratio_to_ours or '-'}"
    ratios += f" (calling thread {row.caller_ratio_to_ours or '-'})"
    say(f"    {row.label}: {row.seconds_median or '-'} s, {ratios}, {peak}, errors {errors}")


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    parser.add_argument("--table", choices=sorted(TABLES), help="default: cpu or gpu, by device")
    parser.add_argument("--shape", type=int, nargs=4, action="append", metavar=("N", "H", "V", "K"), help="instead")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--ops", nargs="+", choices=OPS, default=OPS)
    parser.add_argument(
        "--contestants", nargs="+", metavar="NAME", help="only ours (auto) and those whose name, mode begins so"
    )
    parser.add_argument("--rounds", type=int, help="default: 5 on a CPU, 30 on a GPU")
    parser.add_argument("--no-compile", action="store_true", help="leave out what needs torch.compile")
    parser.add_argument("--directions", nargs="+", choices=BOTH, default=BOTH)
    parser.add_argument("--measure", nargs="+", choices=WHAT, default=WHAT)
    parser.add_argument("--out", type=Path, default=OUT, help="folder for the CSV and the page")
    args = parser.parse_args()
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no GPU here")
    if args.rounds is None:
        args.rounds = 5 if args.device == "cpu" else 30
    if args.rounds < 1:
        parser.error(f"--rounds: expected at least 1, got {args.rounds}")
    return args


def main() -> None:
    """Measure, write the table and its page, and judge the targets."""
    args = parse()
    table = Table(args)
    shapes = args.shape or TABLES[args.table or ("cpu" if table.device.type == "cpu" else "gpu")]
    slug = re.sub(r"[^a-z0-9]+", "-", str(table.common["device"]).lower()).strip("-")
    path = args.out / f"kernels-{slug}-{table.common['date']}.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    for shape in shapes:
        for op in args.ops:
            table.measure(op, LossShape(*shape))
            write_csv(path, table.rows)  # after each op: an interrupted run keeps what it has
            write_page(path.with_suffix(".html"), table.rows, verdicts(table.rows), " ".join(sys.argv[1:]))
    for verdict in verdicts(table.rows):
        word = {True: "met", False: "MISSED", None: "not measured"}[verdict.met]
        print(f"{word:12}  {verdict.target}: {verdict.measured} (target {verdict.limit})")
    print(path)
    print(path.with_suffix(".html"))


if __name__ == "__main__":
    main()
