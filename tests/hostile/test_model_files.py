"""Every field of a teacher's files with nasty values: accepted, or refused with a short message, nothing else."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kdscale.families import decoder_types, load_family
from kdscale.families.cuttable import ending_well
from kdscale.models.loading import check_loadable, load_tokenizer
from kdscale.weights import Checkpoint, check_tokenizer, copy_sidecars, sidecar_names
from tests.hostile.nasty import HostileCases
from tests.integration.prune.family_table import tiny_config

NOT_FINITE = [float("inf"), float("-inf"), float("nan")]
VALUES: list[Any] = [
    None, True, False, 0, 1, 3, -1, 0.5, -0.5, 2**31, 2**63, 10**12, 10**30, 10**4000, 1e300, 5e-324, *NOT_FINITE, "",
    " ", "x", "12", "a\nb", "\x1b[2J", "\x00", "\ud800", "../../etc/passwd", "/dev/zero", "x" * 3000, [], [None], [1],
    ["x"] * 3, [[[[[1]]]]], {}, {"": None}, {"a": {"b": [1]}}, list(range(500)),
]  # fmt: skip
CONTENTS = [
    b"", b"\n", b"null", b"3", b'"x"', b"[]", b"{}", b'{"a"', b"\xff\xfe", bytes(64), b'{"a": 1, "a": 2}', b"[[],[]]",
]  # fmt: skip


@pytest.fixture
def folder(tiny_llama_dir: Path, tmp_path: Path) -> Path:
    """A teacher of the test's own."""
    return Path(shutil.copytree(tiny_llama_dir, tmp_path / "teacher"))


def edits(tree: dict[str, Any]) -> Iterator[tuple[str, Any, dict[str, Any]]]:
    """(name, value, tree with it) for each value in place of each field, also one level down."""
    for field, old in tree.items():
        for value in VALUES:
            yield f"{field} = {value!r:.40}", value, {**tree, field: value}
            for inner in old if isinstance(old, dict) else ():
                yield f"{field}.{inner} = {value!r:.40}", value, {**tree, field: {**old, inner: value}}


def _is_not_finite(value: Any) -> bool:
    return isinstance(value, float) and not math.isfinite(value)


@pytest.mark.parametrize("model_type", decoder_types())
def test_config_of_every_family(hostile: HostileCases, model_type: str) -> None:
    from transformers import AutoConfig

    config = AutoConfig.for_model(**tiny_config(model_type)).to_dict()
    config = {**config, "architectures": None, "auto_map": {}, "quantization_config": None}
    data = load_family(config, "config.json").data
    sizes = {field.field for field in data.dims.values()}

    def use(edited: dict[str, Any]) -> None:
        family = load_family(edited, "config.json")
        dims = family.dims(edited)
        family.count_params(edited)
        layers = max(1, dims.layers - 1)
        family.student_config(edited, dims.replace(layers=layers), ending_well(family, edited, range(layers)))

    # a field that no family file names is read alike in all families
    named = data.model_dump_json() if model_type != "llama" else None
    for name, value, edited in edits(config):
        field = name.split(" = ")[0]
        if named is not None and f'"{field.partition(".")[0]}"' not in named:
            continue
        wrong_size = field in sizes and value is not None and (type(value) is not int or not 0 < value < 10**9)
        hostile.run(
            name, lambda edited=edited: use(edited), must="refuse" if _is_not_finite(value) or wrong_size else ""
        )


def test_config_that_transformers_reads(hostile: HostileCases, folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "generation_config.json").unlink()
    for name, value, edited in edits({**config, "rope_scaling": {"rope_type": "linear", "factor": 2.0}}):
        (folder / "config.json").write_text(json.dumps(edited))

        def use(edited: dict[str, Any] = edited) -> None:
            load_family(edited, "config.json").dims(edited)
            check_loadable(folder)

        hostile.run(name, use, must="refuse" if _is_not_finite(value) else "")


@pytest.mark.parametrize("turn", [0, *(pytest.param(turn, marks=pytest.mark.long) for turn in (1, 2))])
def test_generation_config(hostile: HostileCases, folder: Path, turn: int) -> None:
    """A third of the edits of each field, others in the next one, and all of those that are refused; the rest is
    `long`."""
    from transformers import GenerationConfig

    path, tree = folder / "generation_config.json", {**GenerationConfig().to_dict(), "watermarking_config": None}
    of_field = {name: place for place, name in enumerate([*tree, "other"])}
    for place, (name, value, edited) in enumerate(edits({**tree, "other": 1})):
        field = name.split(" = ")[0]
        if (place + of_field[field]) % 3 != turn and field not in ("eos_token_id", "pad_token_id"):
            continue
        path.write_text(json.dumps(edited))
        wrong = field in ("eos_token_id", "pad_token_id") and isinstance(value, str | dict | float)
        hostile.run(name, lambda: check_loadable(folder), must="refuse" if wrong else "")
    for content in CONTENTS:
        path.write_bytes(content)
        hostile.run(f"{content!r}", lambda: check_loadable(folder))


def test_tokenizer_files(hostile: HostileCases, folder: Path) -> None:
    def use() -> None:
        check_tokenizer(folder, 320)
        load_tokenizer(folder)

    for file in ("tokenizer_config.json", "tokenizer.json"):
        tree = json.loads((folder / file).read_text())
        if file == "tokenizer_config.json":
            tree |= {"added_tokens_decoder": {"0": {"content": "<|end|>"}}, "chat_template": "x", "auto_map": {}}
        for name, _, edited in edits(tree):
            (folder / file).write_text(json.dumps(edited))
            hostile.run(f"{file}: {name}", use)
        (folder / file).write_text(json.dumps(tree))
    for file in ("added_tokens.json", "special_tokens_map.json", "tokenizer_config.json", "tokenizer.json"):
        for content in [*CONTENTS, *(json.dumps({"a": value}).encode() for value in VALUES)]:
            (folder / file).write_bytes(content)
            hostile.run(f"{file}: {content!r:.60}", use)
        (folder / file).unlink()


def test_auto_map(hostile: HostileCases, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    for file in ("config.json", "tokenizer_config.json"):
        tree = json.loads((folder / file).read_text())
        for value in (*VALUES, {"AutoConfig": "../up.Own"}, *({"AutoConfig": value} for value in VALUES)):
            (folder / file).write_text(json.dumps({**tree, "auto_map": value}))
            hostile.run(f"{file}: {value!r:.60}", lambda: sidecar_names(folder, code=True))
            hostile.run(f"{file}: {value!r:.60}, copied", lambda: copy_sidecars(folder, tmp_path / "out"))
        (folder / file).write_text(json.dumps(tree))


def _with_header(path: Path, header: bytes, payload: bytes, length: int | None = None) -> None:
    size = len(header) if length is None else length
    path.write_bytes(size.to_bytes(8, "little") + header + payload)


def _open(folder: Path) -> None:
    checkpoint = Checkpoint.open(folder)
    checkpoint.verify_against(load_family(checkpoint.config, "config.json"))
    checkpoint.check_finite()


def test_safetensors_headers(hostile: HostileCases, folder: Path) -> None:
    path = folder / "model.safetensors"
    raw = path.read_bytes()
    size = int.from_bytes(raw[:8], "little")
    header, payload = json.loads(raw[8 : 8 + size]), raw[8 + size :]
    first = next(name for name in header if name != "__metadata__")
    entry = header[first]
    for name, _, edited in edits(entry):
        _with_header(path, json.dumps({**header, first: edited}).encode(), payload)
        hostile.run(name, lambda: _open(folder), must="refuse" if edited != entry else "")
    for value in VALUES:
        _with_header(path, json.dumps({**header, first: value}).encode(), payload)
        hostile.run(f"{value!r:.40}", lambda: _open(folder), must="refuse")
        for place in ("shape", "data_offsets"):
            _with_header(path, json.dumps({**header, first: {**entry, place: [value, value]}}).encode(), payload)
            hostile.run(f"{place} of {value!r:.40}", lambda: _open(folder), must="refuse")
        _with_header(path, json.dumps({**header, "__metadata__": value}).encode(), payload)
        hostile.run(f"__metadata__ {value!r:.40}", lambda: _open(folder), must="" if value in (None, {}) else "refuse")
    text = json.dumps(header)
    for encoding in ("utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32"):
        _with_header(path, text.encode(encoding), payload)
        hostile.run(f"header in {encoding}", lambda: _open(folder), must="refuse")
    for other in (text.replace('"model', '"\\ud800', 1), text.replace("[0, ", "[-0, ", 1)):  # only the library refuses
        _with_header(path, other.encode(), payload)
        hostile.run(f"{other:.40}", lambda: _open(folder), must="refuse")
    digits = json.dumps({**header, first: {**entry, "shape": [7]}}).replace("[7]", f"[{'7' * 5000}]").encode()
    for content in (*CONTENTS, digits, b"[" * 100_000, b'{"a":' * 900 + b"1" + b"}" * 900):
        _with_header(path, content, payload)
        hostile.run(f"{content!r:.40}", lambda: _open(folder), must="refuse")
    for length in (0, 1, size - 1, size + 1, len(raw), 2**40, 2**64 - 1):
        _with_header(path, raw[8 : 8 + size], payload, length)
        hostile.run(f"length {length}", lambda: _open(folder), must="refuse")


def test_index(hostile: HostileCases, folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "model-1.safetensors")
    path = folder / "model.safetensors.index.json"
    for value in VALUES:
        for tree in (value, {"weight_map": value}, {"weight_map": {"model.norm.weight": value}}):
            path.write_text(json.dumps(tree))
            hostile.run(f"{tree!r:.60}", lambda: _open(folder), must="refuse")
    for content in (*CONTENTS, f'{{"weight_map": {"9" * 5000}}}'.encode(), b"[" * 100_000):
        path.write_bytes(content)
        hostile.run(f"{content!r:.40}", lambda: _open(folder), must="refuse")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=12,
)
RANDOM = settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))


def test_random_json(hostile: HostileCases, tmp_path: Path) -> None:
    @RANDOM
    @given(config=JSON, header=JSON)
    def check(config: Any, header: Any) -> None:
        tree = {"model_type": "llama", "hidden_size": 8, "vocab_size": 8}
        tree |= config if isinstance(config, dict) else {}
        wrong = {**tree, "num_hidden_layers": config}
        hostile.run(f"config {config!r:.80}", lambda: load_family(tree, "config.json").dims(wrong), must="refuse")
        (tmp_path / "config.json").write_text('{"model_type": "llama"}')
        _with_header(tmp_path / "model.safetensors", json.dumps(header).encode(), b"")
        checkpoint = hostile.run(f"header {header!r:.80}", lambda: Checkpoint.open(tmp_path))
        assert checkpoint is None or checkpoint.names == []

    check()


def test_random_bytes(hostile: HostileCases, tmp_path: Path) -> None:
    @RANDOM
    @given(content=st.binary(max_size=64))
    def check(content: bytes) -> None:
        for file in ("config.json", "model.safetensors", "model.safetensors.index.json"):
            (tmp_path / "config.json").write_text("{}")
            (tmp_path / file).write_bytes(content)
            hostile.run(f"{file}: {content!r}", lambda: Checkpoint.open(tmp_path), must="refuse")
            (tmp_path / file).unlink()

    check()
