"""Build step that pyproject.toml cannot express: put the data directories into the package.

configs/, sweeps/, slurm/ and requirements/ lie at the top level of the repository. A wheel carries
them as atropos_hpc/configs and so on; `atropos_hpc.resources` finds them in both places.
"""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

DATA = ("configs", "sweeps", "slurm", "requirements")


class BuildWithData(build_py):
    """Copy the package and the data directories; an editable install reads them in place."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            for name in DATA:
                target = Path(self.build_lib, "atropos_hpc", name)
                shutil.rmtree(target, ignore_errors=True)  # an earlier build's files
                shutil.copytree(name, target)


setup(cmdclass={"build_py": BuildWithData})
