"""sbatch, squeue, sacct, scancel, kubectl and sky, in the place of the real ones: one program under six names.

Its folder's state.json is the whole cluster. A test moves jobs on by changing it, and puts faults in it: `{"program",
"times", "code", "says", "after"}` makes the next calls fail, `after` they have done what was asked. What these programs
print, and when they fail, is what the real ones do (Slurm 24.05, kubectl 1.33 with JobSet 0.9, SkyPilot 0.14).
"""

import json
import os
import sys
import time
from pathlib import Path


def main(words, stdin, environment):
    """One call: the program and its arguments, its standard input and its environment. Returns the exit code."""
    program, arguments = Path(words[0]).name, words[1:]
    path = Path(words[0]).absolute().with_name("state.json")
    state = json.loads(path.read_text(encoding="utf-8"))
    state["calls"].append([program, *arguments])
    state["stdin"], state["environment"] = stdin, sorted(environment)
    fault = next((item for item in state["faults"] if item["program"] == program and item["times"] > 0), None)
    code = 0
    if fault is not None:
        fault["times"] -= 1
    if fault is None or fault.get("after"):
        code = PROGRAMS[program](state, arguments)
    path.with_name("state.new").write_text(json.dumps(state), encoding="utf-8")
    path.with_name("state.new").replace(path)
    if fault is not None:
        sys.stdout.flush()
        print(fault.get("says", ""), file=sys.stderr)
        time.sleep(fault.get("sleeps", 0))
        code = fault["code"]
    return code


def options(arguments):
    """`--name=value` and `--flag` by name; what is none of these, in order."""
    flags = dict(item[2:].partition("=")[::2] for item in arguments if item.startswith("--"))
    return flags, [item for item in arguments if not item.startswith("-")]


# --- Slurm: a job has `queue` (what slurmctld says, or None once forgotten) and `account` (slurmdbd; it may lag behind)


def unquoted(option):
    """An option of a #SBATCH line as sbatch reads it."""
    text, quoted, position = "", False, 0
    while position < len(option):
        letter = option[position]
        if quoted and letter == "\\":
            position += 1
            text += option[position]
        elif letter == '"':
            quoted = not quoted
        elif letter in " \t#" and not quoted:
            break
        else:
            text += letter
        position += 1
    return text


def sbatch(state, arguments):
    _, (path,) = options(arguments)
    lines = Path(path).read_text(encoding="utf-8").split("\n")
    given = [unquoted(line[len("#SBATCH --") :]) for line in lines if line.startswith("#SBATCH --")]
    told = dict(item.partition("=")[::2] for item in given)
    if told.get("partition") == "none":
        print("sbatch: error: invalid partition specified: none", file=sys.stderr)
        print("sbatch: error: Batch job submission failed: Invalid partition name specified", file=sys.stderr)
        return 1
    number = str(1000 + len(state["jobs"]))
    state["jobs"].append(
        {"number": number, "name": told["job-name"], "queue": ["PENDING", "Priority"], "account": None, "signals": [],
         "told": told}
    )  # fmt: skip
    print(number)
    return 0


def squeue(state, arguments):
    flags, _ = options(arguments)
    for job in state["jobs"]:
        if job["name"] == flags["name"] and job["queue"] and flags["user"] == str(os.getuid()):
            print(
                flags["format"]
                .replace("%i", job["number"])
                .replace("%T", job["queue"][0])
                .replace("%r", job["queue"][1])
            )
    return 0


def sacct(state, arguments):
    flags, _ = options(arguments)
    if state.get("no_accounting"):
        print("Slurm accounting storage is disabled", file=sys.stderr)
        return 1
    for job in state["jobs"]:
        if job["name"] == flags["name"] and job["account"]:
            print("|".join([job["number"], *job["account"]]))
    return 0


def scancel(state, arguments):
    flags, (number,) = options(arguments)
    job = next((item for item in state["jobs"] if item["number"] == number), None)
    if job is None or not job["queue"]:
        print(f"scancel: error: Kill job error on job id {number}: Invalid job id specified", file=sys.stderr)
        return 1
    if flags.get("state", job["queue"][0]) != job["queue"][0]:
        return 0
    if "signal" in flags:
        job["signals"].append(flags["signal"])
    elif job["queue"][0] in ("PENDING", "RUNNING"):
        job["account"] = [f"CANCELLED by {os.getuid()}", "0:0" if job["queue"][0] == "PENDING" else "0:15"]
        job["queue"] = ["CANCELLED", "None"]
    return 0


# --- Kubernetes: JobSets by namespace and name; the pods are what a test says


def kubectl(state, arguments):
    flags, words = options([item for item in arguments if item != "--server-side"])
    objects = state["objects"].setdefault(flags["namespace"], {})
    return {"apply": apply, "get": get, "delete": delete, "logs": logs}[words[0]](state, objects, flags, words)


def apply(state, objects, flags, words):
    wanted = json.loads(state["stdin"])
    name = wanted["metadata"]["name"]
    if name not in objects:
        objects[name] = {**wanted, "status": {}}
        objects[name]["metadata"]["uid"] = f"uid-{state['made']}"
        state["made"] += 1
    elif objects[name]["spec"]["suspend"] != wanted["spec"]["suspend"]:
        print('error: Apply failed with 1 conflict: conflict with "kueue": .spec.suspend', file=sys.stderr)
        return 1
    print(f"jobset.jobset.x-k8s.io/{name} serverside-applied")
    return 0


def get(state, objects, flags, words):
    if words[1] == "pods":
        name = flags["selector"].split("=")[1]
        print(json.dumps({"kind": "List", "items": state["pods"].get(name, [])}))
    elif words[2] in objects:
        print(json.dumps(objects[words[2]]))
    return 0


def delete(state, objects, flags, words):
    wanted = dict(item.split("=") for item in flags["selector"].split(","))
    for name in [key for key, item in objects.items() if wanted.items() <= item["metadata"]["labels"].items()]:
        if state["pods"].get(name):  # foreground: the object stays until its pods are gone
            objects[name]["metadata"]["deletionTimestamp"] = "2026-01-01T00:00:00Z"
        else:
            del objects[name]
    return 0


def logs(state, objects, flags, words):
    print("line of a pod\n" * int(flags["tail"]), end="")
    return 0


# --- SkyPilot: managed jobs; one that was launched shows up after `late` looks at the queue


def sky(state, arguments):
    _, verb, *rest = arguments
    return {"launch": sky_launch, "queue": sky_queue, "cancel": sky_cancel, "logs": sky_logs}[verb](state, rest)


def sky_launch(state, rest):
    task = json.loads(Path(rest[-1]).read_text(encoding="utf-8"))
    state["managed"].append(
        {"job_id": 1 + len(state["managed"]), "job_name": rest[rest.index("--name") + 1], "status": "PENDING",
         "recovery_count": 0, "failure_reason": None, "late": state.get("late", 0), "task": task}
    )  # fmt: skip
    print("Submitted sky.jobs.launch request: 0b6c3d1e")
    return 0


def sky_queue(state, rest):
    shown = [job for job in state["managed"] if job["late"] <= 0]
    for job in state["managed"]:
        job["late"] -= 1
    print("[using the API server of this machine]\nChecking managed jobs\n" + json.dumps(shown, indent=2))
    return 0


def sky_cancel(state, rest):
    name = rest[rest.index("--name") + 1]
    for job in state["managed"]:
        if job["job_name"] == name and job["status"] in ("PENDING", "STARTING", "RUNNING", "RECOVERING"):
            job["status"] = "CANCELLING" if job["status"] == "RUNNING" else "CANCELLED"
    return 0


def sky_logs(state, rest):
    print(f"(kdscale, pid=1) line of job {rest[-1]}\n" * 50, end="")
    return 0


PROGRAMS = {
    "sbatch": sbatch, "squeue": squeue, "sacct": sacct, "scancel": scancel, "kubectl": kubectl, "sky": sky
}  # fmt: skip

if __name__ == "__main__":
    sys.exit(main(sys.argv, sys.stdin.read(), os.environ))
