"""The pages are correct: links, commands, the config page, the example environment."""

import functools
import importlib.util
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser

from atropos_hpc import cli, schema
from atropos_hpc.config import Config, EnvironmentConf
from atropos_hpc.contracts.answers import Problem
from atropos_hpc.launch import hydra_api, role_environment
from atropos_hpc.launch.steps import rollout_python

ROOT = Path(__file__).resolve().parent.parent
PAGES = [
    *(ROOT / f"{name}.md" for name in ("README", "CONTRIBUTING", "SECURITY", "CHANGELOG")),
    ROOT / "containers" / "README.md",
    *sorted((ROOT / "docs").rglob("*.md")),
]
LINK = re.compile(r"\]\(([^)\s]+)\)")
COMMAND = re.compile(r"^ {4}(?P<command>(?:\S*/)?(?:atropos-hpc|python|make|sbatch)\b.*)$", re.M)


def commands() -> list[str]:
    """Every command that a page shows, one line each, without what stands behind a #."""
    found = []
    for page in PAGES:
        text = re.sub(r"\\\n\s*", "", page.read_text())
        found += [match["command"].partition(" #")[0].strip() for match in COMMAND.finditer(text)]
    for path in (ROOT / "configs" / "experiment").glob("*.yaml"):
        text = re.sub(r"\\\n#\s*", "", path.read_text())
        found += re.findall(r"^# +(python -m .*)$", text, re.M)
    return sorted(set(found))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_are_valid(page: Path) -> None:
    for link in LINK.findall(page.read_text()):
        target, _, anchor = link.partition("#")
        if target.startswith(("http://", "https://")):
            continue  # no network is asked for a test
        there = (page.parent / target).resolve() if target else page
        assert there.exists(), f"{page.name}: {link}"
        if anchor:
            titles = [re.sub(r"[^\w\- ]", "", title).strip().lower().replace(" ", "-")
                      for title in re.findall(r"^#+ (.*)$", there.read_text(), re.M)]  # fmt: skip
            assert anchor in titles, f"{page.name}: {link}"


@pytest.mark.parametrize("command", commands())
def test_commands_parse_and_compose(command: str) -> None:
    """They are not run here: test_docs_walk.py runs those that need no cluster."""
    words = shlex.split(re.sub(r"\[--?\w+( \w+)?\]|\.\.\.$", "", command))
    program, arguments = Path(words[0]).name, words[1:]
    if program == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M)
        assert all("=" in word or word in targets for word in arguments), command
    elif program == "sbatch":
        assert (ROOT / arguments[0]).exists(), command
        composes(arguments[1:])
    elif program == "atropos-hpc":
        parsed = cli.app.commands[arguments[0]].make_context(arguments[0], arguments[1:]).params
        composes(
            [*parsed.get("words", ()), *parsed.get("overrides", ())]
            if arguments[0] != "resume"
            else []
        )
    elif arguments[:2] == ["-m", "atropos_hpc.train"]:
        composes(arguments[2:])
    else:
        assert (ROOT / arguments[0]).exists() or arguments[:2] == ["-m", "bench"], command


@functools.cache
def compose(overrides: tuple[str, ...]) -> None:
    hydra_api.compose(overrides)


def composes(overrides: list[str]) -> None:
    """What follows the program composes; of a multirun, the first point and the last do."""
    overrides = [
        each
        for each in overrides
        if each not in ("-m", "--multirun") and not each.startswith("hydra")
    ]
    overrides = [
        re.sub(r"^cluster=(my_site|MY_SITE)$", "cluster=generic_slurm", each) for each in overrides
    ]
    overrides = [each for each in overrides if not each.startswith("run_dir=")]
    values = []
    for each in OverridesParser.create().parse_overrides(overrides):
        swept = list(each.sweep_string_iterator()) if each.is_sweep_override() else None
        values.append(
            [f"{each.key_or_group}={value}" for value in swept] if swept else [each.input_line]
        )
    for point in {
        tuple(each[0] for each in values),
        tuple(each[-1] for each in values),
    }:  # the first and the last
        compose(tuple(each for each in point if each is not None))


@pytest.mark.parametrize("script", ["make_config.py", "make_cli.py", "make_memory.py"])
def test_generated_files_are_up_to_date(script: str) -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "docs" / script), "--check"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.run
def test_the_environment_of_the_page_loads_and_a_misspelt_field_of_it_is_refused(
    tmp_path: Path,
) -> None:
    (code,) = re.findall(
        r"```python\n(.*?)```", (ROOT / "docs" / "environments.md").read_text(), re.S
    )
    path = tmp_path / "my_env.py"
    path.write_text(code)
    python = rollout_python(Config())
    if not Path(python).exists():
        pytest.skip("needs the rollout role's environment; `make setup` makes it")
    config = Config(environment=EnvironmentConf(f"{path}:LettersEnv", config={"letter": "a"}))

    def check() -> list[Problem]:
        return role_environment.check_environment(
            config, "environment", config.environment, trial=False
        )

    assert check() == []
    config.environment.config = {"leter": "a"}
    (problem,) = check()
    assert problem.key == "config.leter" and "letter" in problem.message


def test_every_command_of_the_tool_is_in_some_page() -> None:
    text = "".join(page.read_text() for page in PAGES)
    for command in cli.app.commands:
        assert f"atropos-hpc {command}" in text, command


@pytest.mark.parametrize("column", [0, pytest.param(1, marks=pytest.mark.verl)])
def test_the_keys_of_the_glossary_exist_here_and_in_verl(column: int) -> None:
    text = (ROOT / "docs" / "glossary.md").read_text().partition("\n## Words")[0]
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    keys = {
        key.partition("=")[0]
        for row in rows
        for key in re.findall(r"`([^`]+)`", row[column])
        if "/" not in key
    }
    known = {name for name, _ in schema.fields(Config)} if column == 0 else verl_keys()
    assert len(keys) > 30 and keys <= known, keys - known


def verl_keys() -> set[str]:
    """Every key of the installed verl's trainers, without importing it."""
    spec = importlib.util.find_spec("verl")
    assert spec is not None and spec.submodule_search_locations is not None
    (package,) = map(Path, spec.submodule_search_locations)
    asynchronous = "experimental/fully_async_policy/config/fully_async_ppo_trainer.yaml"
    found: set[str] = set()
    for path in ("trainer/config/_generated_ppo_trainer.yaml", asynchronous):
        waiting = [("", yaml.safe_load((package / path).read_text()))]
        while waiting:
            prefix, section = waiting.pop()
            for name, value in section.items():
                found.add(f"{prefix}{name}")
                if isinstance(value, dict):
                    waiting.append((f"{prefix}{name}.", value))
    return found


def test_the_walks_through_the_code_name_what_exists() -> None:
    rows = [row for row in (ROOT / "docs" / "design.md").read_text().splitlines() if ".py" in row]
    cells = [row.split("|")[1] for row in rows if row.startswith("|")]
    assert len(cells) > 25
    for cell in cells:
        paths = re.findall(r"\.\./atropos_hpc/([\w/]+\.py)", cell) or re.findall(
            r"[\w/]+\.py", cell
        )
        folder = Path(paths[0]).parent
        files = [ROOT / "atropos_hpc" / (path if "/" in path else folder / path) for path in paths]
        code = "".join(path.read_text() for path in files)
        for name in re.findall(r"`(?:\w+\.)?(\w+)`", re.sub(r"`[\w/]+\.py`", "", cell)):
            assert re.search(rf"\b(def|class) {name}\b", code), f"{cell}: {name}"
