"""Check what the documentation site's search finds first for a newcomer's questions.

    python tests/site_search.py SITE

SITE is a built site. Index and ranking are those of the theme's search worker: every word is a
prefix, fields are boosted as the site's index says, their length does not count, and an entry is
weighted by the part of the words that it has, a page's own entry more. Needs the packages of
requirements/docs.txt.
"""

import html
import json
import re
import sys
from pathlib import Path

from lunr import get_default_builder
from lunr.pipeline import Pipeline
from lunr.stop_word_filter import stop_word_filter

# question -> what is typed, and the place that answers it
QUESTIONS = {
    "How do I install it on my cluster?": ("install", "your-cluster/#1-install"),
    "Why is my GPU not seen?": ("GPU not seen", "tasks/what-went-wrong/#the-gpu-is-not-seen"),
    "How do I describe my site?": ("site profile", "slurm/#describing-your-site"),
    "Why does my job stay in the queue?": (
        "job queue",
        "tasks/what-went-wrong/#the-job-stays-in-the-queue",
    ),
    "What do I do when memory runs out?": ("out of memory", "tasks/what-went-wrong/#out-of-memory"),
    "Why does my run hang?": ("hang", "tasks/what-went-wrong/#the-run-hangs"),
    "How do I resume a run?": ("resume", "tasks/preemption/#stop-and-resume-by-hand"),
    "How do I change the KL?": (
        "change KL",
        "tasks/sweep-the-kl-coefficient/#change-the-kl-of-one-run",
    ),
    "How do I train on my own environment?": (
        "train my environment",
        "tasks/train-my-environment/",
    ),
    "How do I use my own model?": (
        "use my model",
        "tasks/train-my-environment/#use-your-own-model",
    ),
    "Where are my samples?": ("samples", "tasks/read-the-report/#where-are-my-samples"),
    "How good is the model?": ("how good", "tasks/read-the-report/#how-good-is-the-policy"),
}


class Search:
    """The site's index, built and ranked as in the browser."""

    def __init__(self, site: Path) -> None:
        content = json.loads((site / "search" / "search_index.json").read_text())
        self.documents = {each["location"]: each for each in content["docs"]}
        builder = get_default_builder()
        builder.pipeline, builder.search_pipeline = Pipeline(), Pipeline()
        builder.pipeline.add(stop_word_filter)
        assert content["config"]["pipeline"] == ["stopWordFilter"]
        builder.b(0)
        builder.ref("location")
        for name, options in content["config"]["fields"].items():
            builder.field(name, boost=options["boost"])
        for each in self.documents.values():
            text = html.unescape(re.sub(r"<[^>]+>", " ", each["text"]))
            builder.add({**each, "text": text, "tags": ""})
        self.index = builder.build()

    def find(self, words: str) -> list[str]:
        """Return the locations that match, best first."""
        prefixes = words.lower().split()
        scores = {}
        for match in self.index.search(" ".join(f"{prefix}*" for prefix in prefixes)):
            terms = match["match_data"].metadata
            matched = [any(term.startswith(prefix) for term in terms) for prefix in prefixes]
            boost = ("#" not in match["ref"]) + sum(matched) / len(prefixes)
            scores[match["ref"]] = match["score"] * (1 + boost**2)
        return sorted(scores, key=lambda location: -scores[location])


def main(site: str) -> int:
    search, wrong = Search(Path(site)), 0
    for question, (words, place) in QUESTIONS.items():
        found = search.find(words)
        if place not in search.documents or found[:1] != [place]:
            wrong += 1
            print(f"{question} Searching for {words!r} finds {found[:4]} and not {place}")
    print(
        f"{len(QUESTIONS) - wrong} of {len(QUESTIONS)} questions are answered by the first result"
    )
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
