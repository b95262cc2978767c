"""House rules that a script can check: no identifier of the old vocabulary, and limits of size.

`python tests/test_vocabulary.py` prints what breaks them.
"""

import ast
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "atropos_hpc"
FILES = sorted(PACKAGE.rglob("*.py"))
ROOT = PACKAGE.parent
TEST_FILES = sorted(path for top in ("tests", "bench") for path in (ROOT / top).rglob("*.py"))
MAX_FILE, MAX_FUNCTION, MAX_LINE, MAX_ANY_DICTS = 400, 60, 100, 40
MAX_PARAMETERS = 6
DICTATED = {"attend"}  # parameters that a library dictates: transformers' attention interface

# Identifiers that say nothing to a reader from the field, and what to call the thing.
NAMES = {
    "ask": "run_command, post_request",
    "Kept": "ManagedProcess",
    "Share": "ShardBuffer",
    "Shares": "ShardBuffer",
    "still_groups": "zero_advantage_groups",
    "Together": "the term for the collective operation",
}
# The same for every identifier with one of these words in it.
WORDS = {
    "copies": "replicas",
    "fate": "termination_cause",
    "formed": "next_batch",
    "granted": "allocated_nodes",
    "insist": "retry",
    "ours": "current_job",
    "room": "admission_quota",
    "told": "describe",
}
MODULES = {
    "launch": ("batch", "plan", "split", "job"),
    "learner": ("together", "publishing"),
    "observe": ("card", "page", "figures", "screen", "sinks", "series", "activity"),
    "policy": ("share", "mirror", "push", "adapter", "publish"),
    "rollout": ("link", "guard", "leader", "target", "pool"),
    "trajectories": ("record", "upstream"),
}


def old_terms() -> list[str]:
    """List the identifiers of the old vocabulary."""
    found = []
    for path in FILES:
        with path.open("rb") as file:
            for token in tokenize.tokenize(file.readline):
                if token.type == tokenize.NAME and (term := better_term(token.string)):
                    where = f"{path.relative_to(PACKAGE)}:{token.start[0]}"
                    found.append(f"{where}: {token.string} (say {term})")
    return found


def better_term(name: str) -> str | None:
    """Return what to say instead of an identifier; None if it is fine.

    >>> better_term("admission_room"), better_term("classroom"), better_term("ask_to_end")
    ('admission_quota', None, None)
    """
    words = name.lower().split("_")
    return NAMES.get(name) or next((WORDS[word] for word in words if word in WORDS), None)


def old_modules() -> list[str]:
    """List the modules with an old name."""
    paths = [
        PACKAGE / package / f"{name}.py" for package, names in MODULES.items() for name in names
    ]
    return [str(path.relative_to(PACKAGE)) for path in paths if path.exists()]


def long_files() -> list[str]:
    lengths = {path: len(path.read_text().splitlines()) for path in (*FILES, *TEST_FILES)}
    return [f"{path.relative_to(ROOT)}: {n}" for path, n in lengths.items() if n > MAX_FILE]


def long_lines() -> list[str]:
    return [
        f"{path.relative_to(PACKAGE)}:{number}"
        for path in FILES
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if len(line) > MAX_LINE
    ]


def long_functions() -> list[str]:
    return [
        f"{path.relative_to(PACKAGE)}:{node.lineno}: {node.name}, {length(node)} lines"
        for path in FILES
        for node in functions(path)
        if length(node) > MAX_FUNCTION
    ]


def many_parameters() -> list[str]:
    found = []
    for path in FILES:
        for node in functions(path):
            names = [argument.arg for argument in (*node.args.args, *node.args.kwonlyargs)]
            count = len([name for name in names if name not in ("self", "cls")])
            if count > MAX_PARAMETERS and node.name not in DICTATED:
                found.append(f"{path.relative_to(PACKAGE)}:{node.lineno}: {node.name}, {count}")
    return found


def functions(path: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def length(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    return (node.end_lineno or node.lineno) - node.lineno + 1


# docs/design.md: imports point down. Modules outside of a package are not ranked.
RANKS = {
    **dict.fromkeys(("contracts",), 0),
    **dict.fromkeys(("runtime",), 1),
    **dict.fromkeys(("policy", "observe"), 2),
    **dict.fromkeys(("trajectories", "environments", "models"), 3),
    **dict.fromkeys(("learner", "rollout"), 4),
    **dict.fromkeys(("launch",), 5),
}


def upward_imports() -> list[str]:
    """Return the imports of a package that is not below the importing one."""
    found = []
    for path in FILES:
        name = str(path.relative_to(PACKAGE))
        own = name.partition("/")[0]
        for imported in re.findall(
            r"^\s*from atropos_hpc(?:\.| import )(\w+)", path.read_text(), re.M
        ):
            ranked = own in RANKS and imported in RANKS and imported != own
            if ranked and RANKS[imported] >= RANKS[own]:
                found.append(f"{name} imports {imported}")
    return found


def any_dicts() -> dict[str, int]:
    """Count the untyped dicts of each file that has some."""
    counts = {
        str(path.relative_to(PACKAGE)): len(re.findall(r"\b[dD]ict\[str, Any\]", path.read_text()))
        for path in FILES
    }
    return {name: count for name, count in counts.items() if count}


RULES = (
    old_terms,
    old_modules,
    long_files,
    long_functions,
    long_lines,
    many_parameters,
    upward_imports,
)


@pytest.mark.parametrize("check", RULES, ids=lambda rule: rule.__name__)
def test_nothing_breaks_the_house_rules(check) -> None:  # type: ignore[no-untyped-def]
    found = check()
    assert not found, "\n".join(found)


def test_untyped_dicts_are_few() -> None:
    counts = any_dicts()
    listed = "\n".join(f"{name}: {count}" for name, count in counts.items())
    assert sum(counts.values()) <= MAX_ANY_DICTS, listed


if __name__ == "__main__":
    for rule in RULES:
        broken = rule()
        print(f"{rule.__name__}: {len(broken)}", *broken, sep="\n  ")
    dicts = any_dicts()
    print(f"dict[str, Any]: {sum(dicts.values())}, at most {MAX_ANY_DICTS}", dicts, sep="\n  ")
    total = sum(len(path.read_text().splitlines()) for path in FILES)
    print(f"lines of the package: {total}")
