"""Whether several hosts can run one job: what each host reports, and what the reports say together.

`python -m kdscale.jobs.preflight probe|shared|clean|collective ...` runs on the hosts and prints one JSON line; `judge`
compares what came back. Nothing is left on disk.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from datetime import timedelta
from importlib import metadata
from pathlib import Path
from typing import Any

import kdscale
from kdscale.config.load import load_config
from kdscale.errors import KdscaleError
from kdscale.jobs.doctor import Finding

_PACKAGES = ("torch", "transformers", "deepspeed", "safetensors", "tokenizers", "numpy")


_MARK = ".preflight-"


_MIN_FREE_BYTES = 1 << 30


_MAX_SKEW_SECONDS = 5.0


_COLLECTIVE_MEGABYTES = 4


Report = Mapping[str, Any]


def judge(
    reports: Mapping[str, Report], slots: Mapping[str, int], skews: Mapping[str, tuple[float, float]]
) -> list[Finding]:
    """What the hosts' probes (by host name) say together. The first host is the reference for what must be equal."""
    out = []
    for topic in ("python", "kdscale", "source", *_PACKAGES):
        out.append(_same(topic, {host: str(report["versions"].get(topic)) for host, report in reports.items()}))
    broken = {host: report["config_error"] for host, report in reports.items() if report["config_error"]}
    if broken:
        out.append(Finding("config", "bad", _listed(broken)))
    else:
        out.append(_same("config", {host: report["config"][:12] for host, report in reports.items()}))
        out.append(_same("teacher", {host: report["teacher"] for host, report in reports.items()}))
        unwritable = {host: report["write_error"] for host, report in reports.items() if report["write_error"]}
        out.append(Finding("run folder", "bad" if unwritable else "ok", _listed(unwritable) or "writable everywhere"))
        out += _room(reports)
    return [*out, *_devices(reports, slots), _clocks(skews)]


def judge_shared(missing: Mapping[str, Sequence[str]]) -> Finding:
    """`missing`: for each host, the hosts whose mark it does not see."""
    bad = {host: f"does not see what {', '.join(names)} wrote" for host, names in missing.items() if names}
    return Finding("shared folder", "bad" if bad else "ok", _listed(bad) or "what one host writes all others read")


def _same(topic: str, values: Mapping[str, str]) -> Finding:
    first, reference = next(iter(values.items()))
    others = {host: value for host, value in values.items() if value != reference}
    if others:
        return Finding(topic, "bad", f"{_listed(others)}; {first} has {reference}")
    return Finding(topic, "bad" if reference == "None" else "ok", reference)


def _room(reports: Mapping[str, Report]) -> list[Finding]:
    least = min(reports, key=lambda host: reports[host]["free_bytes"])
    free = reports[least]["free_bytes"]
    return [Finding("disk", "ok" if free > _MIN_FREE_BYTES else "bad", f"{free / 1e9:.1f} GB free ({least})")]


def _devices(reports: Mapping[str, Report], slots: Mapping[str, int]) -> list[Finding]:
    gpus = {host: int(report["gpus"]) for host, report in reports.items()}
    if not any(gpus.values()):
        cores = {host: int(report["cores"]) for host, report in reports.items()}
        full = {host: f"{slots[host]} slots on {n} cores" for host, n in cores.items() if slots[host] > n}
        return [Finding("devices", "note" if full else "ok", _listed(full) or "no GPU anywhere: ranks run on the CPU")]
    short = {host: f"{slots[host]} slots, {n} GPUs visible" for host, n in gpus.items() if slots[host] > n}
    return [Finding("devices", "bad" if short else "ok", _listed(short) or f"{sum(gpus.values())} GPUs")]


def _clocks(skews: Mapping[str, tuple[float, float]]) -> Finding:
    if not skews:
        return Finding("clocks", "bad", "no host answered")
    worst = max(skews, key=lambda host: abs(skews[host][0]))
    seconds, uncertainty = skews[worst]
    far = {host: f"{skew:+.1f} s" for host, (skew, unsure) in skews.items() if abs(skew) - unsure > _MAX_SKEW_SECONDS}
    good = f"within {1000 * abs(seconds):.1f} ± {1000 * uncertainty:.1f} ms"
    return Finding("clocks", "bad" if far else "ok", _listed(far) or good)


def _listed(by_host: Mapping[str, str]) -> str:
    return "; ".join(f"{host}: {value}" for host, value in by_host.items())


def probe(mark: str, config_path: str, overrides: Sequence[str]) -> dict[str, Any]:
    """What this host is and has; leaves `mark` in the run folder's logs for the other hosts to find."""
    report: dict[str, Any] = {
        "versions": _versions(),
        "cores": os.cpu_count(),
        "gpus": _gpus(),
        "config_error": None,
        "write_error": None,
        "free_bytes": 0,
        "teacher": None,
    }
    try:
        config = load_config(Path(config_path), list(overrides))
        from kdscale.weights import resolve_teacher

        teacher = resolve_teacher(config.teacher)
    except KdscaleError as error:
        return {**report, "config_error": " ".join(str(error).split())}
    report["config"] = config.fingerprint()
    report["teacher"] = hashlib.sha256((teacher / "config.json").read_bytes()).hexdigest()[:12]
    logs = Path(config.run_dir).absolute() / "logs"
    try:
        logs.mkdir(parents=True, exist_ok=True)
        (logs / f"{_MARK}{mark}").write_text(mark, encoding="utf-8")
        report["free_bytes"] = shutil.disk_usage(logs).free
    except OSError as error:
        report["write_error"] = f"{logs}: {error.strerror}"
    return report


def _versions() -> dict[str, str | None]:
    found: dict[str, str | None] = {"python": platform.python_version(), "kdscale": kdscale.__version__}
    digest = hashlib.sha256()
    package = Path(kdscale.__file__).parent
    for path in sorted(package.rglob("*.py")):
        digest.update(path.relative_to(package).as_posix().encode() + b"\0" + path.read_bytes())
    found["source"] = digest.hexdigest()[:12]
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found


def _gpus() -> int:
    if not (any(Path("/dev").glob("nvidia[0-9]*")) or Path("/dev/kfd").exists()):
        return 0
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def shared(marks: Sequence[str], config_path: str, overrides: Sequence[str], seconds: float = 5.0) -> list[str]:
    """The marks of other hosts that cannot be read here, after a moment for a network file system to catch up."""
    logs = Path(load_config(Path(config_path), list(overrides)).run_dir).absolute() / "logs"
    deadline = time.monotonic() + seconds
    while True:
        list(logs.iterdir())  # makes NFS look again
        missing = [mark for mark in marks if not _holds(logs / f"{_MARK}{mark}", mark)]
        if not missing or time.monotonic() > deadline:
            return missing
        time.sleep(0.1)


def _holds(path: Path, text: str) -> bool:
    try:
        return path.read_text(encoding="utf-8") == text
    except OSError:
        return False


def clean(marks: Sequence[str], config_path: str, overrides: Sequence[str]) -> None:
    logs = Path(load_config(Path(config_path), list(overrides)).run_dir).absolute() / "logs"
    for mark in marks:
        (logs / f"{_MARK}{mark}").unlink(missing_ok=True)


def collective(seconds: float, config_path: str, overrides: Sequence[str]) -> dict[str, float]:
    """One all_reduce over all ranks within `seconds`; its time in ms and MB/s for 4 MB."""
    import torch
    import torch.distributed as dist

    from kdscale.runtime.device import resolve_device
    from kdscale_launch.rendezvous import set_gloo_interface

    set_gloo_interface(os.environ)
    device = resolve_device(load_config(Path(config_path), list(overrides)).runtime.device)
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(seconds=seconds))
    one = torch.ones(1, device=device)
    dist.all_reduce(one)
    if int(one.item()) != dist.get_world_size():
        raise SystemExit(f"all_reduce of ones over {dist.get_world_size()} ranks gave {one.item()}")
    began = time.perf_counter()
    dist.all_reduce(one)
    float(one.item())
    trip = time.perf_counter() - began
    block = torch.ones(_COLLECTIVE_MEGABYTES << 18, device=device)
    began = time.perf_counter()
    dist.all_reduce(block)
    float(block[0].item())
    rate = _COLLECTIVE_MEGABYTES / (time.perf_counter() - began)
    dist.barrier()
    dist.destroy_process_group()
    return {"milliseconds": 1000 * trip, "megabytes_per_second": rate}


def main(arguments: Sequence[str]) -> int:
    what, argument, config, *overrides = arguments
    if what == "probe":
        # one command serves all hosts; what the launcher sets on each tells their marks apart
        answer: Any = probe(f"{argument}-{os.environ['KDSCALE_HOST_INDEX']}", config, overrides)
    elif what == "shared":
        answer = shared(argument.split(","), config, overrides)
    elif what == "clean":
        clean(argument.split(","), config, overrides)
        answer = None
    else:
        answer = collective(float(argument), config, overrides)
    print(json.dumps(answer), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
