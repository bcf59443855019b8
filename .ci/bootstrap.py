"""Make a virtual environment with kdscale in it, using the torch that is already there if it is good enough.

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
# The release that CI and the demo are run with when no torch is there yet; any torch from MIN_TORCH on is welcome.
TORCH = "2.13.0"
MIN_TORCH = (2, 6)


def main() -> int:
    if sys.version_info < (3, 11):  # noqa: UP036 - this very check is for older ones
        print(f"kdscale needs Python 3.11 or newer; this is {sys.version.split()[0]}. Try: make PYTHON=python3.12 ...")
        return 2
    target, extras = Path(sys.argv[1]), sorted(sys.argv[2:])
    python = target / "bin" / "python"
    stamp = target / f".kdscale-{'-'.join(extras) or 'core'}"
    wanted = fingerprint()
    if python.exists() and stamp.exists() and stamp.read_text() == wanted:
        return 0
    started = time.monotonic()
    own = installed_torch()
    if not python.exists():
        print(f"making {target}" + (f" on top of the installed torch {own['version']}" if own else ""), flush=True)
        venv.EnvBuilder(with_pip=True, system_site_packages=own is not None and not in_venv()).create(target)
        if own is not None and in_venv():
            # A venv cannot stack on a venv by itself: name the outer one's packages in a .pth file.
            site = sysconfig.get_path("purelib", vars={"base": str(target), "platbase": str(target)})
            (Path(site) / "outer-environment.pth").write_text(own["folder"] + "\n")
    if own is None:
        install_torch(python)
    spec = str(ROOT) + (f"[{','.join(extras)}]" if extras else "")
    print("installing kdscale and what it needs (a minute or two)", flush=True)
    pip(python, "-e", spec, "-c", str(CONSTRAINTS))
    stamp.write_text(wanted)
    print(f"environment ready in {time.monotonic() - started:.0f} s", flush=True)
    return 0


def fingerprint() -> str:
    """What the environment was made from; a change of any of it makes the next call install again."""
    digest = hashlib.sha256(sys.version.encode())
    for path in (ROOT / "pyproject.toml", CONSTRAINTS, Path(__file__)):
        digest.update(path.read_bytes())
    digest.update(str(ROOT).encode())
    return digest.hexdigest()


def in_venv() -> bool:
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
    found: dict[str, str] = json.loads(probe.stdout.strip().splitlines()[-1])
    version = tuple(int(part) for part in found["version"].split("+")[0].split(".")[:2])
    return found if version >= MIN_TORCH else None


def install_torch(python: Path) -> None:
    """A CUDA build where there is a GPU; else a CPU build where pip knows one; else whatever pip has.

    KDSCALE_TORCH_INDEX names a package index to take torch from (for a CPU build on a plain Linux machine, say).
    """
    have = subprocess.run([str(python), "-c", "import torch"], capture_output=True, check=False)
    if have.returncode == 0:
        return
    index = os.environ.get("KDSCALE_TORCH_INDEX")
    where = ["--index-url", index] if index else []
    has_gpu = shutil.which("nvidia-smi") is not None
    tries = [f"torch=={TORCH}"] if has_gpu else [f"torch=={TORCH}+cpu", f"torch=={TORCH}"]
    print(f"installing torch {TORCH} ({'GPU' if has_gpu else 'CPU'} machine)", flush=True)
    for spec in tries[:-1]:
        if pip(python, spec, *where, must=False):
            return
    pip(python, tries[-1], *where)


def pip(python: Path, *args: str, must: bool = True) -> bool:
    command = [str(python), "-m", "pip", "install", "-q", "--disable-pip-version-check", *args]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode and must:
        print(done.stdout, done.stderr, sep="\n", file=sys.stderr)
        raise SystemExit(f"pip could not install {args[0]} (exit code {done.returncode}); see its message above")
    return done.returncode == 0


if __name__ == "__main__":
    raise SystemExit(main())
