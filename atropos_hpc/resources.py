"""Find the data files of this project: configs, sweeps, slurm and requirements.

In a wheel they lie inside the package, in a clone (an editable install too) beside it.
"""

from pathlib import Path

PACKAGE = Path(__file__).resolve().parent
HOME = PACKAGE.parent  # what has to be on sys.path; in a clone, its top level


def is_clone() -> bool:
    """Tell a clone of the repository from an installed wheel."""
    return (HOME / "configs" / "config.yaml").exists()


def data(name: str) -> Path:
    """Return the directory of that name, such as "configs"."""
    return (HOME if is_clone() else PACKAGE) / name
