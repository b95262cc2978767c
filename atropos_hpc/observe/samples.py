"""Show, filter and sort a run's rollouts: `atropos-hpc samples`, and the trackers' samples."""

import functools
import heapq
import itertools
import operator
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from atropos_hpc.contracts.metrics import Rollout
from atropos_hpc.observe import rollouts
from atropos_hpc.runtime.run_dir import RunDir

PER_RUN = 100  # steps whose samples the trackers get
SORTS: dict[str, Callable[[Rollout], float]] = {
    "step": lambda rollout: rollout.step,
    "score": lambda rollout: -float("inf") if rollout.score is None else rollout.score,
    "length": lambda rollout: rollout.length,
}
COMPARISONS = {
    "<=": operator.le,
    ">=": operator.ge,
    "<": operator.lt,
    ">": operator.gt,
    "=": operator.eq,
}
CONDITION = re.compile(r"(<=|>=|<|>|=|)\s*(\S+)")


class BadFilter(ValueError):
    """A filter of the command line that cannot be understood."""


@dataclass(frozen=True)
class Selection:
    """Which rollouts to show. `score` is a number or a condition such as ">0.5"."""

    step: int | None = None
    score: str | None = None
    environment: str | None = None
    text: str | None = None  # a regular expression, searched in prompt and completion
    sort: str = "step"
    reverse: bool = False  # the smallest first
    last: int = 5


def is_due(step: int, steps: int) -> bool:
    """Tell whether the trackers get samples of a step, in a run of so many steps."""
    return (step - 1) % max(1, steps // PER_RUN) == 0


def best_and_worst(found: Sequence[Rollout]) -> list[Rollout]:
    """Return the sequences of a group with the highest and the lowest score."""
    key = SORTS["score"]
    best, worst = max(found, key=key), min(found, key=key)
    return [best] if best is worst else [best, worst]


def read(run: RunDir, selection: Selection) -> list[Rollout]:
    """Return the selected rollouts, in order. Raises BadFilter."""
    matches, files = _matcher(selection), rollouts.files(run.rollouts)
    if selection.step is not None:  # in the last file of each rank that does not begin after it
        begun = [file for file in files if file[0] <= selection.step]
        files = list({rank: (first, rank, path) for first, rank, path in begun}.values())
    if selection.sort == "step" and not selection.reverse:
        return list(itertools.islice(filter(matches, _newest_first(files)), selection.last))
    every = (each for _, _, path in files for each in rollouts.read_file(path))
    order = heapq.nsmallest if selection.reverse else heapq.nlargest
    return order(selection.last, filter(matches, every), key=SORTS[selection.sort])


def _matcher(selection: Selection) -> Callable[[Rollout], bool]:
    compare, bound = _condition(selection.score)
    try:
        text = re.compile(selection.text or "")
    except re.error as error:
        raise BadFilter(f"--text {selection.text!r} is no regular expression: {error}") from None

    def matches(each: Rollout) -> bool:
        return (
            (selection.step is None or each.step == selection.step)
            and (compare is None or (each.score is not None and compare(each.score, bound)))
            and (selection.environment is None or each.environment == selection.environment)
            and (
                selection.text is None
                or any(text.search(part or "") for part in (each.prompt, each.completion))
            )
        )

    return matches


def _condition(text: str | None) -> tuple[Any, float]:
    """Parse a condition.

    >>> _condition(">0.5")[1], _condition("1")[0](1.0, 1)
    (0.5, True)
    """
    if text is None:
        return None, 0.0
    found = CONDITION.fullmatch(text.strip())
    try:
        if found is None:
            raise ValueError
        return COMPARISONS[found[1] or "="], float(found[2])
    except ValueError:
        raise BadFilter(f"--score {text!r}: give a number, or one after <, <=, > or >=") from None


def _newest_first(files: Sequence[tuple[int, int, Path]]) -> Iterator[Rollout]:
    """Yield the rollouts of all ranks, the newest step first."""

    def order(each: Rollout) -> tuple[int, int, int]:
        return (-each.step, each.group, each.index)

    def of_rank(rank: int) -> Iterator[Rollout]:
        for _, owner, path in reversed(files):
            if owner == rank:
                yield from sorted(rollouts.read_file(path), key=order)

    ranks = sorted({rank for _, rank, _ in files})
    return heapq.merge(*map(of_rank, ranks), key=order)


# --- text


def decoder(model: str) -> rollouts.Texts:
    """Return the function that decodes sequences with the model's tokenizer, if there is one."""

    def texts(sequences: Sequence[list[int]]) -> Sequence[str] | None:
        tokenizer = _tokenizer(model)
        if tokenizer is None:
            return None
        decoded: Sequence[str] = tokenizer.decode_batch(sequences, skip_special_tokens=False)
        return decoded

    return texts


@functools.cache
def _tokenizer(model: str) -> Any:
    """Load the model's tokenizer without torch or transformers; None if there is none.

    The tokenizer of a name on the Hugging Face hub comes from the cache that the run has filled.
    """
    try:
        from tokenizers import Tokenizer

        path = Path(model, "tokenizer.json")
        if not path.exists():
            from huggingface_hub import hf_hub_download

            path = Path(hf_hub_download(model, "tokenizer.json", local_files_only=True))
        return Tokenizer.from_file(str(path))
    except Exception:  # a missing library, an unusual model: token ids are better than nothing
        return None


def show(found: Sequence[Rollout]) -> None:
    """Print rollouts for people."""
    from rich.text import Text

    from atropos_hpc.observe.terminal import terminal as make_terminal

    terminal = make_terminal(highlight=False)
    for each in found:
        title = f"step {each.step}, {each.environment}, group {each.group}"
        if each.policy_versions is not None:
            versions = "-".join(map(str, dict.fromkeys(each.policy_versions)))
            title += f", generated by version {versions}"
        score = "none" if each.score is None else f"{each.score:g}"
        advantage = "" if each.advantage is None else f", advantage {each.advantage:.3g}"
        terminal.rule(f"{title}: score {score}{advantage}", style="dim", align="left")
        if each.completion is None:
            terminal.print(Text(str(each.tokens)), soft_wrap=True)
            continue
        prompt = Text(each.prompt or "", style="dim")
        terminal.print(prompt, Text(each.completion, style="bold"), sep="", soft_wrap=True)
