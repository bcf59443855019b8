"""Docs that must not fall behind the code."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import Any

import pytest

import kdscale_kernels
from kdscale.config.distill.targets import placements
from kdscale.config.distill.teachers import SourceSettings
from kdscale.families.schema import COMPONENT_OF, FamilyData
from kdscale.families.schema.nested_file import NestedData
from kdscale.runs import folder

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "benchmarks" / "README.md", *sorted(DOCS.rglob("*.md"))]
CURRENT = [page for page in PAGES if page.name != "LOG.md"]  # the log keeps the names of its day
CODE = re.compile(r"```.*?```|`[^`\n]+`", re.DOTALL)
FENCED = re.compile(r"^( *)```.*?^\1```", re.DOTALL | re.MULTILINE)


def _load_generate() -> Any:
    spec = importlib.util.spec_from_file_location("docs_generate", DOCS / "_generate.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


generate = _load_generate()
COMMANDS: dict[str, Any] = generate.command_objects()


def _name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def test_every_config_field_is_documented_and_every_documented_field_exists() -> None:
    listed = generate.documented_fields((DOCS / "reference" / "config.md").read_text(encoding="utf-8"))
    assert len(listed) == len(set(listed))
    # the fields of other lists of sources are those of a source
    known = {re.sub(r"\b(heldout|leak)_sources\.", "sources.", name) for name in generate.config_fields()}
    # and where the targets of one of several teachers come from is said as for the run's own
    for field in SourceSettings.model_fields:
        known = {name.replace(f"distill.teachers.{field}", f"distill.{field}") for name in known}
    assert known ^ set(listed) == set()


def test_every_setting_of_a_service_is_documented_and_every_documented_one_exists() -> None:
    listed = generate.documented_fields((DOCS / "reference" / "service-settings.md").read_text(encoding="utf-8"))
    assert sorted(listed) == sorted(generate.service_fields())


def test_the_built_config_page_has_the_defaults_and_the_allowed_words() -> None:
    text = "| field | meaning |\n|---|---|\n| `distill.tokens` | Training tokens. |\n| `prune.compensate` | How. |"
    built = generate.with_defaults(text, generate.config_fields()).splitlines()
    assert built[0] == "| field | default | meaning |"
    assert built[2] == "| `distill.tokens` | 1,000,000 | Training tokens. |"
    assert built[3].startswith("| `prune.compensate` | two_stream | How. One of ") and "`ridge`" in built[3]


def test_the_page_of_commands_has_every_command_with_its_options() -> None:
    text = generate.commands()
    for name, command in COMMANDS.items():
        section = text.split(f"## kdscale {name}\n")[1].split("\n## ")[0]
        assert all(item.opts[0] in section for item in command.params if item.opts[0].startswith("--"))
    assert str(ROOT) not in text, "a path of this machine in the docs"


@pytest.mark.parametrize("page", CURRENT, ids=_name)
def test_pages_name_commands_tables_and_files_that_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    code = "\n".join(match[0].strip("`") for match in CODE.finditer(text))
    named = set(re.findall(r"^ *kdscale ([a-z][a-z-]+)", code, re.MULTILINE))
    assert named - {name.split()[0] for name in COMMANDS} == set()
    assert set(generate.MARKER.findall(text)) - set(generate.TABLES) == set()
    paths = re.findall(r"(?<![\w/.-])((?:kdscale|kernels|launch|benchmarks|tests|configs|docs)/[\w/.-]*\w)", text)
    for name in paths:
        assert (ROOT / name).exists() or (ROOT / "kernels" / name).exists(), f"{name} does not exist"
    for name in re.findall(r"\bkdscale(?:_launch|_kernels)?(?:\.[a-z_]+)+", text):
        assert importlib.util.find_spec(name), f"module {name} does not exist"


def test_the_code_points_to_pages_that_exist() -> None:
    for source_root in ("kdscale", "kernels", "launch", "benchmarks"):
        for path in (ROOT / source_root).rglob("*.py"):
            for name in re.findall(r"\bdocs/[\w/-]+\.md", path.read_text(encoding="utf-8")):
                assert (ROOT / name).exists() or name.startswith("docs/gguf"), f"{path} points to {name}"


@pytest.mark.parametrize("page", CURRENT, ids=_name)
def test_commands_on_pages_have_the_options_they_are_given(page: Path) -> None:
    code = "\n".join(match[0].strip("`") for match in CODE.finditer(page.read_text(encoding="utf-8")))
    for line in re.sub(r"\s*\\?\n {2,}|[ ]*#.*", " ", code).splitlines():
        given = set(re.findall(r"(?<!\S)--[a-z][\w-]*", line))
        if called := re.match(r" *kdscale ([a-z][a-z-]+(?: [a-z-]+)?)", line):
            command = COMMANDS.get(called[1]) or COMMANDS.get(called[1].split()[0])
            known = {option for item in getattr(command, "params", ()) for option in item.opts} | {"--help"}
            assert given <= known, line
        elif script := re.search(r"python (\S+\.py)", line):
            sources = [ROOT / script[1], *(ROOT / script[1]).parent.glob("*.py")]
            text = "".join(path.read_text(encoding="utf-8") for path in sources)
            assert [option for option in given if f'"{option}"' not in text] == [], line


def test_every_family_has_a_row() -> None:
    text = (DOCS / "reference" / "families.md").read_text(encoding="utf-8")
    for path in (ROOT / "kdscale" / "families").glob("*.json"):
        assert f"| `{path.name}` |" in text


def test_every_artifact_of_a_stage_is_described() -> None:
    text = (DOCS / "reference" / "files.md").read_text(encoding="utf-8")
    for artifact in (value for value in vars(folder).values() if isinstance(value, folder.Artifact)):
        assert f"`{artifact.path}" in text or f"`{artifact.path.split('/')[0]}/`" in text, artifact.path


def test_every_teacher_placement_is_explained() -> None:
    section = (DOCS / "reference" / "methods.md").read_text(encoding="utf-8").split("## Teacher placements")[1]
    assert set(re.findall(r"^\| `(\w+)`", section, re.MULTILINE)) == set(placements())


def test_every_function_of_the_kernels_is_listed() -> None:
    text = (DOCS / "reference" / "kernels.md").read_text(encoding="utf-8")
    functions = {name for name in kdscale_kernels.__all__ if name.islower()} - {"choose_backend"}
    assert functions - set(re.findall(r"`([a-z_]+)`", text)) == set()


def test_the_page_about_kernels_names_files_and_kernels_that_exist() -> None:
    text = (DOCS / "explanation" / "kernels.md").read_text(encoding="utf-8")
    package = ROOT / "kernels" / "kdscale_kernels"
    source = "".join(path.read_text(encoding="utf-8") for path in package.rglob("*.py"))
    assert [name for name in re.findall(r"`(\w+/\w+\.py)`", text) if not (package / name).exists()] == []
    assert [name for name in re.findall(r"`(\w+_kernel)`", text) if f"def {name}(" not in source] == []


def test_every_key_and_role_of_a_family_file_is_explained() -> None:
    section = (DOCS / "reference" / "families.md").read_text(encoding="utf-8").split("## Keys of a family file")[1]
    keys = re.findall(
        r"`([a-z_]+)`", "\n".join(row.split("|")[1] for row in re.findall(r"^\| .*", section, re.MULTILINE))
    )
    assert set(FamilyData.model_fields) - set(keys) == set()
    roles = {role.removesuffix("_bias") for role in COMPONENT_OF}
    assert roles - set(re.findall(r"`([a-z_]+)`", section)) == set()


def test_every_key_of_a_file_about_a_multimodal_model_is_explained() -> None:
    text = (DOCS / "reference" / "families.md").read_text(encoding="utf-8").split("## Keys of a file about")[1]
    keys = re.findall(r"`([a-z_]+)`", "".join(row.split("|")[1] for row in re.findall(r"^\| .*", text, re.MULTILINE)))
    assert set(NestedData.model_fields) == set(keys)


@pytest.mark.parametrize("page", PAGES, ids=_name)
def test_links_lead_to_pages_and_headings_that_exist(page: Path) -> None:
    text = FENCED.sub("", page.read_text(encoding="utf-8"))
    for target, _, anchor in (link.partition("#") for link in re.findall(r"\]\(([^):]+)\)", text)):
        linked = (page.parent / target).resolve() if target else page
        assert linked.exists(), f"links to {target}"
        assert not anchor or anchor in _anchors(linked), f"{target} has no heading #{anchor}"


def _anchors(page: Path) -> set[str]:
    """Anchors of a page's headings, as MkDocs makes them; those of generated tables included."""
    text = FENCED.sub("", page.read_text(encoding="utf-8"))
    text = generate.MARKER.sub(lambda match: generate.TABLES[match[1]](), text)
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", heading).strip().lower()) for heading in headings}


def test_settings_that_a_stage_names_where_memory_is_short_exist() -> None:
    from kdscale.pipeline.stages.registry import STAGES

    fields = {field for stage in STAGES.values() for field in stage.memory}
    assert fields and fields <= generate.config_fields().keys()
