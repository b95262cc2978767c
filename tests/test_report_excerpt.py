"""The report's page as a parser reads it: rollouts, histograms, comparisons, and their access."""

import shutil
import subprocess
from collections.abc import Iterable, Sequence
from html.parser import HTMLParser
from pathlib import Path
from xml.etree.ElementTree import Element, TreeBuilder

import in_process
import msgspec
import pytest
import zstandard
from run_files import append_step
from test_report_page import made

from atropos_hpc.contracts.metrics import HISTOGRAM_EDGES, Rollout, StepMetrics, SweepPoint
from atropos_hpc.observe import excerpt
from atropos_hpc.runtime.run_dir import RunDir, append_record, write_struct

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome") or ""
VOID = {"meta", "img", "input", "br"}
NASTY = "</script><img src=x onerror=alert(1)>\"'&amp; ${x} {{ x }}"


class Page(HTMLParser):
    """A page as a tree of elements."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self._builder = TreeBuilder()
        self.feed(text[text.index("<html") :])
        self.root = self._builder.close()

    def handle_starttag(self, tag: str, attrs: Sequence[tuple[str, str | None]]) -> None:
        self._builder.start(tag, {name: value or "" for name, value in attrs})
        if tag in VOID:
            self._builder.end(tag)

    def handle_endtag(self, tag: str) -> None:
        self._builder.end(tag)

    def handle_data(self, data: str) -> None:
        self._builder.data(data)


def page_of(directory: Path) -> Element:
    done = in_process.command("report", directory)
    assert done.returncode == 0, done.stderr
    return Page((directory / "report" / "report.html").read_text()).root


def text(element: Element) -> str:
    return "".join(element.itertext())


def rollout(step: int, group: int, index: int = 0, prompt: str = "a", **more: object) -> Rollout:
    tokens = [*prompt.encode(), 1, 2]
    fields: dict[str, object] = {
        "environment": "sums",
        "score": float(index),
        "finish_reason": "stop",
    }
    fields |= {"prompt": prompt, "completion": "x", "policy_versions": (step - 1, step - 1)}
    fields |= {"tokens": tokens, "trained": [(len(tokens) - 2, len(tokens))]}
    return msgspec.convert(
        {**fields, "step": step, "group": group, "index": index, **more}, Rollout
    )


def bare(path: Path, last: int = 40) -> RunDir:
    """Make a run with hardly a plot, which takes long to draw."""
    run = made(path, steps=0)
    append_step(run, last)
    return run


def keep(run: RunDir, rollouts: Iterable[Rollout], name: str = "00000001-0.jsonl.zst") -> None:
    run.rollouts.mkdir(exist_ok=True)
    lines = b"".join(msgspec.json.encode(each) + b"\n" for each in rollouts)
    (run.rollouts / name).write_bytes(zstandard.ZstdCompressor().compress(lines))


def test_rollouts_are_in_the_page_as_they_are_whatever_they_say(tmp_path: Path) -> None:
    run = bare(tmp_path / "run")
    nasty = rollout(1, 0, prompt=NASTY, completion=NASTY, environment=NASTY, advantage=-0.5)
    keep(run, [nasty, rollout(40, 9, completion=None, score=None)])
    page = page_of(run.path)
    table = page.find(".//table[@id='rollouts']")
    assert table is not None and len(page.findall(".//script")) == 1
    assert all(img.get("src", "").startswith("data:") for img in page.iter("img"))
    first, second = table.findall("tbody/tr")
    assert [first.get(f"data-{name}") for name in ("step", "score", "environment")] == [
        *("1", "0.0"),
        NASTY,
    ]
    assert [text(pre) for pre in first.iter("pre")] == [NASTY, NASTY]
    assert "-0.5" in [text(cell) for cell in first]
    assert second.get("data-score") == "" and "[97, 1, 2]" in text(second), "tokens, not decoded"
    assert NASTY in [text(option) for option in page.iter("option")]


def test_a_prompt_that_was_trained_again_is_shown_side_by_side(tmp_path: Path) -> None:
    run = bare(tmp_path / "run")
    keep(run, [rollout(s, s, i, f"prompt {s % 20}") for s in range(1, 41) for i in (0, 1)])
    first = page_of(run.path).find(".//div[@class='beside']")
    assert first is not None
    headings = [text(each) for each in first.iter("h3")]
    assert headings == ["Version 0, trained at step 1", "Version 20, trained at step 21"]
    assert "mean score 0.5" in text(first) and "Best of 2, score 1" in text(first)


def test_without_such_a_prompt_groups_over_the_run_are_side_by_side(tmp_path: Path) -> None:
    run = bare(tmp_path / "run")
    keep(run, [rollout(step, step, prompt=f"prompt {step}") for step in range(1, 41)])
    (row,) = page_of(run.path).findall(".//div[@class='beside']")
    steps = [int(text(each).rpartition(" ")[2]) for each in row.iter("h3")]
    assert len(steps) == excerpt.TIMES and steps[0] == 1 and steps[-1] == 40


def test_the_page_of_a_long_run_is_bounded_and_says_what_it_leaves_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = bare(tmp_path / "run", 300)
    for begin in range(1, 301, 50):
        steps = range(begin, begin + 50)
        long = [
            rollout(s, s, i, f"p{s % 9}", completion="y" * 9000) for s in steps for i in range(9)
        ]
        keep(run, long, f"{begin:08d}-0.jsonl.zst")
    size = (run.rollouts / "00000001-0.jsonl.zst").stat().st_size
    monkeypatch.setattr(excerpt, "READ_BYTES", 4 * size)
    page = page_of(run.path)
    rows = page.findall(".//table[@id='rollouts']/tbody/tr")
    groups = excerpt.STEPS + excerpt.PROMPTS * excerpt.TIMES
    assert 0 < len(rows) <= groups * excerpt.SEQUENCES
    assert max(int(row.get("data-step", "")) for row in rows) == 300
    assert all("7,000 more characters" in text(row) for row in rows)
    said = " ".join(text(page).split())
    assert f"{len(rows)} sequences of" in said and "from the 150 steps" in said
    assert "(3 files were not)" in said


def test_environments_take_turns_in_the_excerpt(tmp_path: Path) -> None:
    run = bare(tmp_path / "run")
    names = ("sums", "words")
    keep(
        run,
        [
            rollout(step, 2 * step + n, prompt=f"{name} {step}", environment=name)
            for step in range(1, 41)
            for n, name in enumerate(names)
        ],
    )
    found = excerpt.read(run, 40).rollouts
    assert len([each for each in found if each.environment == "sums"]) == len(found) // 2


def test_histograms_are_drawn_and_described(tmp_path: Path) -> None:
    run = made(tmp_path / "run", steps=0)
    for step in range(1, 7):
        bins = {name: [0.0] * (len(edges) + 1) for name, edges in HISTOGRAM_EDGES.items()}
        bins["ratio"][7], bins["ratio"][8], bins["staleness"][step % 2] = 99.0, 1.0, 8.0
        append_record(run.metrics, StepMetrics(step, step, 0, 1e9 + step, 1.0, {}, {}, bins))
    page = page_of(run.path)
    described = [img.get("alt") for img in page.iter("img")]
    assert "Ratio learner / behaviour of trained tokens" in described
    assert "Staleness of sequences, histogram" in described
    assert "No step has the metric reward/mean" in text(page), "as in a run of an older version"


PROBE = """<script>
const press = (name) => [...document.querySelectorAll("th button")]
  .find((button) => button.textContent === name).click();
form.elements["score-from"].value = "0.5";
form.elements["text"].value = "SHOWN";
form.dispatchEvent(new Event("input"));
press("Step");
press("Step");
</script></body>"""


@pytest.mark.skipif(not CHROMIUM, reason="needs chromium")
def test_the_page_filters_and_sorts_in_a_browser(tmp_path: Path) -> None:
    run = bare(tmp_path / "run")
    words = {1: "shown", 10: "Shown", 40: "other"}
    keep(run, [rollout(s, s, i, completion=word) for s, word in words.items() for i in (0, 1)])
    page_of(run.path)
    page = run.path / "report" / "report.html"
    page.write_text(page.read_text().replace("</body>", PROBE))
    options = ("--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}/c")
    command = [CHROMIUM, *options, "--dump-dom", page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    shown = Page(done.stdout).root
    rows = shown.findall(".//table[@id='rollouts']/tbody/tr")
    visible = [
        (row.get("data-step"), row.get("data-score")) for row in rows if row.get("hidden") is None
    ]
    assert visible == [("10", "1.0"), ("1", "1.0")]
    assert [text(each) for each in shown.iter("output")] == ["2 of 6 sequences"]
    assert shown.find(".//th[@aria-sort='descending']") is not None


def test_what_is_drawn_can_be_read_and_reached_without_a_mouse(tmp_path: Path) -> None:
    run = made(tmp_path / "run")
    keep(run, [rollout(1, 0)])
    page = page_of(run.path)
    described = {img.get("alt", "").partition(":")[0]: img.get("alt") for img in page.iter("img")}
    assert described["Entropy of the policy"] == "Entropy of the policy: entropy from 1 to 1"
    assert "Timeline of learner, environment" in described
    assert all(table.find("caption") is not None for table in page.iter("table"))
    assert all(head.get("scope") for head in page.iter("th"))
    labelled = {id(each) for label in page.iter("label") for each in label}
    assert all(id(each) in labelled for tag in ("input", "select") for each in page.iter(tag))
    for each in page.iter():
        if each.get("class") in ("table", "beside", "wide"):  # scrolls
            assert each.get("tabindex") == "0" and each.get("role") == "region"
            assert each.get("aria-label") or each.get("aria-labelledby")


def test_a_sweep_is_compared_as_lines_and_by_the_keys_that_differ(tmp_path: Path) -> None:
    rows = []
    for num, (kl, seed) in enumerate((kl, seed) for kl in (0.0, 0.001, 0.1) for seed in (0, 1)):
        made(tmp_path / str(num), kl, seed)
        rows.append(SweepPoint(num, [f"seed={seed}"], str(tmp_path / str(num)), steps=40))
    write_struct(tmp_path / "jobs.json", rows)
    page = page_of(tmp_path)
    lines = page.findall(".//svg/polyline")
    assert len(lines) == len(rows)
    vertices = [line.get("points", "").split() for line in lines]
    assert all(len(each) == 4 for each in vertices), "kl_coef, accuracy, reward, KL"
    assert vertices[0] == vertices[1] != vertices[2], "seeds of one value are one line"
    assert [text(line) for line in lines][4] == "point 4, kl_coef 0.1"
    table = next(t for t in page.iter("table") if "differ" in text(t[0]))
    found = {text(row[0]): [text(cell) for cell in row[1:]] for row in table.findall("tbody/tr")}
    assert "0" not in found and found["1"][0] == "seed: 0 → 1"
    assert found["4"][0] == "algorithm.kl_coef: 0.0 → 0.1", "and nothing else"
    assert found["4"][1] == "-0.1"
