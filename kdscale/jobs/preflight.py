"""Whether several hosts can run one job: what each host reports, and what the reports show together.

`python -m kdscale.jobs.preflight COMMAND ARGUMENT CONFIG [KEY=VALUE ...]` runs on the hosts and prints one JSON line;
`compare_reports` compares what came back. Nothing is left on disk.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import kdscale
from kdscale.config.load import load_config
from kdscale.config.root import Config
from kdscale.errors import ConfigError, KdscaleError, SelfCheckError
from kdscale.jobs.doctor import Finding, Severity, not_too_old
from kdscale.runs.folder import RunFolder
from kdscale.runs.lineage import distilled_from, merged_teacher
from kdscale.runtime.exits import leave
from kdscale.runtime.versions import PACKAGES, version_of, versions

_MARK = ".preflight-"
_MIN_FREE_BYTES = 1 << 30
_MAX_SKEW_SECONDS = 5.0
_COLLECTIVE_MEGABYTES = 4
_SERVICE_SECONDS = 10.0

Report = Mapping[str, Any]


# --- on the launching machine


def compare_reports(
    reports: Mapping[str, Report], slots: Mapping[str, int], skews: Mapping[str, tuple[float, float]]
) -> list[Finding]:
    """What the reports (by host name) show together. The first host is the reference for what must be equal.

    `skews` are seconds by which a host's clock is ahead, and the uncertainty.
    """
    findings = []
    for topic in ("python", "kdscale", "source", *PACKAGES):
        installed = {host: report["versions"].get(topic) for host, report in reports.items()}
        finding = _compare(topic, installed)
        findings.append(not_too_old(finding, next(iter(installed.values()))) if finding.severity == "ok" else finding)
    broken = {host: report["config_error"] for host, report in reports.items() if report["config_error"]}
    if broken:
        findings.append(Finding("config", "bad", _by_host(broken)))
    else:
        findings.append(_compare("config", {host: report["config"][:12] for host, report in reports.items()}))
        findings.append(_compare("teacher", {host: report["teacher"] for host, report in reports.items()}))
        unwritable = {host: report["write_error"] for host, report in reports.items() if report["write_error"]}
        text = _by_host(unwritable) or "writable everywhere"
        findings.append(Finding("run folder", "bad" if unwritable else "ok", text))
        findings.append(_check_free_space(reports))
        findings += [*_check_kernels(reports), *_check_services(reports)]
    return [*findings, _check_devices(reports, slots), _check_clocks(skews)]


def check_shared_folder(missing: Mapping[str, Sequence[str]]) -> Finding:
    """Whether all hosts see one folder; `missing` lists, for each host, the hosts whose mark it does not see."""
    problems = {host: f"does not see what {', '.join(writers)} wrote" for host, writers in missing.items() if writers}
    text = _by_host(problems) or "every host reads what the others write"
    return Finding("shared folder", "bad" if problems else "ok", text)


def _compare(topic: str, values: Mapping[str, str | None]) -> Finding:
    first, reference = next(iter(values.items()))
    shown = {host: value or "not installed" for host, value in values.items()}
    different = {host: text for host, text in shown.items() if values[host] != reference}
    if different:
        return Finding(topic, "bad", f"{_by_host(different)}; {first} has {shown[first]}")
    return Finding(topic, "ok" if reference else "bad", shown[first])


def _check_free_space(reports: Mapping[str, Report]) -> Finding:
    host = min(reports, key=lambda host: reports[host]["free_bytes"])
    free = reports[host]["free_bytes"]
    return Finding("disk", "ok" if free > _MIN_FREE_BYTES else "bad", f"{free / 1e9:.1f} GB free ({host})")


def _check_kernels(reports: Mapping[str, Report]) -> list[Finding]:
    """Whether Triton launched a kernel on every host with GPUs; where it did not, all ranks compute in torch.

    Then what makes products slow on GPUs or with the torch of some hosts.
    """
    if not any(report["gpus"] for report in reports.values()):
        return []
    obstacles = {host: report["kernels"] for host, report in reports.items() if report["kernels"]}
    note = "all ranks will compute in torch, slower: "
    text = note + _by_host(obstacles) if obstacles else "Triton launched a kernel on every host"
    slow = {host: report["slow"] for host, report in reports.items() if report["slow"]}
    products = [Finding("products", "note", _by_host(slow))] if slow else []
    return [Finding("kernels", "note" if obstacles else "ok", text), *products]


def _check_services(reports: Mapping[str, Report]) -> list[Finding]:
    """What is wrong with the teacher's services, where the teacher is served and something is."""
    answers = {host: report["services"] for host, report in reports.items() if report["services"]}
    severity: Severity = "bad" if any(answer[0] == "bad" for answer in answers.values()) else "note"
    texts = {host: text for host, (_, text) in answers.items()}
    return [Finding("teacher service", severity, _by_host(texts))] if answers else []


def _check_devices(reports: Mapping[str, Report], slots: Mapping[str, int]) -> Finding:
    gpus = {host: int(report["gpus"]) for host, report in reports.items()}
    if not any(gpus.values()):
        cores = {host: int(report["cores"]) for host, report in reports.items()}
        full = {host: f"{slots[host]} slots on {n} cores" for host, n in cores.items() if slots[host] > n}
        return Finding("devices", "note" if full else "ok", _by_host(full) or "no GPU anywhere: ranks run on the CPU")
    short = {host: f"{slots[host]} slots, {n} GPUs visible" for host, n in gpus.items() if slots[host] > n}
    first = next(iter(reports))  # where rank 0 prunes and evaluates
    if (error := reports[first]["too_many_ranks"]) is not None:
        short[first] = error
    return Finding("devices", "bad" if short else "ok", _by_host(short) or f"{sum(gpus.values())} GPUs")


def _check_clocks(skews: Mapping[str, tuple[float, float]]) -> Finding:
    if not skews:
        return Finding("clocks", "bad", "no host answered")
    seconds, uncertainty = max(skews.values(), key=lambda skew: abs(skew[0]))
    far = {host: f"{skew:+.1f} s" for host, (skew, unsure) in skews.items() if abs(skew) - unsure > _MAX_SKEW_SECONDS}
    good = f"within {1000 * abs(seconds):.1f} ± {1000 * uncertainty:.1f} ms"
    return Finding("clocks", "bad" if far else "ok", _by_host(far) or good)


def _by_host(texts: Mapping[str, str]) -> str:
    return "; ".join(f"{host}: {text}" for host, text in texts.items())


# --- on each host


def probe(mark: str, config_path: str, overrides: Sequence[str]) -> dict[str, Any]:
    """A report of this host; leaves `mark` in the run folder's logs for the other hosts to see."""
    report: dict[str, Any] = {
        "versions": {**versions(), **{name: version_of(name) for name in PACKAGES}, "source": _source_digest()},
        "cores": os.cpu_count(),
        "gpus": 0,
        "kernels": None,
        "slow": None,
        "too_many_ranks": None,
        "services": None,
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
    if config.runtime.device != "cpu" and (gpus := _count_gpus()):
        report |= {"gpus": gpus, **_try_gpus(config)}
    report["services"] = _ask_services(config, teacher)
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


def _try_gpus(config: Config) -> dict[str, str | None]:
    """What is wrong with this host's GPUs for the stages that one host does alone, and for kernels."""
    import torch

    from kdscale.distill.parallel.dtypes import slow_products
    from kdscale.pipeline.checks import check_devices
    from kdscale.pipeline.stages.registry import stages_of, stages_of_steps
    from kdscale.runtime.device import resolve_dtype
    from kdscale.runtime.kernel_backend import try_launch

    gpu, error = torch.device("cuda", 0), None
    slow = "; ".join(slow_products(gpu, resolve_dtype(config.distill.dtype, gpu)))
    try:
        of_steps = stages_of_steps(config)
        check_devices(
            config, *([stage for stage in some if not stage.across_job] for some in (stages_of(config), of_steps))
        )
    except KdscaleError as refusal:
        error = " ".join(str(refusal).split())
    return {"too_many_ranks": error, "kernels": try_launch(config), "slow": slow or None}


def _ask_services(config: Config, teacher: Path) -> list[str] | None:
    """How bad it is, and what is wrong with the teacher's services as this host reaches them; None: nothing, or none.

    A service that does not answer may be started while the run prunes; one that refuses will still refuse then.
    """
    teachers = config.distill.by_teacher()
    try:
        for one in teachers.values():
            if one.source.name == "endpoint":
                one.endpoint.key("distill.endpoint")
    except ConfigError as error:  # the variable did not reach this host
        return ["bad", " ".join(str(error).split())]
    services = [(name, one.served) for name, one in teachers.items() if one.source.name == "served"]
    if not services:
        return None
    import httpx

    from kdscale.teacher.folders import teacher_folders
    from kdscale.teacher.remote import check_services, read_token
    from kdscale.weights import checkpoint_identity

    run = RunFolder(Path(config.run_dir))
    learned_from, merged = distilled_from(run, config, teacher), merged_teacher(config, run)
    if merged is not None and learned_from == teacher:
        learned_from = merged  # what will be served, once the adapters are in it
    folders = teacher_folders(config, learned_from)
    for name, served in services:
        if not folders[name].exists():
            return ["note", f"the model that it has to serve, {folders[name]}, is not there yet"]
        try:
            token = read_token(served.token_path(Path(config.run_dir)))
            seconds = min(served.timeout, _SERVICE_SECONDS)
            check_services(served.urls, token, checkpoint_identity(folders[name]), seconds)
        except KdscaleError as error:
            silent = isinstance(error.__cause__, httpx.TransportError)
            return ["note" if silent else "bad", " ".join(str(error).split())]
    return None


def _source_digest() -> str:
    """A digest of kdscale's own source, which differs between checkouts of one version."""
    digest = hashlib.sha256()
    package = Path(kdscale.__file__).parent
    for path in sorted(package.rglob("*.py")):
        digest.update(path.relative_to(package).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:12]


def _count_gpus() -> int:
    if not (any(Path("/dev").glob("nvidia[0-9]*")) or Path("/dev/kfd").exists()):
        return 0  # without loading torch
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def unseen_marks(marks: Sequence[str], config_path: str, overrides: Sequence[str], seconds: float = 5.0) -> list[str]:
    """The marks that cannot be read here, after `seconds` for a network file system to catch up."""
    logs = _logs(config_path, overrides)
    deadline = time.monotonic() + seconds
    while True:
        list(logs.iterdir())  # makes NFS look again
        unseen = [mark for mark in marks if not _holds(logs / f"{_MARK}{mark}", mark)]
        if not unseen or time.monotonic() > deadline:
            return unseen
        time.sleep(0.1)


def _holds(path: Path, text: str) -> bool:
    try:
        return path.read_text(encoding="utf-8") == text
    except OSError:
        return False


def remove_marks(marks: Sequence[str], config_path: str, overrides: Sequence[str]) -> None:
    """Delete the marks from the run folder's logs."""
    logs = _logs(config_path, overrides)
    for mark in marks:
        (logs / f"{_MARK}{mark}").unlink(missing_ok=True)


def _logs(config_path: str, overrides: Sequence[str]) -> Path:
    return Path(load_config(Path(config_path), list(overrides)).run_dir).absolute() / "logs"


def collective(seconds: float, config_path: str, overrides: Sequence[str]) -> dict[str, float]:
    """One all_reduce over all ranks within `seconds`; its time in ms, and MB/s for 4 MB. Raises SelfCheckError."""
    import torch
    import torch.distributed as dist

    from kdscale.runtime.gpu_binding import claim_gpu, rank_device
    from kdscale.runtime.ranks import join_launched_group
    from kdscale_launch.rendezvous import set_interfaces

    set_interfaces(os.environ)
    name = load_config(Path(config_path), list(overrides)).runtime.device
    claim = claim_gpu(name, os.environ)
    device = rank_device(name)
    join_launched_group("nccl" if device.type == "cuda" else "gloo", device, timedelta(seconds=seconds))
    ones = torch.ones(1, device=device)
    dist.all_reduce(ones)
    if int(ones.item()) != dist.get_world_size():
        raise SelfCheckError("all_reduce of ones", expected=str(dist.get_world_size()), got=str(ones.item()))
    began = time.perf_counter()
    dist.all_reduce(ones)
    float(ones.item())
    trip = time.perf_counter() - began
    block = torch.ones(_COLLECTIVE_MEGABYTES << 18, device=device)
    began = time.perf_counter()
    dist.all_reduce(block)
    float(block[0].item())
    rate = _COLLECTIVE_MEGABYTES / (time.perf_counter() - began)
    dist.barrier()
    dist.destroy_process_group()
    claim.close()
    return {"milliseconds": 1000 * trip, "megabytes_per_second": rate}


# Each takes its argument, the config's path and the overrides. `probe` runs as one command on all hosts: what the
# launcher sets on each tells their marks apart.
_COMMANDS: dict[str, Callable[[str, str, Sequence[str]], Any]] = {
    "probe": lambda mark, config, settings: probe(f"{mark}-{os.environ['KDSCALE_HOST_INDEX']}", config, settings),
    "shared": lambda marks, config, settings: unseen_marks(marks.split(","), config, settings),
    "clean": lambda marks, config, settings: remove_marks(marks.split(","), config, settings),
    "collective": lambda seconds, config, settings: collective(float(seconds), config, settings),
}


def main(arguments: Sequence[str]) -> int:
    """Run one command and print its answer as JSON; returns the exit code."""
    try:
        if len(arguments) < 3 or arguments[0] not in _COMMANDS:
            usage = f"{' | '.join(_COMMANDS)}, then ARGUMENT CONFIG [KEY=VALUE ...]"
            given = " ".join(arguments) or "nothing"
            raise ConfigError("python -m kdscale.jobs.preflight", expected=usage, got=given)
        command, argument, config, *overrides = arguments
        answer = _COMMANDS[command](argument, config, overrides)
    except KdscaleError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    print(json.dumps(answer), flush=True)
    return 0


if __name__ == "__main__":
    leave(main(sys.argv[1:]))
