"""What the policy says: some of the sequences that were trained on, from version to version, in samples.jsonl.

The learner keeps the best and the worst answer of one group about a hundred times a run, as token ids: it needs no tokenizer for that. Who
reads them (`atropos-hpc samples`, W&B) decodes them with the model's own tokenizer.json.
"""

import functools
from pathlib import Path
from typing import TYPE_CHECKING, Any

from atropos_hpc.runtime.run_dir import RunDir, read_lines

if TYPE_CHECKING:
    from atropos_hpc.contracts.group import Group

TIMES = 100  # a run


def due(version: int, steps: int) -> bool:
    """Is it this version's turn, in a run of so many steps?"""
    return version % max(1, steps // TIMES) == 0


def choose(group: "Group", version: int) -> list[dict[str, Any]]:
    """The sequences of a group with the highest and the lowest score, of a batch that is trained on at `version`. "completion" begins with
    the first trained token.
    """
    best, worst = int(group.scores.argmax()), int(group.scores.argmin())
    ends = group.lengths.cumsum()
    lines = []
    for index in dict.fromkeys((best, worst)):
        end = int(ends[index])
        start = end - int(group.lengths[index])
        trained = group.trained[start:end]
        cut = start + (int(trained.argmax()) if trained.any() else end - start)
        lines.append({
            "version": version, "policy_versions": group.policy_versions[index], "score": float(group.scores[index]),
            "prompt": group.tokens[start:cut].tolist(), "completion": group.tokens[cut:end].tolist(),
        })  # fmt: skip
    return lines


def read(run: RunDir, version: int | None, last: int) -> list[dict[str, Any]]:
    """The last so many samples (of one version, if given), decoded; with token ids in place of text where there is no tokenizer."""
    lines = [
        line for line in read_lines(run.samples) if version is None or line["version"] == version
    ]
    return decoded(lines[-last:], run.config().model.path or "") if lines and last > 0 else []


def decoded(lines: list[dict[str, Any]], model: str) -> list[dict[str, Any]]:
    """The lines, with prompt and completion as text."""
    tokenizer = _tokenizer(model)
    if tokenizer is None:
        return lines
    text = {
        name: tokenizer.decode_batch([line[name] for line in lines], skip_special_tokens=False)
        for name in ("prompt", "completion")
    }
    return [
        {**line, "prompt": text["prompt"][index], "completion": text["completion"][index]}
        for index, line in enumerate(lines)
    ]


@functools.cache
def _tokenizer(model: str) -> Any:
    """The model's, without torch or transformers; of a name on the hub, from the cache that the run has filled. None: there is none."""
    try:
        from tokenizers import Tokenizer

        path = Path(model, "tokenizer.json")
        if not path.exists():
            from huggingface_hub import hf_hub_download

            path = Path(hf_hub_download(model, "tokenizer.json", local_files_only=True))
        return Tokenizer.from_file(str(path))
    except Exception:  # a missing library, an odd model: token ids are better than nothing
        return None


def show(found: list[dict[str, Any]]) -> None:
    """Print them for people."""
    from rich.console import Console
    from rich.text import Text

    terminal = Console(highlight=False)
    for line in found:
        versions = line["policy_versions"]
        by = (
            ""
            if versions is None
            else f", sampled by version {'-'.join(map(str, dict.fromkeys(versions)))}"
        )
        terminal.rule(
            f"trained on at version {line['version']}{by}: score {line['score']:g}",
            style="dim",
            align="left",
        )
        terminal.print(
            Text(str(line["prompt"]), style="dim"),
            Text(str(line["completion"]), style="bold"),
            sep="",
            soft_wrap=True,
        )
