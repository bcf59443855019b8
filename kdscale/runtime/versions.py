"""Versions of the packages that decide the numbers."""

from __future__ import annotations

import platform
from importlib import metadata

from packaging.version import InvalidVersion, Version

import kdscale
from kdscale.errors import MachineError

# Older torch lacks functions that are called. DeepSpeed before 0.19.8, told to add bf16 gradients up in fp32, adds them
# in bf16 at stage 2, wrongly (up to 20 %) at stage 1 with offload, and cannot skip a step at stage 1 without; before
# 0.19.3 it also rounds RoPE's frequencies to bf16.
OLDEST = {"torch": "2.6", "deepspeed": "0.19.8"}
PACKAGES = ("torch", "transformers", "deepspeed", "safetensors", "tokenizers", "numpy")


def version_of(package: str) -> str | None:
    """The installed version; None where there is none to be read. Never raises: it is asked after hours of work."""
    try:
        return metadata.version(package)
    except (metadata.PackageNotFoundError, KeyError, OSError, ValueError):
        return None


def is_too_old(package: str, version: str | None) -> bool:
    """Whether this version of a package is older than OLDEST says; False for a version that cannot be read (None)."""
    oldest = OLDEST.get(package, "0")
    try:
        return Version(version or oldest) < Version(oldest)
    except InvalidVersion:
        return False


def check_deepspeed() -> None:
    """Raises MachineError for a DeepSpeed with which gradients would be wrong."""
    version, oldest = version_of("deepspeed"), OLDEST["deepspeed"]
    if is_too_old("deepspeed", version):
        raise MachineError(
            "DeepSpeed", expected=f"{oldest} or newer, which adds gradients up as it is told to",
            got=str(version), hint=f"pip install 'deepspeed>={oldest}', on every host",
        )  # fmt: skip


def versions() -> dict[str, str]:
    """kdscale, Python and the packages that decide the numbers; "unknown" where metadata is missing or damaged."""
    packages = {name: version_of(name) or "unknown" for name in PACKAGES}
    return {"kdscale": kdscale.__version__, "python": platform.python_version(), **packages}
