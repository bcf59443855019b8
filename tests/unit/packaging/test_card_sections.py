"""What the card shows is what the report stage reads: otherwise it would show old figures."""

from __future__ import annotations

from pathlib import PurePosixPath

from kdscale.packaging.card_sections import SECTIONS
from kdscale.pipeline.stages.registry import STAGES


def test_the_stage_that_writes_the_card_reads_every_file_that_it_shows() -> None:
    read = {PurePosixPath(artifact.path) for artifact in STAGES["report"].reads}
    files = [PurePosixPath(section.file) for section in SECTIONS]
    assert len(set(files)) == len(files)
    assert [str(file) for file in files if not read & {file, *file.parents}] == []
