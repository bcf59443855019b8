"""A package on disk: the model in its forms, its card and report, what serves it, what tests it, and its checksums.

The folder is what is published: the first form that transformers loads lies at its top, where hubs look for a model.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import kdscale
from kdscale.errors import ConfigError, FileError, KdscaleError, RunFolderError, raise_together
from kdscale.files import atomic_dir, explain_os_errors, read_json, write_json, write_text
from kdscale.models.multimodal.language_part import auto_class
from kdscale.packaging import front_matter
from kdscale.packaging.bundle import ollama, serving
from kdscale.packaging.bundle.checksums import SUMS, write_sums
from kdscale.packaging.bundle.forms import Form, Source
from kdscale.packaging.model_card import with_part
from kdscale.runs.folder import CARD
from kdscale.runtime.progress import Reporter
from kdscale.units import format_size

PACKAGE = "package.json"  # what a folder must have to be a package; the smoke test reads it too
FORMAT = 1
SMOKE_TEST = "smoke_test.py"
DOCKERFILE, COMPOSE, MODELFILE = "Dockerfile", "compose.yaml", "Modelfile"

_MARGIN_BYTES = 64 << 20  # report, checksums and what else is small
PROMPT = "The capital of France is"
_LICENCES = ("LICENSE*", "LICENCE*")


@dataclass(frozen=True)
class Placed:
    """A form in the package: `path` is relative to the package's folder, `.` for its top."""

    form: Form
    path: str


@dataclass(frozen=True)
class Extras:
    """What goes along with the model: the card's text, files to copy by their name in the package, and a prompt."""

    card: str
    fields: Mapping[str, Any]  # of the card's front matter, where it lacks them
    overrides: Mapping[str, Any]  # of the card's front matter, whatever it has
    files: Mapping[str, Path]
    prompt: str = PROMPT


def write_package(
    source: Source, forms: Sequence[Form], extras: Extras, out: Path, reporter: Reporter, replace: bool = False
) -> Path:
    """Write the package to the folder `out`, which appears complete or not at all; returns it.

    Raises ConfigError (a folder that is there, a form that cannot be made), RunFolderError (no room) and
    CheckpointError (a model that cannot be read), all before anything is written.
    """
    check_place(out, replace)
    _check(source, forms, out)
    card_fields, body = front_matter.split(extras.card, CARD)  # refused here, and not after hours of writing
    places, served = _places(source.name, forms), served_name(source.name)
    with atomic_dir(out) as tmp:
        for place in places:
            reporter.say(f"  {place.form.title}: {place.path}")
            place.form.write(source, tmp / place.path, reporter)
        for name, path in extras.files.items():
            shutil.copyfile(path, tmp / name)
        notes = _write_serving(tmp, source, places, served, reporter)
        shutil.copyfile(Path(__file__).with_name(SMOKE_TEST), tmp / SMOKE_TEST)
        write_json(tmp / PACKAGE, _description(source, places, served, extras.prompt, tmp))
        fields = {**extras.fields, **card_fields, **extras.overrides}
        part = _how_to_use(tmp, source, places, served, notes)
        write_text(tmp / CARD, front_matter.join(fields, with_part(body, "use", part)))
        write_sums(tmp)
    return out


def served_name(name: str) -> str:
    """The name under which a server offers the model, which is also that of the image: `Qwen3_0.6B` → `qwen3-0-6b`."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") or "student"


def read_package(folder: Path) -> dict[str, Any]:
    """package.json of a folder. Raises ConfigError for a folder that is no package."""
    try:
        found = read_json(folder / PACKAGE, expect=dict)
    except FileError as error:
        raise ConfigError(
            f"{folder} is not a package", expected=f"a folder with {PACKAGE}", got=error.got or error.what,
            hint="kdscale package RUN makes one",
        ) from error  # fmt: skip
    if found.get("format") != FORMAT or not isinstance(found.get("forms"), list):
        raise ConfigError(
            f"{folder / PACKAGE}", expected=f"a package of format {FORMAT}", got=f"format {found.get('format')!r}"[:99]
        )
    return dict(found)


def check_place(out: Path, replace: bool) -> None:
    """Raises ConfigError when something is at `out` already that is not to be replaced, or is no package."""
    if not out.is_symlink() and (not out.exists() or (out.is_dir() and not any(out.iterdir()))):
        return
    if not replace or out.is_symlink():
        raise ConfigError(
            f"{out} is there already", expected="a new folder",
            hint="choose another with --out, or replace a package with --replace",
        )  # fmt: skip
    read_package(out)


def _check(source: Source, forms: Sequence[Form], out: Path) -> None:
    errors: list[KdscaleError] = []
    for form in forms:
        try:
            form.check(source)
        except KdscaleError as error:
            errors.append(error)
    raise_together(errors)
    need = {form.name: form.nbytes(source) for form in forms}
    parent = next(path for path in out.absolute().parents if path.exists())
    with explain_os_errors(out):
        free = shutil.disk_usage(parent).free
    if sum(need.values()) + _MARGIN_BYTES > free:
        listed = ", ".join(f"{name} {format_size(size)}" for name, size in need.items())
        raise RunFolderError(
            f"the disk of {out} has no room for the package",
            expected=f"{format_size(sum(need.values()) + _MARGIN_BYTES)} free ({listed})", got=format_size(free),
            hint="name fewer --forms, or another disk with --out",
        )  # fmt: skip


def _places(name: str, forms: Sequence[Form]) -> list[Placed]:
    """Where each form goes: the first folder of weights to the top, the others below, GGUF files at the top."""
    places, top = [], next((form for form in forms if form.kind == "transformers"), None)
    for form in forms:
        path = "." if form is top else form.name if form.kind == "transformers" else f"{name}-{form.name[5:]}.gguf"
        places.append(Placed(form, path))
    return places


def _of_kind(places: Sequence[Placed], kind: str) -> list[Placed]:
    return [place for place in places if place.form.kind == kind]


def _write_serving(
    folder: Path, source: Source, places: Sequence[Placed], served: str, reporter: Reporter
) -> list[str]:
    """Dockerfile and compose.yaml for vLLM, Modelfile for Ollama; returns what they could not say."""
    notes = []
    if weights := _of_kind(places, "transformers"):
        folders = [folder / place.path for place in weights]
        write_text(folder / DOCKERFILE, serving.dockerfile(folders, served, source.own_code))
        write_text(folder / COMPOSE, serving.compose(served))
    if files := _of_kind(places, "gguf"):
        licence = next((path for glob in _LICENCES for path in sorted(source.student.glob(glob))), None)
        text = licence.read_text(encoding="utf-8", errors="replace") if licence else ""
        content, note = ollama.modelfile(files[0].path, source.student, text)
        write_text(folder / MODELFILE, content)
        notes += [note] if note else []
    for note in notes:
        reporter.say(f"  note: {note}")
    return notes


def _description(source: Source, places: Sequence[Placed], served: str, prompt: str, folder: Path) -> dict[str, Any]:
    forms = [
        {
            "name": place.form.name, "title": place.form.title, "kind": place.form.kind, "path": place.path,
            "bytes": _weights(folder, place),
        }
        for place in places
    ]  # fmt: skip
    return {
        "format": FORMAT, "name": source.name, "served_name": served, "prompt": prompt, "own_code": source.own_code,
        "auto_class": auto_class(source.student),
        "forms": forms, "made_by": f"kdscale {kdscale.__version__}",
    }  # fmt: skip


def _weights(folder: Path, place: Placed) -> int:
    path = folder / place.path
    return path.stat().st_size if path.is_file() else sum(item.stat().st_size for item in path.glob("*.safetensors"))


def _how_to_use(folder: Path, source: Source, places: Sequence[Placed], served: str, notes: Sequence[str]) -> str:
    """The card's part on use. Names of forms and of the model are plain words: the config allows no others."""
    rows = "\n".join(
        f"| {place.form.title} | `{place.path}` | {format_size(_weights(folder, place))} |" for place in places
    )
    parts = [f"## How to use it\n\n| form | where | size |\n|---|---|---:|\n{rows}"]
    if weights := _of_kind(places, "transformers"):
        quantized = any(place.form.name in source.quantized for place in weights)
        few_bits = "\n\nForms with fewer bits need the package compressed-tensors." if quantized else ""
        code = ", trust_remote_code=True" if source.own_code else ""
        parts.append(
            "With transformers, by the path of this folder or its name on a hub:\n\n```python\n"
            f"from transformers import {(loader := auto_class(source.student))}, AutoTokenizer\n\n"
            'folder = "."\n'
            f'model = {loader}.from_pretrained(folder, dtype="auto"{code})\n'
            f"tokenizer = AutoTokenizer.from_pretrained(folder{code})\n```"
            + "".join(f'\n\nThe form {place.form.title}: add `subfolder="{place.path}"`.' for place in weights[1:])
            + few_bits
        )
        line = serving.in_shell(serving.serve_line(served, source.own_code))
        parts.append(
            f"With vLLM, or in a container with an OpenAI-compatible API on port {serving.PORT} of this machine. All "
            "layers have the same sizes, so engines load it as any other model of its family.\n\n```sh\n"
            f"{line}\n```\n\n```sh\n{serving.SET_TOKEN}\ndocker compose up --build\n```"
        )
    if _of_kind(places, "gguf"):
        parts.append(
            f"With Ollama:\n\n```sh\nollama create {served} -f {MODELFILE}\nollama run {served}\n```"
            + "".join(f"\n\nNote: {note}." for note in notes)
        )
    parts.append(
        "To check the files, and that the model answers a prompt (through a server, transformers or xllamacpp):\n\n"
        f"```sh\nsha256sum -c {SUMS}\npython {SMOKE_TEST}\n```"
    )
    return "\n\n".join(parts)
