"""Writes docs/config.md: every config key with its type, default and meaning, from the dataclasses and the comments of configs/.

python docs/make_config.py          writes it
python docs/make_config.py --check  exits with 1 if it is not what it would be, or if a key is unexplained
"""

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args, get_origin

from omegaconf import OmegaConf

from atropos_hpc.config import Config

ROOT = Path(__file__).resolve().parent.parent
CONFIGS, PAGE = ROOT / "configs", ROOT / "docs" / "config.md"
# a group's first file explains every key of its section; the sections that are no groups stand in config.yaml
FIRST_FILES = {"model": "hugging_face", "environment": "atropos", "algorithm": "grpo", "trainer": "verl", "rollout": "vllm",
               "staleness": "bounded", "cluster": "local", "launch": "local"}  # fmt: skip
LINE = re.compile(r"^(?P<indent> *)(?P<key>\w+):(?: +(?P<value>[^#]*?))?(?: *# (?P<said>.*))?$")
TYPES = {str: "text", int: "whole number", float: "number", bool: "true, false"}
INTRO = """\
# Every config key

Made from the config classes and the comments in [configs/](../configs) by `docs/make_config.py`; a test compares them.

A key is changed on the command line, `algorithm.kl_coef=0.01`, and a choice of a group with `algorithm=dapo`. A key that a section leaves
open (type "map") is added with a plus: `+environment.config.some_field=3`. What is wrong is refused before anything starts, by key.
"""


def explanations(path: Path) -> dict[str, str]:
    """Dotted key -> what the file says of it: the comment on its line and on those below, or else the lines of comment just above."""
    said: dict[str, str] = {}
    parents: list[tuple[int, str]] = []
    above: list[str] = []
    last = ""
    for line in path.read_text().splitlines():
        text = line.strip()
        if text.startswith("#"):
            if last and line.startswith(" " * 10):  # goes on below the comment of a key
                said[last] += " " + text.removeprefix("#").strip()
            else:
                above.append(text.removeprefix("#").strip())
                last = ""
            continue
        found = LINE.match(line)
        if found is None:
            above, last = [], ""
            continue
        indent = len(found["indent"])
        parents = [(depth, name) for depth, name in parents if depth < indent]
        last = ".".join([*(name for _, name in parents), found["key"]])
        said[last] = found["said"] or " ".join(above)
        parents.append((indent, found["key"]))
        above = []
    return said


def fields(of: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, type) of every value below a config class."""
    for name, declared in of.__dataclass_fields__.items():
        if hasattr(declared.type, "__dataclass_fields__"):
            yield from fields(declared.type, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", declared.type


def spelt(kind: Any) -> str:
    """A type in words."""
    if get_origin(kind) is dict:
        return "map"
    if get_origin(kind) is list:
        return "list"
    inner = [each for each in get_args(kind) if each is not type(None)]
    return f"{TYPES[inner[0]]} or null" if inner else TYPES[kind]


def default(value: Any) -> str:
    """A default as it stands in a file."""
    if value == "???":
        return "has to be given"
    if isinstance(value, bool) or value is None:
        return f"`{'null' if value is None else str(value).lower()}`"
    return f"`{value:g}`" if isinstance(value, float) else f"`{value}`"


def page() -> tuple[str, list[str]]:
    """The page, and the keys of which no comment says what they mean."""
    root = explanations(CONFIGS / "config.yaml")
    defaults = OmegaConf.to_container(OmegaConf.structured(Config))
    parts, unexplained = [INTRO], []
    sections: dict[str, list[tuple[str, Any]]] = {"": []}
    for key, kind in fields(Config):
        sections.setdefault(key.partition(".")[0] if "." in key else "", []).append((key, kind))
    for section, keys in sections.items():
        path = (
            CONFIGS / section / f"{FIRST_FILES[section]}.yaml" if section in FIRST_FILES else None
        )
        said = (
            {f"{section}.{key}": text for key, text in explanations(path).items()} if path else root
        )
        parts.append(f"## {section or 'The run'}\n")
        if path:
            parts.append(choices(section))
        elif section:
            parts.append(f"{root[section]}\n")
        rows = ["| key | type | default | meaning |", "|---|---|---|---|"]
        for key, kind in keys:
            value = defaults
            for part in key.split("."):
                value = value[part]  # type: ignore[index,call-overload]
            meaning = said.get(key) or said.get(key.replace("roles.rollout.", "roles.trainer."), "")
            if not meaning:
                unexplained.append(key)
            shown = "a new one by date" if key == "run_dir" else default(value)
            rows.append(f"| `{key}` | {spelt(kind)} | {shown} | {meaning.replace('|', '&#124;')} |")
        parts.append("\n".join(rows) + "\n")
    return "\n".join(parts), unexplained


def choices(group: str) -> str:
    """The files of a group, each with the first sentence of the comment at its top."""
    lines = [f"`{group}=` one of\n"]
    for path in sorted((CONFIGS / group).glob("*.yaml")):
        top = []
        for line in path.read_text().splitlines():
            if not line.startswith("#"):
                break
            top.append(line.removeprefix("#").strip())
        sentence = re.match(r".*?(?<!Dr)\.(?= |$)", " ".join(top))
        lines.append(f"- `{path.stem}`: {sentence[0] if sentence else ' '.join(top)}")
    return "\n".join(lines) + "\n"


def main(arguments: list[str]) -> int:
    text, unexplained = page()
    for key in unexplained:
        print(f"{key}: no comment in configs/ says what it means", file=sys.stderr)
    if arguments == ["--check"]:
        same = PAGE.exists() and PAGE.read_text() == text
        if not same:
            print(
                "docs/config.md is not what the config is: run `python docs/make_config.py`",
                file=sys.stderr,
            )
        return 0 if same and not unexplained else 1
    PAGE.write_text(text)
    return 1 if unexplained else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
