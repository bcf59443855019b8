"""Everything else is in pyproject.toml; this copies configs/ into the built package, so that a wheel has them too."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildWithConfigs(build_py):
    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            target = Path(self.build_lib) / "kdscale" / "configs"
            target.mkdir(parents=True, exist_ok=True)
            for source in sorted(Path("configs").glob("*.yaml")):
                shutil.copyfile(source, target / source.name)


setup(cmdclass={"build_py": BuildWithConfigs})
