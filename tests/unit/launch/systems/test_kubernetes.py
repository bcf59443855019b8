"""Kubernetes objects, held against the published schema."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from kdscale_launch import LaunchError
from kdscale_launch.systems import kubernetes as kube


def _closed(**fields: object) -> dict[str, object]:
    return {"type": "object", "additionalProperties": False, "properties": fields}


_TEXT, _NUMBER, _FLAG = {"type": "string"}, {"type": "integer"}, {"type": "boolean"}
_TEXTS = {"type": "object", "additionalProperties": _TEXT}
# What we use of jobset.x-k8s.io/v1alpha2 (its CRD in JobSet 0.9): names, types and the values of enumerations.
JOBSET = {
    **_closed(
        apiVersion={"const": "jobset.x-k8s.io/v1alpha2"},
        kind={"const": "JobSet"},
        metadata=_closed(name=_TEXT, namespace=_TEXT, labels=_TEXTS, annotations=_TEXTS),
        spec=_closed(
            suspend=_FLAG,
            ttlSecondsAfterFinished={"type": "integer", "minimum": 0},
            network=_closed(enableDNSHostnames=_FLAG, subdomain=_TEXT, publishNotReadyAddresses=_FLAG),
            failurePolicy=_closed(
                maxRestarts=_NUMBER,
                rules={
                    "type": "array",
                    "items": {
                        **_closed(
                            name={"type": "string", "pattern": "^[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?$"},
                            action={"enum": ["FailJobSet", "RestartJobSet", "RestartJobSetAndIgnoreMaxRestarts"]},
                            onJobFailureReasons={
                                "type": "array",
                                "items": {"enum": ["BackoffLimitExceeded", "DeadlineExceeded", "PodFailurePolicy"]},
                            },
                        ),
                        "required": ["name", "action"],
                    },
                },
            ),
            replicatedJobs={
                "type": "array",
                "items": {
                    **_closed(
                        name=_TEXT,
                        replicas={"type": "integer", "minimum": 0},
                        template=_closed(metadata={"type": "object"}, spec={"type": "object"}),
                    ),
                    "required": ["name", "template"],
                },
            },
        ),
    ),
    "required": ["apiVersion", "kind", "metadata", "spec"],
}


@pytest.fixture
def pods() -> kube.KubernetesJob:
    return kube.KubernetesJob(
        "kdscale-x", 4, 8, "registry/image:1", ("python", "-m", "kdscale.jobs.rank", "/data/c.yaml"), "/data/logs",
        "/data", volumes={"claim": "/data"}, secrets=("hf",), gpus=8, env={"HF_HOME": "/data/hf"},
        final_codes=frozenset({2, 3}),
    )  # fmt: skip


def test_an_indexed_job_finds_its_first_pod_by_name(pods):
    service, job = kube.indexed_job(pods)
    spec, pod = job["spec"], job["spec"]["template"]["spec"]
    assert (spec["completionMode"], spec["completions"], spec["parallelism"]) == ("Indexed", 4, 4)
    assert pod["subdomain"] == service["metadata"]["name"]
    assert service["spec"]["clusterIP"] == "None"
    assert service["spec"]["publishNotReadyAddresses"]  # ranks meet before any pod is ready
    assert service["spec"]["selector"].items() <= spec["template"]["metadata"]["labels"].items()
    command = pod["containers"][0]["command"]
    assert command[command.index("--master-addr") + 1] == "kdscale-x-0.kdscale-x"
    assert command[command.index("--") + 1 :] == list(pods.command)
    mounted = {mount["name"] for mount in pod["containers"][0]["volumeMounts"]}
    assert mounted == {volume["name"] for volume in pod["volumes"]}
    ignored = [rule for rule in spec["podFailurePolicy"]["rules"] if rule["action"] == "Ignore"]
    assert {"operator": "In", "values": [75]} in [rule.get("onExitCodes") for rule in ignored]


def test_kubernetes_objects_hold_to_the_published_schema(pods):
    validate = pytest.importorskip("kubernetes_validate", reason="kubernetes-validate carries the schema")
    version = validate.latest_version()
    for item in kube.indexed_job(pods):
        validate.validate(item, version, strict=True)
    broken = kube.indexed_job(pods)[1]
    broken["spec"]["completion"] = 3
    with pytest.raises(validate.ValidationError):
        validate.validate(broken, version, strict=True)


@pytest.fixture
def job_set(pods) -> kube.Object:
    pods = replace(pods, cpu="8", memory="64Gi", notes="/data/notes")
    return kube.job_set(
        pods, labels={"kdscale-run": "a"}, annotations={"kdscale-name": "a: {b}"}, queue="team", priority="high"
    )


def test_a_jobset_finds_its_first_pod_by_name(job_set):
    (nodes,) = job_set["spec"]["replicatedJobs"]
    command = nodes["template"]["spec"]["template"]["spec"]["containers"][0]["command"]
    first = f"{job_set['metadata']['name']}-{nodes['name']}-0-0.{job_set['spec']['network']['subdomain']}"
    assert command[command.index("--master-addr") + 1] == first
    assert command[command.index("--notes") + 1] == "/data/notes"
    assert job_set["spec"]["suspend"]  # Kueue starts it
    assert job_set["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "team"
    assert not kube.job_set(kube.KubernetesJob("a", 1, 1, "i", ("p",), "/l", "/"), labels={}, annotations={})["spec"][
        "suspend"
    ]


def test_a_jobset_holds_to_the_published_schema(job_set):
    jsonschema = pytest.importorskip("jsonschema")
    check = jsonschema.Draft202012Validator(JOBSET).validate
    check(job_set)
    validate = pytest.importorskip("kubernetes_validate", reason="kubernetes-validate carries the schema")
    (nodes,) = job_set["spec"]["replicatedJobs"]
    job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "x"}, "spec": nodes["template"]["spec"]}
    validate.validate(job, validate.latest_version(), strict=True)
    for broken in (
        {"suspend": "yes"}, {"replicatedJob": []}, {"failurePolicy": {"rules": [{"name": "x", "action": "Fail"}]}},
        {"network": {"dns": True}},
    ):  # fmt: skip
        with pytest.raises(jsonschema.ValidationError):
            check({**job_set, "spec": {**job_set["spec"], **broken}})


@pytest.mark.parametrize("value", ["a b", "a\nb", "-a", "a" * 64, "{x}"])
def test_labels_that_kubernetes_would_refuse_are_refused_here(pods, value):
    for names in ({"labels": {"kdscale-run": value}}, {"queue": value}):
        with pytest.raises(LaunchError, match="label"):
            kube.job_set(pods, **{"labels": {}, "annotations": {}, **names})
    with pytest.raises(LaunchError, match="memory"):
        replace(pods, memory=value)


def test_a_pytorchjob_has_one_master_and_leaves_the_address_to_the_operator(pods):
    (job,) = kube.pytorch_job(pods)
    replicas = job["spec"]["pytorchReplicaSpecs"]
    assert (replicas["Master"]["replicas"], replicas["Worker"]["replicas"]) == (1, 3)
    container = replicas["Worker"]["template"]["spec"]["containers"][0]
    assert container["name"] == "pytorch"
    assert "--master-addr" not in container["command"]


@pytest.mark.parametrize("name", ["Big", "a_b", "-a", "a" * 60, ""])
def test_a_name_that_kubernetes_would_refuse_is_refused_here(name):
    with pytest.raises(LaunchError, match="not a Kubernetes name"):
        kube.KubernetesJob(name, 1, 1, "i", ("p",), "/l", "/")


def test_kubernetes_leaves_every_word_as_it_is(pods):
    """Kubernetes replaces $(HF_TOKEN) in commands and values by the variable, and $$ by $."""
    words = ("--x=$(HF_TOKEN)", "$$(HF_TOKEN)", "a$b$", "line: {y}")
    _, job = kube.indexed_job(replace(pods, command=words, env={"HF_HOME": "$(HF_TOKEN)"}))
    container = job["spec"]["template"]["spec"]["containers"][0]
    assert [_expanded(word) for word in container["command"][-4:]] == list(words)
    assert _expanded(container["env"][0]["value"]) == "$(HF_TOKEN)"


def _expanded(text: str) -> str:
    """What Kubernetes makes of a word where HF_TOKEN is known: each match is the leftmost, as its own scanner does."""
    return re.sub(r"\$\$|\$\(HF_TOKEN\)", lambda match: "$" if match[0] == "$$" else "hf_secret", text)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"namespace": "a\nb: c"}, "--namespace"),
        ({"image": "image\n"}, "--image"),
        ({"secrets": ("-x",)}, "--secret"),
        ({"volumes": {"A b": "/x"}}, "--volume"),
        ({"volumes": {"a": "/x\n"}}, "without line breaks"),
        ({"command": ("p", "\x1b[2J")}, "without line breaks"),
        ({"cwd": "/a\0b"}, "without line breaks"),
        ({"env": {"A B": "1"}}, "letters, digits and _"),
    ],
)
def test_texts_that_no_manifest_can_hold_are_refused(pods, changed, message):
    with pytest.raises(LaunchError, match=message):
        replace(pods, **changed)
