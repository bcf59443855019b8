"""Runs on Kubernetes: a JobSet for each attempt, queued by Kueue where the target names a queue.

The object's name and labels hold the run and the attempt; nothing without these labels is ever changed or deleted.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, Literal

from kdscale.errors import ConfigError, FileError, LackOfMemoryError
from kdscale.files import parse_json
from kdscale.jobs.launch import launcher_errors
from kdscale.runtime.exits import FINAL_CODES
from kdscale.service.engines.cluster import Attempt, ClusterEngine, Sighting, job_name, labels, people_labels
from kdscale.service.engines.engine import EngineUnavailableError, Job
from kdscale.service.engines.programs import Answer, ask, failure, tail_of
from kdscale.service.engines.ranks import rank_request, rank_variables, working_folder
from kdscale.service.engines.targets import KubernetesTarget
from kdscale_launch.systems import kubernetes as kube
from kdscale_launch.systems import notes

_KIND = "jobsets.jobset.x-k8s.io"
_KEPT_SECONDS = 7 * 86_400  # that the cluster keeps an ended JobSet, with the logs of its pods
_LINE = 100  # bytes of a line of a log, on average
_PASSING = re.compile(
    r"unable to connect|connection refused|i/o timeout|timed? ?out|tls handshake|etcdserver|service ?unavailable"
    r"|internal ?error|too ?many ?requests|server is currently unable|no such host|network is unreachable|EOF$"
    r"|failed calling webhook|connection reset",
    re.IGNORECASE | re.MULTILINE,
)


class KubernetesEngine(ClusterEngine):
    """JobSets. The set restarts by itself when a pod breaks, and goes on when a pod is moved or Kueue preempts it."""

    name = "kubernetes"
    title = "Kubernetes"
    one_by_name = True

    def prepare(self, job: Job, attempt: Attempt, target: KubernetesTarget) -> dict[str, Any]:
        """The JobSet. Raises ConfigError for names that Kubernetes would refuse, and for pods that cannot work."""
        slots = target.slots_per_node
        if not target.image:
            raise ConfigError("target.image", expected="a container image with kdscale in it", got="none",
                              hint="an admin names one under engines.kubernetes in serve.yaml")  # fmt: skip
        request = rank_request(job, target.nodes * slots)
        if request.config.runtime.device == "cuda" and target.gpus < slots:
            raise ConfigError("target.gpus", expected=f"{slots}, one for each process", got=str(target.gpus))
        with launcher_errors("target"):
            pods = kube.KubernetesJob(
                name=job_name(job), nodes=target.nodes, slots=slots, image=target.image,
                command=request.rank_command(self.settings.python), log_dir=str(request.logs / "ranks"),
                cwd=working_folder(self.settings), python=self.settings.python, namespace=target.namespace,
                env=rank_variables(self.settings), secrets=target.secrets,
                volumes=target.volumes, gpus=target.gpus, cpu=target.cpu, memory=target.memory,
                max_restarts=self.settings.restarts, grace=self.settings.grace, final_codes=FINAL_CODES,
                notes=str(attempt.notes.absolute()),
            )  # fmt: skip
            manifest = kube.job_set(
                pods, labels=labels(job), annotations=people_labels(job), queue=target.queue, priority=target.priority
            )
        manifest["spec"]["ttlSecondsAfterFinished"] = _KEPT_SECONDS
        attempt.learn(namespace=target.namespace, context=self.settings.context, labels=labels(job))
        return manifest

    def find(self, attempt: Attempt, asked_before: bool) -> str | None:
        """The object of the attempt's name. Raises ConfigError when it is somebody else's."""
        return None if (found := self._read(attempt)) is None else str(found["metadata"].get("uid", ""))

    def start(self, attempt: Attempt, prepared: dict[str, Any]) -> str:
        """Apply the manifest. An object that was made in the meantime stays as it is."""
        answer = self._kubectl(attempt, "apply", "--server-side", "--field-manager=kdscale", "--filename=-",
                               stdin=json.dumps(prepared))  # fmt: skip
        number = self.find(attempt, True) if answer.code == 0 or "onflict" in answer.said else None
        if number is None:
            raise failure(answer, _PASSING) if answer.code else EngineUnavailableError("kubectl apply left no JobSet")
        return number

    def look(self, attempt: Attempt) -> Sighting:
        """What the JobSet's status says, and its pods where it does not tell enough."""
        found = self._read(attempt)
        if found is None:
            return Sighting("gone")
        status, spec = found.get("status", {}), found.get("spec", {})
        conditions = {item.get("type"): item for item in status.get("conditions", []) if item.get("status") == "True"}
        if "Completed" in conditions or status.get("terminalState") == "Completed":
            own = attempt.exit_code()
            return Sighting("ended", 0 if own is None else own)
        if "Failed" in conditions or status.get("terminalState") == "Failed":
            code, reason = self._how_pods_ended(attempt)
            own = attempt.exit_code()
            return Sighting("ended", code if own is None else own, reason or _message(conditions.get("Failed")))
        if "deletionTimestamp" in found["metadata"]:
            return Sighting(
                "waiting" if attempt.facts.get("killed") == "waiting" else "running", reason="being deleted"
            )
        if spec.get("suspend"):
            return Sighting("waiting", reason=f"in queue {_queue(found) or '(none)'}")
        if any(item.get("ready", 0) > 0 for item in status.get("replicatedJobsStatus", [])):
            return Sighting("running")
        return Sighting("waiting", reason=self._why_pods_wait(attempt))

    def kill(self, attempt: Attempt, phase: Literal["waiting", "running"]) -> None:
        """Delete the attempt's own object. Its pods get SIGTERM and the grace that they were made with."""
        selector = ",".join(f"{key}={value}" for key, value in attempt.facts["labels"].items())
        answer = self._kubectl(attempt, "delete", _KIND, f"--selector={selector}", "--cascade=foreground",
                               "--wait=false", "--ignore-not-found")  # fmt: skip
        if answer.code:
            raise failure(answer, re.compile(""))

    def logs(self, handle: str, tail_bytes: int) -> bytes:
        """See Engine: the first pod's log, on which rank 0 prints; empty once the pod is gone."""
        attempt = Attempt(Path(handle))
        if not attempt.facts.get("submitted"):
            return b""
        selector = f"jobset.sigs.k8s.io/jobset-name={attempt.name},batch.kubernetes.io/job-completion-index=0"
        command = self._command(attempt, "logs", f"--selector={selector}", f"--container={kube.CONTAINER}",
                                f"--tail={max(10, tail_bytes // _LINE)}")  # fmt: skip
        return tail_of(command, seconds=self.settings.command_seconds, limit=tail_bytes)

    def _read(self, attempt: Attempt) -> dict[str, Any] | None:
        """The attempt's JobSet, or None. Raises ConfigError for one of the same name that is not the attempt's."""
        found = self._get(attempt, _KIND, attempt.name)
        if found is None:
            return None
        theirs = found.get("metadata", {}).get("labels", {})
        if any(theirs.get(key) != value for key, value in attempt.facts["labels"].items()):
            raise ConfigError(
                f"the JobSet {attempt.name} is not this run's", got="an object with other labels; it is left alone"
            )
        return found

    def _pods(self, attempt: Attempt) -> list[dict[str, Any]]:
        found = self._get(attempt, "pods", f"--selector=jobset.sigs.k8s.io/jobset-name={attempt.name}")
        return [item for item in (found or {}).get("items", []) if isinstance(item, dict)]

    def _get(self, attempt: Attempt, *what: str) -> dict[str, Any] | None:
        answer = self._kubectl(attempt, "get", *what, "--output=json", "--ignore-not-found")
        if answer.code:
            raise failure(answer, re.compile(""))  # whatever it says: nothing is known now
        if not answer.output.strip():
            return None
        try:
            found: dict[str, Any] = parse_json(answer.output, "kubectl's answer", FileError, expect=dict)
        except FileError as error:
            raise EngineUnavailableError("kubectl get", got=str(error)) from error
        return found

    def _how_pods_ended(self, attempt: Attempt) -> tuple[int | None, str]:
        """The exit code of the pods that are left, and why."""
        ends = [
            state["terminated"]
            for pod in self._pods(attempt)
            for item in pod.get("status", {}).get("containerStatuses", [])
            if "terminated" in (state := item.get("state", {}))
        ]
        if any(end.get("reason") == "OOMKilled" for end in ends):
            return LackOfMemoryError.exit_code, "a pod needed more memory than it may have"
        codes = {number: int(end.get("exitCode", 0)) for number, end in enumerate(ends)}
        return notes.job_exit_code(codes, FINAL_CODES), ""

    def _why_pods_wait(self, attempt: Attempt) -> str:
        """Why the first pod that waits does: no room, no image."""
        for pod in self._pods(attempt):
            status = pod.get("status", {})
            for item in status.get("containerStatuses", []):
                if waiting := item.get("state", {}).get("waiting"):
                    return _message(waiting)
            for item in status.get("conditions", []):
                if item.get("type") == "PodScheduled" and item.get("status") == "False":
                    return _message(item)
        return "its pods start"

    def _kubectl(self, attempt: Attempt, *arguments: str, stdin: str = "") -> Answer:
        return ask(self._command(attempt, *arguments), seconds=self.settings.command_seconds, stdin=stdin)

    def _command(self, attempt: Attempt, *arguments: str) -> list[str]:
        context = attempt.facts.get("context")
        where = [f"--context={context}"] if context else []
        return ["kubectl", *where, f"--namespace={attempt.facts['namespace']}", *arguments]


def _queue(found: dict[str, Any]) -> str:
    return str(found["metadata"].get("labels", {}).get(kube.QUEUE_LABEL, ""))


def _message(item: dict[str, Any] | None) -> str:
    """Reason and message of a condition or a container's state."""
    parts = [str((item or {}).get(key, "")).strip() for key in ("reason", "message")]
    return ": ".join(part for part in parts if part)[:500]
