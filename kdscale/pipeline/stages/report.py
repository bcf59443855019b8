"""The report stage: report.html and report.json."""

from __future__ import annotations

from kdscale.files import atomic_dir
from kdscale.pipeline.stage import Facts, StageContext


def write_report(context: StageContext) -> Facts:
    """Write the report of whatever the run folder holds."""
    from kdscale.report.html import write_report as write

    with atomic_dir(context.run.report) as tmp:
        write(context.run.path, tmp)
    return {}
