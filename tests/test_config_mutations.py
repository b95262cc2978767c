"""Generated mistakes in the config: each is refused by its key, and nothing is started or left."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from atropos_hpc import schema, train
from atropos_hpc.config import Config
from atropos_hpc.contracts.answers import Problem
from atropos_hpc.launch import hydra_api, preflight
from atropos_hpc.runtime import process

MUTATIONS = int(os.environ.get("GENERATED_CONFIGS", "150"))
LEAVES = {name: field for name, field in schema.fields(Config) if schema.METADATA in field.metadata}
OPEN = tuple(f"{name}." for name in schema.open_maps(Config))
WRONG_TYPES = {
    "int": ["many", "1.5", "[1]", "{a: 1}", "''", "1e3", "0x", "99999999999999999999999"],
    "float": ["many", "[1.5]", "{a: 1}", "''", "1,5", "nan", "inf", "-inf", "1e999"],
    "bool": ["maybe", "2", "[true]", "{a: 1}", "''"],
    "str": ["{a: 1}", "[a, b]"],
    "list": ["3", "{a: 1}", "text", "[[1], {a: 2}]"],
    "dict": ["3", "text", "[1, 2]", "true"],
}
OUT_OF_RANGE = ["-1", "0", "-99999999999", "1e30", "10000000000000", "-0.5", "1e-300"]


def type_of(name: str) -> str:
    text = str(LEAVES[name].type).lower()
    return next(kind for kind in ("dict", "list", "bool", "float", "int", "str") if kind in text)


@st.composite
def typos(draw: st.DrawFn) -> str:
    """A key of a closed section with one letter changed in its last part."""
    name = draw(st.sampled_from([name for name in LEAVES if not name.startswith(OPEN)]))
    section, dot, last = name.rpartition(".")
    at = draw(st.integers(0, len(last) - 1))
    change = draw(st.sampled_from(["drop", "double", "replace"]))
    letters = {"drop": "", "double": last[at] * 2, "replace": "x" if last[at] != "x" else "y"}
    wrong = f"{section}{dot}{last[:at]}{letters[change]}{last[at + 1 :]}"
    return wrong if wrong not in LEAVES and not wrong.endswith(".") else f"{name}x"


def values_of(name: str) -> st.SearchStrategy[str]:
    if LEAVES[name].metadata[schema.METADATA].choices:
        return st.sampled_from(["none_such", "", "null", "[full]", "{a: 1}"])
    kinds = [*WRONG_TYPES[type_of(name)], "null"]
    return st.sampled_from(kinds + (OUT_OF_RANGE if type_of(name) in ("int", "float") else []))


SET = st.sampled_from(sorted(LEAVES)).flatmap(
    lambda name: values_of(name).map(lambda value: ("set", name, f"{name}={value}"))
)
TYPO = st.tuples(typos(), st.sampled_from(["", "+", "++"])).map(
    lambda drawn: ("typo", drawn[0], f"{drawn[1]}{drawn[0]}=1")
)
OTHER = st.sampled_from(sorted(LEAVES)).flatmap(
    lambda name: st.sampled_from([f"~{name}", f"+{name}.below=1", f"{name}=${{no.such}}"]).map(
        lambda override: ("other", name, override)
    )
)


@pytest.fixture(scope="module")
def base() -> Config:
    return hydra_api.compose([hydra_api.DEMO])


def refused(kind: str, override: str, base: Config) -> list[Problem] | None:
    """The problems that the command would print; None if the config is accepted.

    A plain value is set as the points of a sweep are; everything else is composed by Hydra.
    """
    try:
        if kind == "set":
            config = hydra_api.change(base, [override])
        else:
            config = hydra_api.compose([hydra_api.DEMO, override])
    except Exception as error:
        if not hydra_api.is_composing_error(error):
            raise
        return hydra_api.named_problems(error, [override], hydra_api.compose)
    return preflight.check(config, Path.cwd() / "runs" / "new", None, roles=False) or None


@settings(
    max_examples=MUTATIONS,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(mutation=st.one_of(SET, SET, SET, TYPO, OTHER))
def test_generated_config_mutations_are_refused_by_key_or_accepted(
    mutation: tuple[str, str, str], base: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind, name, override = mutation
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(subprocess, "Popen", None)  # starting a process would raise TypeError
    problems = refused(kind, override, base)
    assert not any(tmp_path.iterdir()), "nothing is left"
    if problems is None:
        assert kind != "typo", f"{override} was accepted"
        return
    for problem in problems:
        assert problem.key and problem.message and "\n" not in str(problem), problem
    keys = {problem.key for problem in problems}
    related = {key for key in keys if key.startswith(name) or name.startswith(key)}
    # or the key that is wrong because of it, such as the missing model.path of model.make=null
    section = name.partition(".")[0]
    same_section = {key for key in keys if key.partition(".")[0] == section}
    mentioned = {problem.key for problem in problems if name in str(problem)}
    assert related or mentioned or same_section, f"{override}: {problems}"


ODD = ["=3", "trainer=3", "trainer=", "trainer..steps=3", "trainer.steps", "seed=${", "hydra=3"]
ODD += ["trainer@foo=verl", "more_environments={a: null}", "trainer.fsdp_config={1: 2}", "+x=1"]
ODD += ["trainer.deepspeed={zero_optimization: 3}", "run_dir=", "run_dir=/dev/null/x", "~seed"]
ODD += ["trainer.optim={betas: x}", "+algorithm.kl_coeff=0.5", "algorithm.kl_coef=-1"]
ODD += ["trainer.fsdp_config={mixed_precision: 3}", "environment.config={1: 2}", "environment=null"]


@pytest.mark.parametrize("override", ODD)
def test_odd_command_lines_are_refused_by_key_and_leave_nothing(
    override: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """The real command, but for the check of the roles' interpreters, which would take seconds."""
    check = preflight.check
    monkeypatch.setattr(preflight, "check", lambda c, d, k, **_: check(c, d, k, roles=False))
    monkeypatch.setattr(process, "die_with_parent", lambda *_: None)
    monkeypatch.setattr(subprocess, "Popen", None)
    monkeypatch.chdir(tmp_path)
    where = [] if override.startswith("run_dir") else ["run_dir=a/b"]
    monkeypatch.setattr(sys, "argv", ["train", *where, override])
    assert train.main() == 2
    lines = capfd.readouterr().err.splitlines()
    assert lines[0] == "The config was refused; nothing was started."
    assert lines[1:] and all(re.match(r"  \S[^:]*: \S", line) for line in lines[1:]), lines
    assert not any(tmp_path.iterdir()), "no directory is left"
