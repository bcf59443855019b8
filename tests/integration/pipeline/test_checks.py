"""What can be known at the start is found before any work, in one pass, with exit code 2."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console
from tokenizers import Tokenizer
from tokenizers.normalizers import Strip
from tokenizers.processors import TemplateProcessing

from kdscale.config.load import load_config
from kdscale.errors import ConfigError, DataError, KdscaleError
from kdscale.pipeline.checks import check_before_work
from kdscale.pipeline.runner import run_until
from kdscale.pipeline.stages.registry import stages_of
from kdscale.runs.folder import RunFolder
from kdscale.runtime.progress import Reporter
from tests.integration.prune.family_table import POSITIONS, save_teacher

Check = Callable[..., str]


@pytest.fixture
def check(tiny_config: Path) -> Check:
    """`check(override, ...)` runs the checks of a whole run; returns what they said. Nothing may be made."""

    def call(*overrides: str) -> str:
        config = load_config(tiny_config, overrides)
        run = RunFolder(Path(config.run_dir))
        console = Console(record=True, width=200, quiet=False, file=(tiny_config.parent / "said").open("w"))
        try:
            check_before_work(config, run, stages_of(config), Reporter(console=console))
        finally:
            assert not run.path.exists()
        return console.export_text()

    return call


@pytest.fixture
def gpt2(tmp_path: Path, tiny_tokenizer_file: Path) -> str:
    """A teacher with 128 learned positions."""
    folder = save_teacher("gpt2", tmp_path / "gpt2", vocab_size=320)
    shutil.copy(tiny_tokenizer_file, folder / "tokenizer.json")
    return f"teacher.path={folder}"


FITS = ("prune={ffn: 32}",)


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("distill.seq_len=129", "distill.seq_len = 129"),
        ("importance={seq_len: 256, calibration_tokens: 512}", "importance.seq_len = 256"),
        ("eval.seq_len=512", "eval.seq_len = 512"),
        ("eval.speed.context_lengths=[16, 126]", "eval.speed.context_lengths + new_tokens = 130"),
        ("eval.sample_tokens=128", "eval.prompts + eval.sample_tokens = 1"),
    ],
)
def test_a_length_beyond_learned_positions(check: Check, gpt2: str, override: str, named: str) -> None:
    assert "note" not in check(gpt2, *FITS)
    with pytest.raises(ConfigError, match="positions") as caught:
        check(gpt2, *FITS, override)
    assert named in str(caught.value) and f"at most {POSITIONS} tokens" in str(caught.value)


def test_all_lengths_are_named_at_once(check: Check, gpt2: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check(gpt2, *FITS, "distill.seq_len=129", "eval.seq_len=130")
    assert "129" in str(caught.value) and "130" in str(caught.value)


def test_a_length_beyond_computed_positions_is_reported(check: Check) -> None:
    assert "max_position_embeddings (512): eval.seq_len = 513" in check("eval.seq_len=513")
    assert "note" not in check("eval.seq_len=512")


def test_a_missing_token_of_a_served_teacher(check: Check, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KDSCALE_TEACHER_TOKEN", raising=False)
    served = ("distill.teacher_placement=served", "distill.served.urls=['http://127.0.0.1:1']")
    with pytest.raises(ConfigError, match="token_file"):
        check(*served)
    (tmp_path / "token").write_text("secret")
    check(*served, f"distill.served.token_file={tmp_path / 'token'}")


def test_everything_that_is_wrong_is_one_message(check: Check) -> None:
    with pytest.raises(KdscaleError) as caught:
        check("data.sources=[{path: /nowhere.txt}]", "prune={ffn: 4096}", "teacher.path=/nowhere")
    assert "/nowhere.txt" in str(caught.value) and "teacher.path" in str(caught.value)
    with pytest.raises(KdscaleError) as caught:
        check("data.sources=[{path: /nowhere.txt}]", "prune={ffn: 4096}")
    assert "/nowhere.txt" in str(caught.value) and "ffn" in str(caught.value)


def test_names_that_the_system_refuses(check: Check) -> None:
    for field in ("data.sources=[{path: %s}]", "teacher.path=%s"):
        with pytest.raises(KdscaleError) as caught:
            check(field % ("x" * 3000))
        assert len(str(caught.value)) < 4500


def test_text_shorter_than_a_sequence_is_found_before_importance(tiny_config: Path) -> None:
    config = load_config(tiny_config, ["distill={seq_len: 8192, tokens: 100k, global_batch: 2, micro_batch: 2}"])
    with pytest.raises(DataError, match=r"distill\.seq_len = 8,192"):
        run_until(config, "report", Reporter(quiet=True))
    assert not (Path(config.run_dir) / "importance").exists()
    assert run_until(load_config(tiny_config), "data", Reporter(quiet=True), accept_changes=True) is False


def test_a_student_that_no_grid_fits_is_refused_before_it_is_cut(check: Check, gpt2: str) -> None:
    with pytest.raises(ConfigError, match=r"fake_quantize\.group\n.*\n.*64, but hidden is 96"):
        check("distill.fake_quantize={bits: 4, group: 64}")
    with pytest.raises(ConfigError, match="stored the other way round"):
        check(gpt2, *FITS, "distill.fake_quantize={bits: 4, group: 32}")


def test_a_prompt_without_text(check: Check) -> None:
    with pytest.raises(ConfigError, match=r"eval\.prompts"):
        check("eval.prompts=['']")


def test_what_a_tokenizer_adds_or_cuts_is_no_text_of_a_prompt(check: Check, gpt2: str) -> None:
    file = Path(gpt2.removeprefix("teacher.path=")) / "tokenizer.json"
    tokenizer = Tokenizer.from_file(str(file))
    tokenizer.post_processor = TemplateProcessing(single="<|end|> $A", special_tokens=[("<|end|>", 0)])
    tokenizer.normalizer = Strip()
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=4)
    tokenizer.save(str(file))
    with pytest.raises(ConfigError, match="which has no tokens"):
        check(gpt2, *FITS, "eval.prompts=[' ']")
    with pytest.raises(ConfigError, match="positions"):
        check(gpt2, *FITS, f"eval.prompts=['{'a river ' * 60}']")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda folder: (folder / "tokenizer.json").unlink(), r"tokenizer\.json is missing"),
        (lambda folder: (folder / "config.json").unlink(), r"config\.json is missing"),
        (shutil.rmtree, r"distill\.teachers \(other\): path(.|\n)*no such folder"),
        (
            lambda folder: (folder / "tokenizer.json").write_text(
                (folder / "tokenizer.json").read_text().replace("<|end|>", "<|stop|>")
            ),
            r"distill\.teachers \(other\): its tokens are not the student's(.|\n)*targets: full",
        ),
    ],
)
def test_every_one_of_several_teachers_is_looked_at(
    change: Callable[[Path], object], message: str, check: Check, tiny_llama_dir: Path, tmp_path: Path
) -> None:
    teachers = f"distill.teachers=[{{name: own}}, {{name: other, path: {tmp_path / 'other'}}}]"
    full = "distill.objectives=[{name: token_divergence, targets: full}]"
    shutil.copytree(tiny_llama_dir, tmp_path / "other")
    check(teachers, full)
    change(tmp_path / "other")
    with pytest.raises(KdscaleError, match=message):
        check(teachers, full)
