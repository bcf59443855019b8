"""What objectives that match layers know of the two models: their sizes, and what of the teacher pruning kept.

L layers, H student's and G teacher's hidden size.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kdscale.config.distill.objective import ModelPair
from kdscale.errors import CheckpointError
from kdscale.families import Dims, load_family
from kdscale.files import read_json
from kdscale.runs.folder import IMPORTANCE, PLAN
from kdscale.runs.importance_scores import DIRECTIONS, ROTATION, SCORES_FILE, load_scores
from kdscale.runs.stream_basis import kept_directions
from kdscale.weights import read_config
from kdscale.weights.sentence_files import pooling_of

_MOST_BYTES = 1 << 30  # of plan.json: every index of every expert of a large mixture


def model_pair(teacher_dir: Path, student_dir: Path) -> ModelPair:
    """From both config.json, and from the plan beside the student's folder if it made this student of this teacher.

    Raises CheckpointError for a family that is not known.
    """
    teacher, student = _dims(teacher_dir), _dims(student_dir)
    plan = _plan_beside(student_dir)
    cut = plan is not None and all(
        plan[role][axis] == getattr(dims, axis)
        for role, dims in (("teacher", teacher), ("student", student))
        for axis in ("layers", "hidden")
    )
    return ModelPair(
        teacher.layers, student.layers, teacher.hidden, student.hidden,
        tuple(heads * dims.head_dim for dims in (teacher, student) for heads in (dims.heads, dims.kv_heads)),
        kept_layers=tuple(plan["kept"]["layers"]) if cut else None,
        basis_HG=_basis(plan, student_dir.parent / IMPORTANCE.path) if cut else None,
        pooling=pooling_of(teacher_dir),
    )  # fmt: skip


def _dims(folder: Path) -> Dims:
    config = read_config(folder)
    return load_family(config, str(folder / "config.json")).dims(config)


def _plan_beside(student_dir: Path) -> Any:
    """The plan that the student was cut by; None where there is none."""
    path = student_dir.parent / PLAN.path
    plan = read_json(path, CheckpointError, limit=_MOST_BYTES) if path.exists() else None
    return plan if _has_kept_units(plan) else None


def _has_kept_units(plan: Any) -> bool:
    """Whether the plan says what is read of it here; prune.plan checks the whole of it before anything is cut."""
    try:
        sizes = {role: (plan[role]["layers"], plan[role]["hidden"]) for role in ("teacher", "student")}
        kept = tuple(len(plan["kept"][axis]) for axis in ("layers", "hidden"))
        return kept == sizes["student"] and isinstance(plan["methods"]["hidden"], str)
    except (KeyError, TypeError):
        return False


def _basis(plan: Any, importance: Path) -> NDArray[np.float32] | None:
    """[H, G]: of the channels that were kept, as they are or in the rotated teacher's basis; None where it is gone."""
    teacher, kept = plan["teacher"]["hidden"], plan["kept"]["hidden"]
    matrix = {"pca": ROTATION, "refit": DIRECTIONS}.get(plan["methods"]["hidden"])
    if matrix is None:
        return np.eye(teacher, dtype=np.float32)[kept]
    if not (importance / SCORES_FILE).exists():
        return None
    rotation = load_scores(importance).get(matrix)
    if rotation is None or rotation.shape != (teacher, teacher):
        return None
    return kept_directions(rotation, len(kept)).astype(np.float32) if matrix == DIRECTIONS else rotation[kept]
