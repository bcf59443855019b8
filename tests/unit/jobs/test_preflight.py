"""What preflight concludes from made-up reports, its commands on this machine, and what it refuses."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from kdscale.errors import ConfigError
from kdscale.jobs import preflight
from kdscale.runtime.versions import version_of


def report(**changes: Any) -> dict[str, Any]:
    versions = dict.fromkeys(("python", "kdscale", "source", "torch", "transformers", "deepspeed", "safetensors",
                              "tokenizers", "numpy"), "9.0") | changes.pop("versions", {})  # fmt: skip
    return {
        "versions": versions, "cores": 8, "gpus": 0, "config": "c" * 64, "config_error": None, "teacher": "t",
        "write_error": None, "free_bytes": 10**12, "kernels": None, "slow": None, "too_many_ranks": None,
        "services": None, **changes,
    }  # fmt: skip


def bad(reports: dict[str, Any], skews: dict[str, tuple[float, float]] | None = None) -> dict[str, str]:
    skews = skews or dict.fromkeys(reports, (0.0, 0.001))
    findings = preflight.compare_reports(reports, dict.fromkeys(reports, 2), skews)
    return {finding.topic: finding.text for finding in findings if finding.severity == "bad"}


@pytest.fixture
def config(tmp_path: Path, tiny_llama_dir: Path) -> str:
    path = tmp_path / "c.yaml"
    path.write_text(f"name: x\nrun_dir: {tmp_path}/run\nteacher: {{path: {tiny_llama_dir}}}\nprune: {{ffn: 64}}\n")
    return str(path)


def test_equal_hosts_are_fine() -> None:
    assert bad({"a": report(), "b": report()}) == {}


@pytest.mark.parametrize(
    ("other", "topic", "text"),
    [
        (report(versions={"torch": "2.0"}), "torch", "b: 2.0; a has 9.0"),
        (report(versions={"deepspeed": None}), "deepspeed", "b: not installed; a has 9.0"),
        (report(versions={"source": "x"}), "source", "b: x; a has 9.0"),
        (report(config="d" * 64), "config", "b: dddddddddddd; a has cccccccccccc"),
        (report(config_error="no file"), "config", "b: no file"),
        (report(teacher="u"), "teacher", "b: u; a has t"),
        (report(write_error="read-only"), "run folder", "b: read-only"),
        (report(free_bytes=10), "disk", "0.0 GB free (b)"),
        (report(gpus=8), "devices", "a: 2 slots, 0 GPUs visible"),
    ],
)
def test_what_differs_is_named_with_its_host(other: dict[str, Any], topic: str, text: str) -> None:
    assert bad({"a": report(), "b": other}) == {topic: text}


def test_a_host_without_a_compiler_is_noted() -> None:
    hosts = {"a": report(gpus=2), "b": report(gpus=2, kernels="no C compiler")}
    (kernels,) = [
        finding
        for finding in preflight.compare_reports(hosts, dict.fromkeys(hosts, 2), dict.fromkeys(hosts, (0.0, 0.001)))
        if finding.topic == "kernels"
    ]
    assert (kernels.severity, kernels.text) == ("note", "all ranks will compute in torch, slower: b: no C compiler")


def test_a_deepspeed_that_is_too_old_everywhere_is_in_the_way() -> None:
    old = report(versions={"deepspeed": "0.19.7"})
    assert bad({"a": old, "b": old}) == {"deepspeed": "0.19.7; 0.19.8 or newer is needed"}


def test_slow_products_are_noted_with_their_host() -> None:
    hosts = {"a": report(gpus=2), "b": report(gpus=2, slow="V100 does not multiply bfloat16")}
    found = preflight.compare_reports(hosts, dict.fromkeys(hosts, 2), dict.fromkeys(hosts, (0.0, 0.001)))
    (products,) = [finding for finding in found if finding.topic == "products"]
    assert (products.severity, products.text) == ("note", "b: V100 does not multiply bfloat16")


def test_stages_of_one_host_count_the_gpus_of_the_first(config: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight, "_count_gpus", lambda: 1)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda _: SimpleNamespace(major=7))
    monkeypatch.setattr("torch.cuda.get_device_name", lambda _: "T4")
    monkeypatch.setattr("kdscale.runtime.kernel_backend.launch_obstacle", lambda gpu: f"no compiler for {gpu}")
    found = preflight.probe("m-0", config, ["importance.processes=2", "distill.processes=8", "distill.micro_batch=1"])
    assert "importance.processes = 2" in found["too_many_ranks"] and "distill" not in found["too_many_ranks"]
    assert (found["gpus"], found["kernels"]) == (1, "no compiler for 0")
    assert found["slow"] == "T4 does not multiply bfloat16 in hardware: it is used in float32"
    hosts = {"a": report(gpus=2, too_many_ranks=found["too_many_ranks"]), "b": report(gpus=2)}
    assert "importance.processes = 2" in bad(hosts)["devices"]
    on_cpu = preflight.probe("m-1", config, ["runtime.device=cpu"])
    assert (on_cpu["gpus"], on_cpu["kernels"], on_cpu["too_many_ranks"]) == (0, None, None)


def test_a_served_teacher_is_asked_before_anything_is_pruned(
    config: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KDSCALE_TEACHER_TOKEN", "token")
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}"
        settings = ["distill.teacher_placement=served", f"distill.served.urls=[{url}]"]
        severity, text = preflight.probe("m-0", config, settings)["services"]
    assert severity == "note" and f"a teacher service at {url}" in text  # it may be started later

    def refuse(*_: object) -> None:
        raise ConfigError("distill.served.token_file", got="a token that it does not accept")

    monkeypatch.setattr("kdscale.teacher.remote.check_services", refuse)
    answer = preflight.probe("m-0", config, settings)["services"]
    assert bad({"a": report(), "b": report(services=answer)}) == {
        "teacher service": "b: distill.served.token_file got: a token that it does not accept"
    }
    assert preflight.probe("m-0", config, [])["services"] is None
    with_adapters = [*settings, f"teacher.adapters=[{tmp_path}]"]
    severity, text = preflight.probe("m-0", config, with_adapters)["services"]
    assert severity == "note" and text.endswith("is not there yet")  # it is merged before it is served


def test_the_key_of_an_endpoint_must_have_reached_every_host(config: str, monkeypatch: pytest.MonkeyPatch) -> None:
    endpoint = "{base_url: 'https://h/v1', model: m, key_variable: SOME_KEY}"
    settings = ["distill.teacher_placement=endpoint", f"distill.endpoint={endpoint}"]
    monkeypatch.delenv("SOME_KEY", raising=False)
    severity, text = preflight.probe("m-0", config, settings)["services"]
    assert severity == "bad" and "SOME_KEY" in text
    monkeypatch.setenv("SOME_KEY", "k")
    assert preflight.probe("m-0", config, settings)["services"] is None


def test_a_package_that_is_missing_everywhere_is_bad() -> None:
    none = report(versions={"deepspeed": None})
    assert list(bad({"a": none, "b": none})) == ["deepspeed"]


def test_a_clock_is_wrong_only_beyond_what_was_measured() -> None:
    hosts = {"a": report(), "b": report()}
    assert bad(hosts, {"a": (0.0, 0.1), "b": (-7.0, 0.1)}) == {"clocks": "b: -7.0 s"}
    assert bad(hosts, {"a": (0.0, 0.1), "b": (-7.0, 3.0)}) == {}


def test_marks_prove_a_shared_folder(tmp_path: Path, config: str) -> None:
    one = preflight.probe("m-0", config, [])
    other = preflight.probe("m-1", config, [f"run_dir={tmp_path}/elsewhere"])
    assert (one["config_error"], one["write_error"]) == (None, None)
    assert one["config"] != other["config"]
    assert one["teacher"] == other["teacher"]
    assert preflight.unseen_marks(["m-0", "m-1"], config, [], seconds=0.0) == ["m-1"]
    assert preflight.check_shared_folder({"a": ["b"], "b": []}).severity == "bad"
    preflight.remove_marks(["m-0", "m-1"], config, [])
    assert list((tmp_path / "run" / "logs").iterdir()) == []


def test_a_config_that_cannot_be_read_is_reported_not_raised(tmp_path: Path) -> None:
    assert "does not exist" in preflight.probe("m", str(tmp_path / "none.yaml"), [])["config_error"]


@pytest.mark.parametrize("arguments", [("colective", "60", "CONFIG"), ("probe", "mark"), ()])
def test_an_unknown_command_is_refused_with_the_known_ones(
    arguments: tuple[str, ...], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preflight, "collective", lambda *_: pytest.fail("the collective ran"))
    assert preflight.main(arguments) == 2
    assert "probe | shared | clean | collective" in capsys.readouterr().err


def test_an_answer_is_one_json_line(
    config: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KDSCALE_HOST_INDEX", "3")
    assert preflight.main(["probe", "m", config]) == 0
    assert json.loads(capsys.readouterr().out)["versions"]["torch"] == version_of("torch")
    assert preflight.main(["shared", "m-3", config]) == 0
    assert json.loads(capsys.readouterr().out) == []
