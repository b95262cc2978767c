"""What this package uses of atroposlib: it is listed in docs/environments.md, and it exists."""

import ast
import importlib
import inspect
import re
from pathlib import Path

import pytest

pytestmark = pytest.mark.vllm
pytest.importorskip("atroposlib")

from atroposlib.envs.base import BaseEnv  # noqa: E402

ROOT = Path(__file__).parent.parent
SOURCES = [
    path for part in ("rollout", "environments") for path in (ROOT / "atropos_hpc" / part).iterdir()
]
ENVIRONMENTS = ("self", "env", "environment", "cls")  # names that an environment has in the code
NOT_ENVIRONMENTS = {"conversations.py", "vllm_client.py", "managed_server.py", "node_agent.py"}


def documented() -> dict[str, list[str] | None]:
    """Return the parameters of each listed method; None for an attribute."""
    page = (ROOT / "docs" / "environments.md").read_text().partition("| member of `BaseEnv` |")[2]
    cells = [line.split("|")[1] for line in page.splitlines() if line.startswith("| `")]
    found = re.findall(r"`(\w+)(\([^`]*\))?`", " ".join(cells))
    return {
        name: [each for each in parameters[1:-1].split(", ") if each] if parameters else None
        for name, parameters in found
    }


def attributes_of_base() -> set[str]:
    """Return the attributes that BaseEnv has or sets."""
    stored = (
        node.attr
        for node in ast.walk(ast.parse(inspect.getsource(BaseEnv)))
        if isinstance(node, ast.Attribute)
        and isinstance(node.value, ast.Name)
        and node.value.id == "self"
        and isinstance(node.ctx, ast.Store)
    )
    return {*stored, *(name for name in vars(BaseEnv) if not name.startswith("__"))}


def used(members: set[str]) -> set[str]:
    """Return those of the members that this package overrides, calls, reads or sets."""
    found = set()
    for path in SOURCES:
        if path.suffix != ".py" or path.name in NOT_ENVIRONMENTS:
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                found.add(node.name)
            elif isinstance(node, ast.Attribute) and _is_environment(node.value):
                found.add(node.attr)
    return found & members


def _is_environment(value: ast.expr) -> bool:
    if isinstance(value, ast.Call):
        return isinstance(value.func, ast.Name) and value.func.id == "super"
    if isinstance(value, ast.Attribute):
        return value.attr == "env"
    return isinstance(value, ast.Name) and value.id in ENVIRONMENTS


def test_the_listed_members_are_those_that_are_used() -> None:
    members = attributes_of_base()
    assert documented().keys() - members == set()
    assert documented().keys() == used(members)


def test_the_listed_methods_have_these_parameters() -> None:
    for name, parameters in documented().items():
        if parameters is None:
            continue
        own = list(inspect.signature(getattr(BaseEnv, name)).parameters)
        assert [each for each in own if each != "self"] == parameters, name


def test_every_name_that_is_imported_from_atroposlib_exists() -> None:
    count = 0
    for path in (ROOT / "atropos_hpc").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("atroposlib"):
                module = importlib.import_module(node.module or "")
                for each in node.names:
                    assert hasattr(module, each.name) or importlib.import_module(
                        f"{node.module}.{each.name}"
                    ), f"{path}: {node.module}.{each.name}"
                    count += 1
    assert count >= 10
