"""Make a virtual environment with kdscale in it, on top of an installed torch if that is new enough.

    python3 .ci/bootstrap.py .venv [extra ...]

Standard library only: this runs before anything is installed. Does nothing when the environment is up to date.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import time
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CONSTRAINTS = ROOT / ".ci" / "constraints.txt"
# The release to install where there is no torch yet; any installed torch from MIN_TORCH on is used as it is.
TORCH = "2.13.0"
MIN_TORCH = (2, 6)


def main() -> int:
    """Make or update the environment that the command line names; returns the exit code."""
    if sys.version_info < (3, 11):  # noqa: UP036 - older versions reach this check
        print(f"kdscale needs Python 3.11 or newer; this is {sys.version.split()[0]}. Try: make PYTHON=python3.12 ...")
        return 2
    target, extras = Path(sys.argv[1]), sorted(sys.argv[2:])
    python = target / "bin" / "python"
    stamp = target / f".kdscale-{'-'.join(extras) or 'core'}"
    current = fingerprint()
    if python.exists() and stamp.exists() and stamp.read_text() == current:
        return 0
    started = time.monotonic()
    outer_torch = installed_torch()
    if not python.exists():
        base = f" on top of the installed torch {outer_torch['version']}" if outer_torch else ""
        print(f"making {target}{base}", flush=True)
        share = outer_torch is not None and not in_venv()
        venv.EnvBuilder(with_pip=True, system_site_packages=share).create(target)
        if outer_torch is not None and in_venv():
            # A venv does not see the packages of an outer venv: a .pth file names their folder.
            site = sysconfig.get_path("purelib", vars={"base": str(target), "platbase": str(target)})
            (Path(site) / "outer-environment.pth").write_text(outer_torch["folder"] + "\n")
    if outer_torch is None:
        install_torch(python)
    spec = str(ROOT) + (f"[{','.join(extras)}]" if extras else "")
    print("installing kdscale and what it needs (a minute or two)", flush=True)
    pip(python, "-e", spec, "-c", str(CONSTRAINTS))
    stamp.write_text(current)
    print(f"environment ready in {time.monotonic() - started:.0f} s", flush=True)
    return 0


def fingerprint() -> str:
    """A digest of what the environment is made from; the next call installs again when it changes."""
    digest = hashlib.sha256(sys.version.encode())
    for path in (ROOT / "pyproject.toml", CONSTRAINTS, Path(__file__)):
        digest.update(path.read_bytes())
    digest.update(str(ROOT).encode())
    return digest.hexdigest()


def in_venv() -> bool:
    """Whether the Python that runs this is in a virtual environment."""
    return sys.prefix != sys.base_prefix


def installed_torch() -> dict[str, str] | None:
    """Version and folder of a suitable torch in the Python that runs this, or None."""
    code = (
        "import json, pathlib, torch;"
        "print(json.dumps({'version': torch.__version__, 'folder': str(pathlib.Path(torch.__file__).parent.parent)}))"
    )
    probe = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    if probe.returncode:
        return None
    torch: dict[str, str] = json.loads(probe.stdout.strip().splitlines()[-1])
    version = tuple(int(number) for number in torch["version"].split("+")[0].split(".")[:2])
    return torch if version >= MIN_TORCH else None


def install_torch(python: Path) -> None:
    """Install a CUDA build where there is a GPU; else a CPU build if pip knows one; else what pip has.

    KDSCALE_TORCH_INDEX names the package index for torch, for example one with CPU builds.
    """
    probe = subprocess.run([str(python), "-c", "import torch"], capture_output=True, check=False)
    if probe.returncode == 0:
        return
    index = os.environ.get("KDSCALE_TORCH_INDEX")
    index_option = ["--index-url", index] if index else []
    has_gpu = shutil.which("nvidia-smi") is not None
    builds = [f"torch=={TORCH}"] if has_gpu else [f"torch=={TORCH}+cpu", f"torch=={TORCH}"]
    print(f"installing torch {TORCH} ({'GPU' if has_gpu else 'CPU'} machine)", flush=True)
    for spec in builds[:-1]:
        if pip(python, spec, *index_option, required=False):
            return
    pip(python, builds[-1], *index_option)


def pip(python: Path, *args: str, required: bool = True) -> bool:
    """Run pip install; returns whether it worked. Ends this program when a required package cannot be installed."""
    command = [str(python), "-m", "pip", "install", "-q", "--disable-pip-version-check", *args]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode and required:
        print(done.stdout, done.stderr, sep="\n", file=sys.stderr)
        raise SystemExit(f"pip could not install {args[0]} (exit code {done.returncode}); see its message above")
    return done.returncode == 0


if __name__ == "__main__":
    raise SystemExit(main())
