"""Files that stages read and that others wrote, or that came to harm: text, families, host files, what stages leave.

Each is given to the one reader that all of kdscale uses for it.
"""

from __future__ import annotations

import gzip
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kdscale import families
from kdscale.config.data import SourceConfig, file_suffixes
from kdscale.data.sources import read_documents
from kdscale.data.store_cache import StoreCache
from kdscale.data.token_store import TokenStore
from kdscale.distill.checkpoint.folder import MANIFEST, find_latest, sealed_checkpoints
from kdscale.errors import KdscaleError
from kdscale.families import read_families
from kdscale.files import read_json, read_text, remove_tree, sha256_json, write_json
from kdscale.packaging.bundle.checksums import SUMS, write_sums
from kdscale.packaging.bundle.contents import read_package
from kdscale.packaging.bundle.publish import prepare
from kdscale.packaging.model_card import with_measurements
from kdscale.runs.importance_scores import SCORES_FILE, SUMMARY_FILE, load_scores
from kdscale.runtime.progress import Reporter
from kdscale.teacher.messages import Question, decode_targets
from kdscale.teacher.remote import read_token
from kdscale_launch.hosts import messages
from kdscale_launch.hosts.hostfile import parse_hostfile, read_hostfile
from kdscale_launch.job import LaunchError
from tests.hostile.nasty import CONTENTS, VALUES, HostileCases, damages, edited, leaves

Call = Callable[[], Any]


@pytest.fixture(autouse=True)
def _no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kdscale.files.os.fsync", lambda handle: None)


@pytest.fixture
def finished(finished_run: Path) -> Path:
    """The untouched run folder."""
    return finished_run.parent / "pristine"


def in_json(value: Any) -> str:
    """JSON of a value, also of one with a number of more digits than Python writes."""
    try:
        return json.dumps(value)
    except ValueError:
        return "9" * 5000


def test_text_files(hostile: HostileCases, tmp_path: Path) -> None:
    for name in (f"a{suffix}" for suffix in file_suffixes()):
        path, source = tmp_path / name, SourceConfig(path=str(tmp_path / name))

        def read(source: SourceConfig = source) -> list[Any]:
            return list(read_documents(source))

        for damage_name, damage in damages():
            if damage_name == "half":
                continue
            remove_tree(path)
            path.write_bytes(b"")
            damage(path)
            hostile.run(f"{name} {damage_name}", read)
            if name == "a.jsonl.gz" and damage_name in CONTENTS:
                remove_tree(path)
                path.write_bytes(gzip.compress(CONTENTS[damage_name]))
                hostile.run(f"{name} of {damage_name}", read)
        remove_tree(path)
    source = SourceConfig(path=str(tmp_path / "a.jsonl"))
    for value_name, value in VALUES.items():
        for record in ("%s", '{"text": %s}', '{"text": "a", "source": %s}', '{"text": "a", "other": %s}'):
            (tmp_path / "a.jsonl").write_text(record % in_json(value))
            documents = hostile.run(f"{record} with {value_name}", lambda: list(read_documents(source)))
            if documents:
                hostile.run(f"{value_name} as a label", documents[0].source.encode, must="accept")


def test_a_line_without_end(hostile: HostileCases, tmp_path: Path) -> None:
    """A small gzip file can hold any number of bytes on one line; they are not read into memory."""
    path = tmp_path / "bomb.jsonl.gz"
    with gzip.open(path, "wb", compresslevel=1) as stream:
        stream.write(b'{"text": "')
        for _ in range(96):
            stream.write(b"a" * (1 << 20))
    hostile.run("a bomb", lambda: list(read_documents(SourceConfig(path=str(path)))), must="refuse")


def test_family_files(hostile: HostileCases, tmp_path: Path) -> None:
    path = tmp_path / "own.json"
    tree = read_json(Path(families.__file__).parent / "qwen3_moe.json")
    for name, damage in damages():
        remove_tree(path)
        path.write_bytes(b"{}")
        damage(path)
        hostile.run(name, lambda: read_families([path]), must="refuse")
    remove_tree(path)
    for place in leaves(tree):
        for name, value in VALUES.items():
            path.write_text(in_json(edited(tree, place, value)))
            hostile.run(f"{place} = {name}", lambda: read_families([path]))


def test_host_files(hostile: HostileCases) -> None:
    for name, value in VALUES.items():
        text = str(value) if isinstance(value, str) else in_json(value)
        for line in (text, f"{text} slots=2", f"h slots={text}", f"h {text}"):
            hostile.run(f"{name}: {line:.40}", lambda line=line: _hosts(line))


def test_host_file_kinds(hostile: HostileCases, tmp_path: Path) -> None:
    path = tmp_path / "hosts"
    for name, damage in damages():
        path.write_bytes(b"h slots=1")
        damage(path)
        hostile.run(name, lambda: _told(lambda: read_hostfile(path)), must="refuse")
        remove_tree(path)


def _hosts(text: str) -> Any:
    return _told(lambda: parse_hostfile(text, "hostfile"))


def _told(call: Call) -> Any:
    """The launcher has an error class of its own, which the command line prints like the others."""
    try:
        return call()
    except LaunchError as error:
        raise KdscaleError(str(error)) from error


def test_packages(hostile: HostileCases, tmp_path: Path) -> None:
    folder, description = tmp_path / "package", {"format": 1, "name": "x", "forms": [{"name": "bf16", "path": "."}]}
    for file in ("package.json", SUMS, "model.safetensors"):
        for name, damage in damages():
            remove_tree(folder)
            folder.mkdir()
            write_json(folder / "package.json", description)
            (folder / "model.safetensors").write_bytes(b"weights")
            write_sums(folder)
            damage(folder / file)
            hostile.run(f"{file} {name}", lambda: prepare(folder, "org/x", False), must="refuse")
    remove_tree(folder / "package.json")
    for place in leaves(description):
        for name, value in VALUES.items():
            (folder / "package.json").write_text(in_json(edited(description, place, value)))
            hostile.run(f"{place} = {name}", lambda: read_package(folder))


def test_cards(hostile: HostileCases, tmp_path: Path) -> None:
    path = tmp_path / "README.md"
    for name, damage in damages():
        remove_tree(path)
        path.write_text("---\na: 1\n---\n")
        damage(path)
        hostile.run(f"card {name}", lambda: with_measurements(read_text(path), tmp_path, "x", str(path)))
    for name, value in VALUES.items():
        card = f"---\nlicense: {in_json(value)}\n---\n# x\n"
        hostile.run(f"license {name}", lambda card=card: with_measurements(card, tmp_path, "x", "README.md"))


def test_token_stores(hostile: HostileCases, finished: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(finished / "data", tmp_path / "data"))
    tree = read_json(folder / "manifest.json")

    def use() -> Any:
        store = TokenStore.open(folder)
        return [store.split(name).documents for name in ("train", "heldout")]

    _every_edit(hostile, folder / "manifest.json", tree, use)
    for item in tree["files"]:
        _every_damage(hostile, finished / "data", folder, item, use)


def test_shared_token_stores(hostile: HostileCases, finished: Path, tmp_path: Path) -> None:
    """Whatever somebody else left in the cache, the run goes on and writes into its own folder alone."""
    cache, key = StoreCache(tmp_path / "cache"), "0" * 64
    quiet = Reporter(quiet=True)

    def take() -> None:
        if cache.take(key, tmp_path / "run" / "data", {}, quiet):
            TokenStore.open(tmp_path / "run" / "data")

    cache.put(key, finished / "data", quiet)
    entry, tree = tmp_path / "cache" / key, read_json(tmp_path / "cache" / key / "digests.json")
    pristine = shutil.copytree(entry, tmp_path / "pristine")
    (entry / "outside").write_text("x")
    (tmp_path / "cache" / "outside").write_text("x")
    names = ["../outside", "/etc/hostname", "", ".", "train", "a\x00b"]
    trees = [{**tree, name: tree["train/tokens.bin"]} for name in names]
    trees += [edited(tree, place, value) for place in leaves(tree) for value in VALUES.values()]
    for number, other in enumerate([*VALUES.values(), *trees]):
        remove_tree(entry)
        shutil.copytree(pristine, entry)
        (entry / "digests.json").write_text(in_json(other))
        hostile.run(f"digests {number}", take, must="accept")
        assert sorted(item.name for item in (tmp_path / "run").glob("*")) in ([], ["data"])
    for name, damage in damages():
        remove_tree(entry)
        shutil.copytree(pristine, entry)
        damage(entry / "manifest.json")
        hostile.run(f"manifest {name}", take, must="accept")


def test_importance_scores(hostile: HostileCases, finished: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(finished / "importance", tmp_path / "importance"))
    tree = read_json(folder / SUMMARY_FILE)
    tree = {key: tree[key] for key in ("version", "units", "axes")}

    def use() -> Any:
        scores = load_scores(folder)
        return [float(np.sum(scores.energy(name))) for name in scores.units if name in scores]

    _every_edit(hostile, folder / SUMMARY_FILE, tree, use)
    _every_damage(hostile, finished / "importance", folder, SCORES_FILE, use)


def test_forged_checkpoints(hostile: HostileCases, finished: Path, tmp_path: Path) -> None:
    """Anybody can compute a manifest's hash; what such a manifest lacks makes it a damaged checkpoint, and no more."""
    newest = sealed_checkpoints(finished / "checkpoints")[0]
    tree = read_json(newest / MANIFEST)
    fingerprint = tree["fingerprint"]
    tree = {**tree, "fingerprint": {}, "parameters": {}, "tied": {}}
    folder = tmp_path / "checkpoints"
    for place in leaves(tree, most=1):
        for name, value in VALUES.items():
            shutil.rmtree(folder, ignore_errors=True)
            shutil.copytree(newest, folder / newest.name, copy_function=_link)
            try:
                forged = edited(tree, place, value)
                forged = {**forged, "sha256": sha256_json({k: v for k, v in forged.items() if k != "sha256"})}
                write_json(folder / newest.name / MANIFEST, forged)
            except (ValueError, UnicodeEncodeError):  # kdscale cannot write it either
                continue
            hostile.run(f"{place} = {name}", lambda: find_latest(folder, fingerprint))


def test_messages_between_ranks_and_service(hostile: HostileCases) -> None:
    answer = {"rows": 2, "temperature": 1.0, "vocab_size": 32, "top_k": 2}
    limits = {"vocab_size": 32, "max_positions": 64, "max_tokens": 64, "max_length": 64}
    for name, content in CONTENTS.items():
        body = len(content).to_bytes(8, "little") + content
        for text in (content, body, body + bytes(64)):
            hostile.run(f"question {name}", lambda text=text: Question.decode(text, **limits), must="refuse")
            hostile.run(f"answer {name}", lambda text=text: decode_targets(text, **answer), must="refuse")


def test_lines_between_hosts(hostile: HostileCases) -> None:
    """A login banner may hold anything."""
    for name, content in CONTENTS.items():
        hostile.run(name, lambda content=content: messages.decode(content), must="accept")


def test_token_files(hostile: HostileCases, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KDSCALE_TEACHER_TOKEN", raising=False)
    path = tmp_path / "token"
    visible = ("list", "object", "null", "number", "text", "lists", "half")  # strange, but can be sent
    for name, damage in damages():
        remove_tree(path)
        path.write_bytes(b"secret")
        damage(path)
        hostile.run(name, lambda: read_token(path), must="" if name in visible else "refuse")
    for token in ("a\nb", "a b", "\x1b[2J", "é"):
        monkeypatch.setenv("KDSCALE_TEACHER_TOKEN", token)
        hostile.run(repr(token), lambda: read_token(path), must="refuse")


def _link(source: str, target: str) -> None:
    Path(target).hardlink_to(source)


def _every_damage(hostile: HostileCases, pristine: Path, folder: Path, item: str, use: Callable[[], Any]) -> None:
    """Every kind of damage to one file of a copy of `pristine`, which must be refused."""
    for name, damage in damages():
        shutil.rmtree(folder)
        shutil.copytree(pristine, folder)
        damage(folder / item)
        hostile.run(f"{item} {name}", use, must="refuse")


def _every_edit(hostile: HostileCases, path: Path, tree: Any, use: Call) -> None:
    """Every damage of a JSON file, and every nasty value in place of each of its values."""
    whole = path.read_bytes()
    for name, damage in damages():
        remove_tree(path)
        path.write_bytes(whole)
        damage(path)
        hostile.run(f"{path.name} {name}", use, must="refuse")
    remove_tree(path)
    for place in leaves(tree, most=1):
        for name, value in VALUES.items():
            path.write_text(in_json(edited(tree, place, value)))
            hostile.run(f"{path.name} {place} = {name}", use)
