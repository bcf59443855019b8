"""A package is whole or absent, holds what it says, and loads."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from kdscale.errors import ConfigError, FileError, RunFolderError, SelfCheckError
from kdscale.files import read_json
from kdscale.packaging import front_matter
from kdscale.packaging.bundle import contents, smoke_test
from kdscale.packaging.bundle.checksums import SUMS, verified_files
from kdscale.packaging.bundle.contents import Extras, read_package, write_package
from kdscale.packaging.bundle.forms import Form, Source, chosen, forms_of, usual_forms
from kdscale.runtime.progress import Reporter
from kdscale.weights import Checkpoint

QUIET = Reporter(quiet=True)
CARD = "---\nlicense: mit\n---\n# Ours\n\nMade for tea.\n"
Write = Callable[..., Path]


@pytest.fixture
def source(tmp_path: Path, tiny_llama_dir: Path) -> Source:
    (tmp_path / "run").mkdir()
    student = tmp_path / "run" / "student"
    shutil.copytree(tiny_llama_dir, student)
    (student / "LICENSE").write_text("The licence.")
    (student / "optimizer.pt").write_text("no part of a model")
    return Source(name="tiny", student=student, max_shard_bytes=100_000)


@pytest.fixture
def write(source: Source, tmp_path: Path) -> Write:
    (tmp_path / "report.html").write_text("<p>report")

    def call(forms: str = "bf16", out: str = "package", card: str = CARD, **options: Any) -> Path:
        extras = Extras(
            card=card, fields={"license": "apache-2.0", "base_model": "org/big"}, overrides={"language": ["de"]},
            files={"report.html": tmp_path / "report.html"}, prompt="The river",
        )  # fmt: skip
        return write_package(source, chosen(source, forms), extras, tmp_path / out, QUIET, **options)

    return call


def test_a_package_holds_its_forms_and_what_it_says(source: Source, write: Write) -> None:
    folder = write("bf16,unchanged")
    names = verified_files(folder)
    assert {SUMS, *names} == {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    expected = {"config.json", "LICENSE", "report.html", "README.md", "Dockerfile", "compose.yaml", "smoke_test.py"}
    assert expected <= set(names) and not {"Modelfile", "optimizer.pt"} & set(names)
    before, rounded = Checkpoint.open(source.student), Checkpoint.open(folder)
    assert len(rounded.files) > 1 and "config.json" in names and "unchanged/model.safetensors" in names
    for name in before.names:
        assert torch.equal(rounded.tensor(name), before.tensor(name).to(torch.bfloat16))
    assert read_json(folder / "config.json")["dtype"] == "bfloat16"
    assert (folder / "unchanged" / "model.safetensors").read_bytes() == before.files[0].read_bytes()
    assert [form["path"] for form in read_package(folder)["forms"]] == [".", "unchanged"]


def test_a_form_with_fewer_bits_is_copied_whatever_its_dtypes(source: Source, tmp_path: Path) -> None:
    folder = tmp_path / "run" / "quantized" / "int8"
    shutil.copytree(source.student, folder)
    save_file({"packed": torch.arange(5, dtype=torch.int8), "shape": torch.tensor([5])}, folder / "model.safetensors")
    with_int8 = replace(source, quantized={"int8": folder})
    forms = chosen(with_int8, "bf16,int8")
    package = write_package(with_int8, forms, Extras(CARD, {}, {}, {}), tmp_path / "package", QUIET)
    copied, original = (path / "model.safetensors" for path in (package / "int8", folder))
    assert copied.read_bytes() == original.read_bytes() and not (package / "int8" / "optimizer.pt").exists()
    card = (package / "README.md").read_text()
    assert 'add `subfolder="int8"`' in card and "compressed-tensors" in card
    assert usual_forms(with_int8, QUIET)[:2] == ["bf16", "int8"]


def test_the_card_keeps_what_it_has_and_says_how_to_use_the_model(write: Write) -> None:
    fields, body = front_matter.split((write() / "README.md").read_text(), "card")
    assert fields == {"license": "mit", "base_model": "org/big", "language": ["de"]}
    assert "Made for tea." in body and "docker compose up" in body and "| bf16 | `.` |" in body
    assert "ollama" not in body


def test_the_smoke_test_asks_the_model(
    write: Write, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write()
    monkeypatch.setattr(smoke_test, "__file__", str(folder / "smoke_test.py"))
    assert smoke_test.main(["--with", "transformers"]) == 0, capsys.readouterr()
    assert "transformers: 'The river'" in capsys.readouterr().out
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.dtype == torch.bfloat16
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    model.save_pretrained(folder)
    assert smoke_test.main(["--with", "transformers"]) == 1


def test_a_gguf_file_lies_at_the_top_with_a_modelfile(source: Source, write: Write, tmp_path: Path) -> None:
    gguf = Form(
        name="gguf-q8_0", title="GGUF", kind="gguf", nbytes=lambda source: 4,
        write=lambda source, out, reporter: out.write_bytes(b"GGUF") and None,
    )  # fmt: skip
    folder = tmp_path / "package"
    write_package(source, [gguf], Extras(CARD, {}, {}, {}), folder, QUIET)
    assert (folder / "Modelfile").read_text().splitlines()[1] == "FROM ./tiny-q8_0.gguf"
    assert not (folder / "Dockerfile").exists() and not (folder / "config.json").exists()
    assert "ollama create tiny -f Modelfile" in (folder / "README.md").read_text()


def test_a_package_that_cannot_be_finished_is_not_there(source: Source, write: Write, tmp_path: Path) -> None:
    def fails(source: Source, out: Path, reporter: Reporter) -> None:
        raise SelfCheckError("the form is not right")

    broken = replace(forms_of(source)["unchanged"], write=fails)
    good = forms_of(source)["bf16"]
    with pytest.raises(SelfCheckError):
        write_package(source, [good, broken], Extras(CARD, {}, {}, {}), tmp_path / "package", QUIET)
    with pytest.raises(FileError, match=r"README\.md: front matter"):
        write(card="---\n[\n---\n")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.html", "run"]


def test_what_is_there_is_replaced_when_asked_and_only_a_package(source: Source, write: Write, tmp_path: Path) -> None:
    write()
    with pytest.raises(ConfigError, match="is there already"):
        write()
    write("unchanged", replace=True)
    assert [form["name"] for form in read_package(tmp_path / "package")["forms"]] == ["unchanged"]
    with pytest.raises(ConfigError, match="is not a package"):
        write(out="run", replace=True)
    (tmp_path / "link").symlink_to(tmp_path / "package")
    with pytest.raises(ConfigError, match="is there already"):
        write(out="link", replace=True)
    assert (source.student / "config.json").is_file()


def test_room_is_checked_before_anything_is_written(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage("/")._replace(free=1000)
    monkeypatch.setattr(contents.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(RunFolderError, match=r"no room for the package\n.*bf16"):
        write()


@pytest.mark.parametrize("forms", ["bf16,int3", "", ",", "../x"])
def test_unknown_forms_are_refused_with_those_there_are(write: Write, forms: str) -> None:
    with pytest.raises(ConfigError, match=r"--forms\n  expected: some of bf16, unchanged"):
        write(forms)


@pytest.mark.parametrize("text", ["[]", "{}", '{"format": 2, "forms": []}', '{"format": 1, "forms": 3}', "{"])
def test_a_damaged_description_is_no_package(tmp_path: Path, text: str) -> None:
    (tmp_path / "package.json").write_text(text)
    with pytest.raises(ConfigError, match="package"):
        read_package(tmp_path)
