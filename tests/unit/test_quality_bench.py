"""benchmarks/quality on made-up cells: interpolation, stale cells, tables and plot; and a stage that is stopped."""

from __future__ import annotations

import importlib
import math
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any
from xml.etree import ElementTree

import pytest

from kdscale.config.load import build_config

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks" / "quality"


@pytest.fixture(scope="module")
def bench() -> Iterator[dict[str, ModuleType]]:
    """The modules of benchmarks/quality, which have names of their own folder only."""
    before = set(sys.modules)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(FOLDER))
        yield {name: importlib.import_module(name) for name in ("cells", "curves", "making", "table")}
        for name in set(sys.modules) - before:
            if Path(getattr(sys.modules[name], "__file__", None) or "/").parent == FOLDER:
                del sys.modules[name]


def test_between_two_budgets_the_curve_is_a_straight_line_of_logarithms(bench: dict[str, Any]) -> None:
    curves = bench["curves"]
    curve = [(0, 8.0), (30_000, 4.0), (100_000, 2.0)]
    assert curves.tokens_to_reach(curve, 9.0) == 0.0, "it is there before any training"
    assert curves.tokens_to_reach(curve, 4.0) == pytest.approx(30_000)
    half_way = curves.tokens_to_reach(curve, math.sqrt(8.0 * 4.0))
    assert half_way == pytest.approx(math.sqrt(1_000 * 31_000) - 1_000)
    assert curves.tokens_to_reach(curve, 1.9) is None
    rising = [(0, 3.0), (30_000, 3.5), (100_000, 2.0)]
    assert 30_000 < curves.tokens_to_reach(rising, 2.9) < 100_000


def test_times_fewer_is_a_number_or_a_bound(bench: dict[str, Any]) -> None:
    curves = bench["curves"]
    recipe, ours = [(0, 100.0), (30_000, 8.0), (100_000, 3.0)], [(0, 8.0), (30_000, 4.0), (100_000, 2.0)]
    assert curves.times_fewer(recipe, ours, 30_000) == "at once"
    needed = curves.tokens_to_reach(ours, 3.0)
    assert curves.times_fewer(recipe, ours, 100_000) == f"{100_000 / needed:.1f}"
    assert curves.times_fewer(ours, recipe, 100_000) == "<1", "the recipe is not at 2.0 within as many tokens"
    assert curves.times_fewer(recipe, ours, 300_000) == "–"
    assert curves.recipe_needs(recipe, ours, 0) == "30k"
    assert curves.recipe_needs(recipe, ours, 100_000) == ">100k"
    assert curves.mean_curve([{0: 4.0, 9: 2.0}, {0: 9.0}]) == [(0, pytest.approx(6.0)), (9, pytest.approx(2.0))]


def made_up(bench: dict[str, Any], **of_cell: Any) -> tuple[Any, dict[str, Any]]:
    cells = bench["cells"]
    where = {"teacher": "smollm2-135m", "shape": "ffn", "method": "ours", "seed": 1, "tokens": 0} | of_cell
    cell = cells.Cell(**where)
    ratio = {"ours": 4.0, "minitron": 18.0}[cell.method] / (1 + cell.tokens / 10_000)
    sides = {text: {"ratio": 1 + ratio, "kl": ratio, "agreement": 0.5} for text in ("known", "other")}
    figures = {
        **where, "commit": "abc", "start": cell.method, **sides, "accuracy": {"value": 0.5},
        "seconds": {"prune": {"wall": 90.0, "processor": 60.0}, "measure": {"wall": 9.0, "processor": 9.0}},
        "settings": cells.settings_today(cell, cells.read_setups()[cell.teacher]),
    }  # fmt: skip
    return cell, figures


def test_a_cell_is_stale_when_its_settings_or_its_start_are_not_todays(bench: dict[str, Any]) -> None:
    cells, setups = bench["cells"], bench["cells"].read_setups()
    measured = [made_up(bench, method=method, tokens=tokens) for method in cells.METHODS for tokens in (0, 30_000)]
    assert cells.stale(measured, setups) == {}
    by_name = {cell.name: figures for cell, figures in measured}
    by_name["smollm2-135m.ffn.ours.s1.0"]["settings"]["prune"]["compensate"] = "ridge"
    by_name["smollm2-135m.ffn.minitron.s1.30000"]["start"] = "older"
    by_name["smollm2-135m.ffn.ours.s1.30000"]["settings"]["prune"].pop("stream_correction")
    by_name["smollm2-135m.ffn.minitron.s1.0"]["settings"]["prune"].pop("stream_correction")  # it sets all that it reads
    why = cells.stale(measured, setups)
    assert why["smollm2-135m.ffn.ours.s1.0"] == "prune.compensate: ridge → two_stream"
    assert "stream_correction: None → 0.5" in why["smollm2-135m.ffn.ours.s1.30000"]
    assert "other pruned weights" in why["smollm2-135m.ffn.minitron.s1.30000"]
    assert len(why) == 3


def test_every_cell_of_the_bench_has_a_config_of_equal_shape_for_both_methods(bench: dict[str, Any]) -> None:
    cells = bench["cells"]
    for name, setup in cells.read_setups().items():
        for shape in cells.SHAPES:
            ours, recipe = (cells.settings_today(cells.Cell(name, shape, m, 1, 30_000), setup) for m in cells.METHODS)
            for axis in ("hidden", "ffn", "heads", "layers"):
                assert ours["prune"][axis] == recipe["prune"][axis]
            assert ours["distill"]["optimizer"] == recipe["distill"]["optimizer"]
            assert recipe["distill"]["objectives"][0]["targets"] == "full"


def test_tables_and_plot_of_made_up_cells(bench: dict[str, Any], tmp_path: Path) -> None:
    cells, table = bench["cells"], bench["table"]
    for method in cells.METHODS:
        for seed in (1, 2):
            for tokens in (0, 30_000):
                cell, figures = made_up(bench, method=method, seed=seed, tokens=tokens)
                cells.write_cell(cell.file(tmp_path), figures)
    (tmp_path / "smollm2-135m.teacher.s1.json").write_text('{"teacher": "smollm2-135m", "seed": 1}')
    current = dict(cells.read_cells(tmp_path))
    assert len(current) == 8, "the teacher's own file is no cell"
    page = table.with_tables(f"# Title\n{table.BEGIN}\nold\n{table.END}\nrest\n", table.tables(current, {"x": "why"}))
    assert page.startswith("# Title\n") and page.endswith("\nrest\n") and "old" not in page
    assert "| smollm2-135m | ffn | at once | >30k | >30k |" in page, "18 / 4 is more than 4, where ours begins"
    assert (
        "| smollm2-135m | ffn | 0 | 2 / 2 | 5× / 19× | 5× / 19× | 4 / 18 | 50.0 / 50.0 | 50.0 / 50.0 | 1.0 / 1.0 |"
        in page
    )
    assert "`x` (why)" in page
    table.draw_plot(current, tmp_path / "plot.svg")
    drawn = ElementTree.parse(tmp_path / "plot.svg").getroot()
    assert drawn.tag.endswith("svg")


def test_a_stage_is_stopped_when_the_time_is_up_and_its_time_is_kept(
    bench: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    making = bench["making"]
    tree = {"name": "x", "run_dir": str(tmp_path / "x"), "teacher": {"path": "t"}, "prune": {"ffn": 8}}
    config = build_config(tree, "x")
    run = making.Making(tmp_path / "runs" / "x", until=time.monotonic())
    run.begin({"start": "abc"})
    monkeypatch.setattr(making, "COMMAND", (sys.executable, "-c", "import time; time.sleep(60)"))
    with pytest.raises(making.TimeIsUpError):
        run.bring_to("distill", config)
    assert run.stamp["start"] == "abc" and set(run.stamp["seconds"]["distill"]) == {"wall", "processor"}
    monkeypatch.setattr(making, "COMMAND", (sys.executable, "-c", "raise SystemExit(3)"))
    later = making.Making(run.run.path, until=math.inf)
    with pytest.raises(making.StageFailedError, match="ended with 3, see "):
        later.bring_to("distill", config)
    later.remove()
    assert later.stamp == {} and not later.run.path.exists()
