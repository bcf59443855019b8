"""Kubernetes objects as plain values: an indexed Job with a headless Service, a JobSet, or Kubeflow's PyTorchJob."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from kdscale_launch.environment import check_text, check_variables
from kdscale_launch.job import GRACE_SECONDS, STOPPED_EXIT_CODE, LaunchError

# The name becomes pod names (name-index-random) and a DNS label.
_NAME = re.compile(r"[a-z]([a-z0-9-]{0,38}[a-z0-9])?")
_OBJECT = re.compile(r"[a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?")  # namespaces, claims and Secrets
_IMAGE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:/@+-]*")
_QUANTITY = re.compile(r"[0-9]{1,9}(\.[0-9]{1,3})?(m|k|Ki|M|Mi|G|Gi|T|Ti)?")
_LABEL = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?")
_INDEX_VARIABLE = "JOB_COMPLETION_INDEX"
QUEUE_LABEL = "kueue.x-k8s.io/queue-name"  # Kueue's documentation, "Run jobs managed by Kueue"
PRIORITY_LABEL = "kueue.x-k8s.io/priority-class"
CONTAINER = "pytorch"  # the name that a PyTorchJob insists on

Object = dict[str, Any]


@dataclass(frozen=True)
class KubernetesJob:
    """What the pods run. `volumes` maps a claim to its mount path; `secrets` become environment variables.

    `cpu` and `memory` are what each pod asks for, as Kubernetes writes it (8, 500m, 64Gi). `notes`: a folder in which
    the nodes leave their exit codes (kdscale_launch.systems.notes).
    Raises LaunchError for a name that Kubernetes would refuse, and for control characters anywhere.
    """

    name: str
    nodes: int
    slots: int
    image: str
    command: tuple[str, ...]
    log_dir: str
    cwd: str
    python: str = "python"
    namespace: str = "default"
    env: Mapping[str, str] = field(default_factory=dict)
    secrets: tuple[str, ...] = ()
    volumes: Mapping[str, str] = field(default_factory=dict)
    gpus: int = 0  # per pod
    port: int = 29500
    max_restarts: int = 3
    grace: float = GRACE_SECONDS
    final_codes: frozenset[int] = frozenset()
    cpu: str = ""
    memory: str = ""
    notes: str = ""

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name):
            raise LaunchError(
                f"not a Kubernetes name: {self.name!r}; lower-case letters, digits and dashes, at most 40"
            )
        for what, names in (("--namespace", [self.namespace]), ("--volume", self.volumes), ("--secret", self.secrets)):
            if wrong := [name for name in names if not _OBJECT.fullmatch(name)]:
                raise LaunchError(f"{what}: not a Kubernetes name: {wrong[0][:200]!r}")
        if not _IMAGE.fullmatch(self.image):
            raise LaunchError(f"--image: expected the name of a container image, got {self.image[:200]!r}")
        for what, quantity in (("cpu", self.cpu), ("memory", self.memory)):
            if quantity and not _QUANTITY.fullmatch(quantity):
                raise LaunchError(f"{what}: expected a quantity such as 8, 500m or 64Gi, got {quantity[:200]!r}")
        paths = (self.log_dir, self.cwd, self.python, self.notes, *self.volumes.values())
        check_text("the Kubernetes manifest", *self.command, *paths)
        check_variables(self.env)


def indexed_job(job: KubernetesJob) -> list[Object]:
    """A headless Service, which names pods before they are ready, and a Job with one pod per node."""
    labels = {"app.kubernetes.io/name": "kdscale", "app.kubernetes.io/instance": job.name}
    service: Object = {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": job.name, "namespace": job.namespace, "labels": labels},
        "spec": {
            "clusterIP": "None",
            "publishNotReadyAddresses": True,
            "selector": labels,
            "ports": [{"name": "master", "port": job.port}],
        },
    }
    pod = {**_pod(job, _INDEX_VARIABLE, f"{job.name}-0.{job.name}"), "restartPolicy": "Never", "subdomain": job.name}
    indexed: Object = {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {"name": job.name, "namespace": job.namespace, "labels": labels},
        "spec": {
            "completionMode": "Indexed",
            "completions": job.nodes,
            "parallelism": job.nodes,
            "backoffLimit": job.max_restarts * job.nodes,  # when one pod breaks, the others do too
            "podFailurePolicy": {"rules": _failure_rules(job)},
            "template": {"metadata": {"labels": labels}, "spec": pod},
        },
    }
    return [service, indexed]


def job_set(
    job: KubernetesJob,
    *,
    labels: Mapping[str, str],
    annotations: Mapping[str, str],
    queue: str = "",
    priority: str = "",
) -> Object:
    """A JobSet (jobset.x-k8s.io/v1alpha2) with one pod per node, which restarts as a whole when a pod breaks.

    With a `queue` of Kueue's it is made suspended, and Kueue starts it when there is room. A pod that is moved away, or
    saved after a signal, is made again without counting. Raises LaunchError for labels that Kubernetes would refuse.
    """
    queued = {QUEUE_LABEL: queue, PRIORITY_LABEL: priority} if queue else {}
    every = {**labels, **{key: value for key, value in queued.items() if value}}
    if wrong := [value for value in every.values() if not _LABEL.fullmatch(value)]:
        raise LaunchError(f"not a Kubernetes label: {wrong[0][:200]!r}; letters, digits, dashes and dots, at most 63")
    check_text("the annotations", *annotations.values())
    pod = {**_pod(job, _INDEX_VARIABLE, f"{job.name}-nodes-0-0.{job.name}"), "restartPolicy": "Never"}
    nodes: Object = {
        "completionMode": "Indexed",
        "completions": job.nodes,
        "parallelism": job.nodes,
        "backoffLimit": 0,  # the others cannot go on without the one that broke: the set restarts
        "podFailurePolicy": {"rules": _failure_rules(job)},
        "template": {"metadata": {"labels": dict(labels)}, "spec": pod},
    }
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": {
            "name": job.name, "namespace": job.namespace, "labels": every, "annotations": dict(annotations)
        },
        "spec": {
            "suspend": bool(queue),
            "network": {"enableDNSHostnames": True, "subdomain": job.name, "publishNotReadyAddresses": True},
            "failurePolicy": {
                "maxRestarts": job.max_restarts,
                # a final exit code fails the Job through its podFailurePolicy, and then the set
                "rules": [
                    {"name": "final", "action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}
                ],
            },
            "replicatedJobs": [
                {"name": "nodes", "replicas": 1, "template": {"metadata": {"labels": dict(labels)}, "spec": nodes}}
            ],
        },
    }  # fmt: skip


def pytorch_job(job: KubernetesJob) -> list[Object]:
    """A job for Kubeflow's training operator (v1), which sets RANK (of the pod), MASTER_ADDR and MASTER_PORT itself."""
    pod = _pod(job, "RANK", None)
    replica: Object = {"restartPolicy": "OnFailure", "template": {"spec": pod}}
    replicas: Object = {"Master": {"replicas": 1, **replica}}
    if job.nodes > 1:
        replicas["Worker"] = {"replicas": job.nodes - 1, **replica}
    return [
        {
            "apiVersion": "kubeflow.org/v1",
            "kind": "PyTorchJob",
            "metadata": {"name": job.name, "namespace": job.namespace},
            "spec": {"runPolicy": {"backoffLimit": job.max_restarts * job.nodes}, "pytorchReplicaSpecs": replicas},
        }
    ]


def as_list(objects: list[Object]) -> Object:
    """One document for `kubectl apply -f`."""
    return {"apiVersion": "v1", "kind": "List", "items": objects}


def _failure_rules(job: KubernetesJob) -> list[Object]:
    """What does not count as a failure of a pod, and what is one of the whole Job."""
    rules: list[Object] = [{"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]}]
    rules += [_rule_for_codes("Ignore", frozenset({STOPPED_EXIT_CODE}))]
    return rules + ([_rule_for_codes("FailJob", job.final_codes)] if job.final_codes else [])


def _rule_for_codes(action: str, codes: frozenset[int]) -> Object:
    return {"action": action, "onExitCodes": {"operator": "In", "values": sorted(codes)}}


def _literal(text: str) -> str:
    """A word of a command or a variable's value that Kubernetes leaves as it is: it replaces $(NAME), and $$ by $."""
    return text.replace("$", "$$")


def _pod(job: KubernetesJob, index_variable: str, master: str | None) -> Object:
    """A pod that starts its node's ranks; without `master`, they find rank 0 through MASTER_ADDR and MASTER_PORT."""
    node = [job.python, "-m", "kdscale_launch.systems.node", "--nodes", str(job.nodes), "--slots", str(job.slots)]
    node += ["--node-rank-from", index_variable, "--log-dir", job.log_dir, "--grace", f"{job.grace:g}"]
    node += ["--master-addr", master, "--master-port", str(job.port)] if master else []
    node += ["--notes", job.notes] if job.notes else []
    limits = {"nvidia.com/gpu": str(job.gpus)} if job.gpus else {}
    requests = {name: value for name, value in (("cpu", job.cpu), ("memory", job.memory)) if value}
    container: Object = {
        "name": CONTAINER,
        "image": job.image,
        "command": [_literal(word) for word in (*node, "--", *job.command)],
        "workingDir": job.cwd,
        "env": [{"name": name, "value": _literal(value)} for name, value in job.env.items()],
        "envFrom": [{"secretRef": {"name": name}} for name in job.secrets],
        "resources": {**({"limits": limits} if limits else {}), **({"requests": requests} if requests else {})},
        "volumeMounts": [
            {"name": f"claim-{number}", "mountPath": path} for number, path in enumerate(job.volumes.values())
        ],
    }
    # Ranks exchange data through /dev/shm, of which containers get 64 MB by default.
    volumes: list[Object] = [{"name": "shm", "emptyDir": {"medium": "Memory"}}]
    container["volumeMounts"].append({"name": "shm", "mountPath": "/dev/shm"})
    volumes += [
        {"name": f"claim-{number}", "persistentVolumeClaim": {"claimName": claim}}
        for number, claim in enumerate(job.volumes)
    ]
    return {"terminationGracePeriodSeconds": math.ceil(job.grace) + 30, "containers": [container], "volumes": volumes}
