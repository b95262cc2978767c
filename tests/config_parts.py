"""Configs for tests that are not about composing them."""

import functools
import pickle

from atropos_hpc.config import Config
from atropos_hpc.launch import hydra_api

COMPOSED = {path.name for path in hydra_api.CONFIGS.iterdir() if path.is_dir()}
COMPOSED |= {"more_environments"}


def composed(*overrides: str) -> Config:
    """A change of the demo, unless an experiment is given: Hydra composes the choices of groups
    once, and values are set as those of a sweep's points are, in a tenth of the time."""
    config: Config = pickle.loads(_pickled(overrides))
    return config


@functools.cache
def _pickled(overrides: tuple[str, ...]) -> bytes:
    chosen = tuple(each for each in overrides if _key(each) in COMPOSED)
    if {"experiment", "environment"} & set(map(_key, chosen)):
        chosen = overrides  # some are complete with the values only
    values = [each.removeprefix("+") for each in overrides if each not in chosen]
    if values:
        return pickle.dumps(hydra_api.change(composed(*chosen), values))
    given = any(each.startswith("experiment=") for each in chosen)
    demo = [] if given else [hydra_api.DEMO]
    return pickle.dumps(hydra_api.compose([*demo, "run_dir=/nowhere", *chosen]))


def _key(override: str) -> str:
    return override.partition("=")[0].removeprefix("+")


def refused_by_key(refusals: dict[str, str]) -> list[tuple[str, str, str]]:
    """(override, key, what is said) of overrides that are refused by the key that they set."""
    return [(each, _key(each), says) for each, says in refusals.items()]
