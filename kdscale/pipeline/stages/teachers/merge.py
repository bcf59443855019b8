"""The merge stage: the teacher's LoRA adapters become part of its weights, before anything reads it.

The merged teacher is a standard checkpoint in the run folder, and every later stage has it as the teacher.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from kdscale.config.root import Config
from kdscale.files import replace_dir
from kdscale.models.loading import open_teacher
from kdscale.pipeline.stage import Facts, StageContext
from kdscale.runs.digests import digest_tree
from kdscale.runs.folder import MERGED, RunFolder

if TYPE_CHECKING:
    from kdscale.models.lora.merging import MergePlan


def adapter_folders(config: Config) -> list[Path]:
    """The folders of the teacher's adapters, in the order in which they are merged."""
    return [Path(adapter).expanduser() for adapter in config.teacher.adapters or ()]


def what_matters(context: StageContext) -> Facts:
    """The adapters' settings and weights, in their order."""
    from kdscale.models.lora.adapter_files import ADAPTER_FILES

    return {"adapters": [digest_tree(folder, ADAPTER_FILES) for folder in adapter_folders(context.config)]}


def disk_bytes(context: StageContext, student_params: int) -> int:
    """A second copy of the teacher."""
    del student_params
    return sum(file.stat().st_size for file in context.teacher_folder.glob("*.safetensors"))


def copied_from_and_to(context: StageContext) -> tuple[Path, Path]:
    """Tokenizer, licence and the like come from the teacher as the config names it."""
    return context.teacher_folder, context.run.at(MERGED)


def check_before(config: Config, run: RunFolder) -> None:
    """Raises ConfigError or CheckpointError for adapters that cannot be merged into this teacher, from headers."""
    from kdscale.weights import resolve_teacher

    del run
    _plan(resolve_teacher(config.teacher), config)


def merge(context: StageContext) -> Facts:
    """Write the merged teacher; a killed stage goes on where it was."""
    from kdscale.models.lora.merging import adapter_facts, merge_adapters

    config, work = context.config, context.run.work / "merge"
    plan = _plan(context.teacher_folder, config)
    merge_adapters(
        plan, work / "teacher", journal=work / "written.json", max_shard_bytes=config.prune.max_shard_bytes,
        code=config.teacher.trust_remote_code,
    )  # fmt: skip
    replace_dir(work / "teacher", context.run.at(MERGED))
    return {"changed tensors": len(plan.touched), **adapter_facts(plan.adapters)}


def _plan(teacher: Path, config: Config) -> MergePlan:
    from kdscale.models.lora.adapter_files import open_adapter
    from kdscale.models.lora.merging import MergePlan

    checkpoint, family = open_teacher(teacher)
    return MergePlan.of(checkpoint, family, [open_adapter(folder) for folder in adapter_folders(config)])
