"""Every field of the config, and YAML itself, with nasty values."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kdscale.config.distill.objectives import OBJECTIVES
from kdscale.config.evaluation.bias import MEASURES, GeneratingConfig
from kdscale.config.load import build_config, dump_config, load_config, parse_yaml
from kdscale.config.root import Config
from kdscale.errors import ConfigError, KdscaleError
from tests.hostile.nasty import OUT_OF_ALL_RANGES, VALUES, HostileCases, edited, leaves

SETTINGS = settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))


def whole_tree() -> dict[str, Any]:
    """A config with every field, also those that are null by default."""
    return build_config(
        {
            "name": "t", "run_dir": "r", "teacher": {"path": "t"}, "prune": {"ffn": 64},
            "steps": [{"name": "a", "prune": {"ffn": 96}}], "bias": {},
            "quantize": {"forms": [{"name": "int8"}, {"name": "int4", "method": "distilled", "tokens": 8192}]},
            "tracking": {"wandb": {}, "mlflow": {}, "trackio": {}},
            "eval": {"downstream": {}},
            "distill": {"served": {"urls": ["http://h:1"]}, "zero": {"extra": {"overlap_comm": True}},
                        "fake_quantize": {}, "on_policy": {"prompts": [{"path": "p.txt"}], "system": "s"}},
        },
        "here",
    ).resolved()  # fmt: skip


def numbers(node: Any, where: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """Every number in a JSON schema, with its place, but for those that are one of a few."""
    if isinstance(node, dict) and node.get("type") in ("integer", "number") and "enum" not in node:
        yield where, node
    for key, inner in node.items() if isinstance(node, dict) else enumerate(node if isinstance(node, list) else []):
        yield from numbers(inner, f"{where}.{key}")


WRITING = [measure for measure in MEASURES.values() if issubclass(measure, GeneratingConfig)]


@pytest.mark.parametrize("model", [Config, *OBJECTIVES.values(), *WRITING])
def test_every_number_has_a_finite_range(model: Any) -> None:
    listed = list(numbers(model.model_json_schema()))
    assert listed
    for where, schema in listed:
        low = schema.get("minimum", schema.get("exclusiveMinimum"))
        high = schema.get("maximum", schema.get("exclusiveMaximum"))
        assert low is not None and high is not None and math.isfinite(low) and math.isfinite(high), where


@pytest.mark.parametrize("turn", [0, *(pytest.param(turn, marks=pytest.mark.long) for turn in (1, 2))])
def test_every_field(hostile: HostileCases, turn: int) -> None:
    """A third of the values in each field, each value in a third of the fields; the other two thirds are `long`."""
    tree = whole_tree()
    for place, path in enumerate(leaves(tree)):
        if "profile" in path and len(path) > 2:
            continue
        number = isinstance(_value(tree, path), int | float) and not isinstance(_value(tree, path), bool)
        for name, value in list(VALUES.items())[(place + turn) % 3 :: 3]:
            must = "refuse" if number and name in OUT_OF_ALL_RANGES else ""
            what = f"{'.'.join(map(str, path))} = {name}"
            config = hostile.run(what, lambda path=path, value=value: _built(edited(tree, path, value)), must=must)
            if config is not None:
                hostile.run(f"{what}, dumped", lambda config=config: dump_config(config), must="accept")


def _built(tree: Any) -> Config:
    return build_config(tree, "here")


def _value(tree: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        tree = tree[key]
    return tree


_BOMB = [f"{new}: &{new} [{','.join([f'*{old}'] * 9)}]\n" for old, new in ("ab", "bc", "cd", "de", "ef", "fg", "gh")]
YAML_TEXTS = {
    "bomb": "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(_BOMB), "brackets": "[" * 900, "braces": "{a: " * 900,
    "date": "d: 2020-99-99", "tag": "x: !!int abc", "python": "x: !!python/object/apply:os.system [ls]",
    "digits": "x: " + "9" * 5000, "hex": "x: 0x" + "f" * 100_000, "inside itself": "&a [*a]", "no key": "? [a]\n: b",
    "merge": "b: {<<: 3}", "many": "k: 1\n" * 15_000, "binary": "x: !!binary abc", "surrogate": 'name: "\\ud800"',
    "long": "name: " + "a" * 200_000, "key": "a" * 999 + ": 1", "dashes": "- " * 100_000, "quote": "'" * 100_001,
    "nul": "a: \x00", "two": "---\na: 1\n---\nb: 2", "tabs": "\t" * 999, "colons": ":" * 100_000,
    "sixty": "x: " + "1:" * 50_000 + "1", "version": "%YAML 9.9\n---\na: 1", "stars": "*" * 999,
    "anchors": "&a " * 1000, "infinity": "seed: .inf", "1e400": "distill: {optimizer: {lr: 1e400}}",
    "set": "!!set {a}", "megabyte": "a: 1\n" * 300_000,
    "unknown keys": "".join(f"k{index}: 1\n" for index in range(5000)),
}  # fmt: skip


def test_yaml(hostile: HostileCases, tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    for name, text in YAML_TEXTS.items():
        path.write_text(text)
        hostile.run(f"file: {name}", lambda: load_config(path), must="refuse")
        hostile.run(f"--set: {name}", lambda text=text: load_config(path, [f"seed={text}"]), must="refuse")
        hostile.run(f"--set key: {name}", lambda text=text: load_config(path, [f"{text}=1"]), must="refuse")


def test_any_text_as_yaml(hostile: HostileCases) -> None:
    @SETTINGS
    @given(st.text(alphabet="ab01:-[]{}&*!|>'\"%@#?,. \n\t<\\ux~", max_size=60))
    def check(text: str) -> None:
        hostile.run(repr(text), lambda: parse_yaml(text, "here"))

    check()


def test_any_tree_as_a_config(hostile: HostileCases) -> None:
    plain = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20)
    trees = st.recursive(
        plain, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
    )
    keys = st.sampled_from(sorted(Config.model_fields))

    @SETTINGS
    @given(st.dictionaries(keys, trees, max_size=4))
    def check(tree: dict[str, Any]) -> None:
        hostile.run(repr(tree)[:200], lambda: _built({**whole_tree(), **tree}))

    check()


def test_what_is_accepted_is_read_back_the_same(tmp_path: Path) -> None:
    tree = whole_tree()
    for value in ("a: b", "[x", "~", "null", "1e5", "'", '"', "- x", "é", "x # y"):
        config = build_config({**tree, "run_dir": value}, "here")
        (tmp_path / "c.yaml").write_text(dump_config(config), encoding="utf-8")
        assert load_config(tmp_path / "c.yaml") == config


def test_all_that_is_wrong_is_one_short_message() -> None:
    with pytest.raises(ConfigError) as caught:
        build_config({f"k{index}": "x" * 100_000 for index in range(3000)}, "here")
    assert len(str(caught.value)) < 4200
    with pytest.raises(KdscaleError, match="hf:NAME"):
        build_config({**whole_tree(), "data": {"sources": [{"path": "hf: "}]}}, "here")
    assert json.dumps(whole_tree())


def test_a_tree_has_no_more_values_than_a_yaml_text() -> None:
    """A service reads JSON: a megabyte of unknown keys would keep it busy with their errors for seconds."""
    for tree in ({f"k{number}": 1 for number in range(20_001)}, {"name": [[1] * 101] * 200}):
        with pytest.raises(ConfigError, match="too large"):
            build_config(tree, "here")
