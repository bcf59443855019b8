"""Bad input, as a user meets it: one message that names the file, an exit code, and nothing half-written."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from kdscale.errors import RunFolderError
from kdscale.files import atomic_dir
from kdscale.models.loading import load_model

Cli = Callable[..., Any]


@pytest.fixture
def teacher(tmp_path: Path, tiny_llama_dir: Path) -> Path:
    """A copy of the tiny teacher to break."""
    return Path(shutil.copytree(tiny_llama_dir, tmp_path / "teacher"))


def edit_json(path: Path, **values: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def truncated(teacher: Path) -> str:
    weights = teacher / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    return "model.safetensors"


def corrupt_header(teacher: Path) -> str:
    weights = teacher / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[8:40] = b"\xff" * 32
    weights.write_bytes(bytes(data))
    return "model.safetensors"


def missing_shard(teacher: Path) -> str:
    index = {"metadata": {}, "weight_map": {"model.norm.weight": "model-00001-of-00001.safetensors"}}
    (teacher / "model.safetensors").unlink()
    (teacher / "model.safetensors.index.json").write_text(json.dumps(index))
    return "model-00001-of-00001.safetensors"


def index_outside(teacher: Path) -> str:
    index = {"metadata": {}, "weight_map": {"model.norm.weight": "../secret.safetensors"}}
    (teacher / "model.safetensors").unlink()
    (teacher / "model.safetensors.index.json").write_text(json.dumps(index))
    return "../secret.safetensors"


def pickled(teacher: Path) -> str:
    (teacher / "model.safetensors").rename(teacher / "pytorch_model.bin")
    return "pytorch_model.bin"


def other_shape(teacher: Path) -> str:
    edit_json(teacher / "config.json", intermediate_size=160)
    return "model.layers.0.mlp"


def other_family(teacher: Path) -> str:
    edit_json(teacher / "config.json", model_type="t5")
    return "t5"


def no_config(teacher: Path) -> str:
    (teacher / "config.json").unlink()
    return "config.json"


def bad_config(teacher: Path) -> str:
    (teacher / "config.json").write_text("{")
    return "config.json"


def larger_tokenizer(teacher: Path) -> str:
    path = teacher / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    vocab = tokenizer["model"]["vocab"]
    vocab.update({f"extra{index}": len(vocab) + index for index in range(50)})
    path.write_text(json.dumps(tokenizer))
    return "tokenizer.json"


def no_tokenizer(teacher: Path) -> str:
    (teacher / "tokenizer.json").unlink()
    return "tokenizer"


def linked_licence(teacher: Path) -> str:
    (teacher.parent / "private-key").write_text("secret")
    (teacher / "LICENSE").symlink_to(teacher.parent / "private-key")
    return "leads out of its folder"


DAMAGES = (
    truncated, corrupt_header, missing_shard, index_outside, pickled, other_shape, other_family, no_config, bad_config,
    larger_tokenizer, no_tokenizer, linked_licence,
)  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_teacher(kdscale: Cli, tiny_config: Path, teacher: Path, damage: Callable[[Path], str]) -> None:
    needle = damage(teacher)
    outcome = kdscale("prune", tiny_config, "--set", f"teacher.path={teacher}")
    assert outcome.code == 3, outcome.err
    assert needle in outcome.err
    assert "Traceback" not in outcome.err
    assert not (tiny_config.parent / "run").exists()  # found before anything was made


def test_a_value_that_only_transformers_refuses(kdscale: Cli, tiny_config: Path, teacher: Path) -> None:
    for file, field in (("config.json", "hidden_act"), ("generation_config.json", "early_stopping")):
        before = (teacher / file).read_text()
        edit_json(teacher / file, **{field: "no such thing"})
        outcome = kdscale("prune", tiny_config, "--set", f"teacher.path={teacher}")
        (teacher / file).write_text(before)
        assert outcome.code == 3, outcome.err
        assert "no such thing" in outcome.err and "Traceback" not in outcome.err
        assert not (tiny_config.parent / "run" / "data").exists()  # before any work


def test_a_weight_that_is_no_number(kdscale: Cli, tiny_config: Path, teacher: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(teacher / "model.safetensors")
    tensors["model.layers.2.mlp.up_proj.weight"][3, 5] = float("nan")
    save_file(tensors, teacher / "model.safetensors", {"format": "pt"})
    outcome = kdscale("prune", tiny_config, "--set", f"teacher.path={teacher}")
    assert outcome.code == 3, outcome.err
    assert "tensor model.layers.2.mlp.up_proj.weight has NaN" in outcome.err


@pytest.mark.parametrize(
    ("name", "content", "needle"),
    [
        ("empty.txt", b"", "empty.txt"),
        ("latin.txt", b"caf\xe9 au lait", "latin.txt"),
        ("broken.jsonl", b'{"text": "fine"}\n{"text": \n', "broken.jsonl"),
        ("field.jsonl", b'{"txt": "the wrong field"}\n', "field.jsonl"),
        ("short.jsonl", b'{"text": ""}\n{"text": " "}\n' * 3, "short.jsonl"),
    ],
)
def test_text_that_cannot_be_used(
    kdscale: Cli, tiny_config: Path, tmp_path: Path, name: str, content: bytes, needle: str
) -> None:
    (tmp_path / name).write_bytes(content)
    source = f"data.sources=[{{path: {tmp_path / name}}}]"
    outcome = kdscale("prune", tiny_config, "--set", source)
    assert outcome.code == 4, outcome.err
    assert needle in outcome.err
    assert "Traceback" not in outcome.err
    assert not (tmp_path / "run" / "stages" / "data.json").exists()
    assert not (tmp_path / "run" / "data").exists()


@pytest.mark.parametrize(
    ("override", "needle"),
    [
        ("prune.ffn=4096", "ffn"),
        ("prune.heads=5", "heads"),
        ("prune.target_params=1k", "prune.target_params"),
        ("teacher.path=/nowhere", "teacher.path"),
        ("distil.tokens=1", "did you mean 'distill'"),
        ("data.sources=[{path: /nowhere.txt}]", "/nowhere.txt"),
    ],
)
def test_a_config_that_cannot_work(kdscale: Cli, tiny_config: Path, override: str, needle: str) -> None:
    outcome = kdscale("plan", tiny_config, "--set", override)
    assert outcome.code in (2, 4), outcome.err
    assert needle in outcome.err
    assert "Traceback" not in outcome.err


def test_a_folder_that_cannot_be_written(kdscale: Cli, tiny_config: Path) -> None:
    outcome = kdscale("prune", tiny_config, "--set", "run_dir=/sys/kdscale-run")
    assert outcome.code == 5, outcome.err
    assert "/sys/kdscale-run" in outcome.err
    assert "run_dir" in outcome.err


def test_a_closed_output(kdscale_environment: dict[str, str], tmp_path: Path) -> None:
    """A reader that leaves early ends the command quietly; without any output at all it works as ever."""
    (tmp_path / "config.yaml").write_text("")
    command = f"{sys.executable} -m kdscale.cli.main"
    for line, code in (
        (f"{command} --help | true; exit ${{PIPESTATUS[0]}}", (0, 1)),
        (f"{command} status {tmp_path} >&-", (0,)),
        (f"{command} status {tmp_path} >&- 2>&-", (0,)),
    ):
        done = subprocess.run(
            ["bash", "-c", line], capture_output=True, text=True, check=False, env=kdscale_environment, timeout=120
        )
        assert done.returncode in code and done.stderr == "", (line, done.returncode, done.stderr)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own with 100 MB; needs the right to mount."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=100m", "tmpfs", str(folder)], check=False, capture_output=True
    )
    if mounted.returncode:
        pytest.skip("mounting a file system is not allowed here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_disk_that_is_full_from_the_start(kdscale: Cli, tiny_config: Path, small_disk: Path) -> None:
    (small_disk / "other").write_bytes(bytes(80 << 20))
    outcome = kdscale("prune", tiny_config, "--set", f"run_dir={small_disk / 'run'}")
    assert outcome.code == 5, outcome.err
    assert "without room" in outcome.err
    assert str(small_disk) in outcome.err
    assert not (small_disk / "run" / "data").exists()


def test_a_disk_that_fills_up_on_the_way(small_disk: Path) -> None:
    """The real system call fails in the middle of a file: nothing half-written is left, the message says what to do."""
    (small_disk / "other").write_bytes(bytes(80 << 20))
    with pytest.raises(RunFolderError, match="disk is full"), atomic_dir(small_disk / "out") as tmp:
        for index in range(64):
            (tmp / f"{index}").write_bytes(bytes(1 << 20))
    assert [item.name for item in small_disk.iterdir()] == ["other"]


def test_code_that_comes_with_a_checkpoint_is_not_run(kdscale: Cli, tiny_config: Path, teacher: Path) -> None:
    trace = tiny_config.parent / "code-was-run"
    for name in ("modeling_own", "configuration_own", "tokenization_own"):
        (teacher / f"{name}.py").write_text(f"open({str(trace)!r}, 'w').close()\nclass Own: pass\n")
    model_map = {"AutoConfig": "configuration_own.Own", "AutoModelForCausalLM": "modeling_own.Own"}
    edit_json(teacher / "config.json", auto_map=model_map)
    edit_json(
        teacher / "tokenizer_config.json", auto_map={"AutoTokenizer": ["tokenization_own.Own", "tokenization_own.Own"]}
    )
    outcome = kdscale("prune", tiny_config, "--set", f"teacher.path={teacher}")
    assert not trace.exists()
    assert "Traceback" not in outcome.err
    assert not list((tiny_config.parent / "run").rglob("*.py"))
    # whoever trusts the student's code can load it: nothing in it names code that stayed behind
    assert outcome.code == 0, outcome.err
    assert "own code (auto_map) is left out" in outcome.err
    for name in ("config.json", "tokenizer_config.json"):
        assert "auto_map" not in (tiny_config.parent / "run" / "pruned" / name).read_text()


def test_code_that_is_trusted_goes_along(kdscale: Cli, tiny_config: Path, teacher: Path) -> None:
    """The pruned student loads by its own classes, which need a helper beside them."""
    (teacher / "helper.py").write_text("MARK = 7\n")
    (teacher / "modeling_own.py").write_text(
        "from transformers import LlamaForCausalLM\nfrom .helper import MARK\n"
        "class OwnForCausalLM(LlamaForCausalLM):\n    mark = MARK\n"
    )
    edit_json(teacher / "config.json", auto_map={"AutoModelForCausalLM": "modeling_own.OwnForCausalLM"})
    trust = ("--set", "teacher.trust_remote_code=true")
    outcome = kdscale("prune", tiny_config, "--set", f"teacher.path={teacher}", *trust)
    assert outcome.code == 0, outcome.err
    pruned = tiny_config.parent / "run" / "pruned"
    assert sorted(file.name for file in pruned.glob("*.py")) == ["helper.py", "modeling_own.py"]
    model = load_model(pruned, dtype=torch.float32, device=torch.device("cpu"), trust_remote_code=True)
    assert type(model).__name__ == "OwnForCausalLM" and model.mark == 7
    (teacher / "helper.py").unlink()
    outcome = kdscale("prune", tiny_config, "--set", f"teacher.path={teacher}", *trust)
    assert outcome.code == 3 and "helper, which is not there" in outcome.err


def test_the_folder_of_another_run(kdscale: Cli, tiny_config: Path) -> None:
    too_small = kdscale("plan", tiny_config, "--set", "prune.target_params=1k", "--set", "prune.ffn=null")
    assert too_small.code == 2  # nothing was made: the corrected config is welcome in the same folder
    assert kdscale("plan", tiny_config).code == 0
    outcome = kdscale("plan", tiny_config, "--set", "prune.ffn=96")
    assert outcome.code == 5
    assert "prune.ffn: 64 → 96" in outcome.err
    accepted = kdscale("plan", tiny_config, "--set", "prune.ffn=96", "--accept-changes")
    assert accepted.code == 0, accepted.err
    assert "96" in accepted.out


def test_an_edited_plan_is_used_and_a_spoiled_one_refused(kdscale: Cli, tiny_config: Path) -> None:
    assert kdscale("plan", tiny_config).code == 0
    path = tiny_config.parent / "run" / "plan.json"
    plan = json.loads(path.read_text())
    missing = sorted(set(range(128)) - set(plan["kept"]["ffn"][0]))
    plan["kept"]["ffn"][0] = sorted([*plan["kept"]["ffn"][0][1:], missing[0]])
    path.write_text(json.dumps(plan))
    assert kdscale("prune", tiny_config).code == 0
    plan["kept"]["ffn"][0][0] = plan["kept"]["ffn"][0][1]
    path.write_text(json.dumps(plan))
    outcome = kdscale("prune", tiny_config)
    assert outcome.code == 2
    assert "kept.ffn[0]" in outcome.err
