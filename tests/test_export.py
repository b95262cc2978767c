"""Exports during a run, to the Hub, and runs that start from an exported model."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hub_stand_in import TOKEN, hub
from learner_run_parts import GROUPS, ended, group, learn, new_run, post, trajectory_server, weights

from atropos_hpc.config import Config, ExportConf
from atropos_hpc.contracts.metrics import Evaluation
from atropos_hpc.contracts.run_info import RunInfo
from atropos_hpc.launch import base_model, preflight
from atropos_hpc.learner import periodic_export
from atropos_hpc.learner.periodic_export import PeriodicExport
from atropos_hpc.runtime import process
from atropos_hpc.runtime.run_dir import RunDir, append_record, read_json, write_json
from atropos_hpc.runtime.waiting import wait_for

pytestmark = pytest.mark.verl
TEMPLATE = "{% for m in messages %}{{ m.content }}={% endfor %}"


def trained(run: RunDir, steps: int) -> None:
    """Train a run to its end."""
    with trajectory_server(run) as url:
        post(url, run.token(), [group(seed) for seed in range(steps * GROUPS)])
        assert ended(run, learn(run)) == [0], process.tail(run.logs / "trainer-0.log", 40)


@pytest.fixture(scope="module")
def exporting(tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    """A run of four steps that was exported at the second and the fourth, if there was time."""
    import torch

    from atropos_hpc.environments.make_base import make_model, make_tokenizer

    model = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    make_model(0).save_pretrained(model)
    tokenizer = make_tokenizer()
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(model)
    run = new_run(tmp_path_factory.mktemp("exporting"), model, steps=4)
    info = read_json(run.run_json)
    info["config"]["export"] = {"every": 2, "keep": 1}
    write_json(run.run_json, info)
    for version in (2, 4):
        append_record(run.evaluations, Evaluation(version, version / 8, sequences=10))
    trained(run, 4)
    return run


def test_the_newest_exports_are_kept_with_their_evaluation_and_a_run_starts_from_one(
    exporting: RunDir, tmp_path: Path
) -> None:
    from transformers import AutoTokenizer

    assert [path.name for path in exporting.exports.iterdir()] == ["step-4"]
    model = exporting.exports / "step-4"
    card = (model / "README.md").read_text()
    assert "| 2 | 0.250 | 10 |" in card and "| 4 | 0.500 | 10 |" in card
    assert '"learning_rate": 0.001' in card and str(exporting.path) not in card.split("{")[1]
    before, after = map(AutoTokenizer.from_pretrained, (exporting.config().model.path, model))
    messages = [{"role": "user", "content": "1+2"}]
    for tokenizer in (before, after):
        assert tokenizer.apply_chat_template(messages, tokenize=False) == "1+2="
    assert before.get_vocab() == after.get_vocab()

    new = new_run(tmp_path / "new", model, steps=1, learning_rate=0.0)
    assert not list(preflight._model_files(new.config()))
    assert base_model.ensure(new.config().model, sys.executable, tmp_path) == str(model)
    trained(new, 1)
    version, files = weights(new)
    assert (version, files) == (1, weights(exporting)[1]), "it starts from the exported weights"


def pushed(run: RunDir, out: Path, url: str, token: str) -> "subprocess.CompletedProcess[str]":
    hub_variables = {"HF_ENDPOINT": url, "HF_TOKEN": token, "HF_HUB_DISABLE_XET": "1"}
    command = [sys.executable, "-m", "atropos_hpc.cli", "export", str(run.path), str(out), "--json"]
    return subprocess.run(
        [*command, "--push", "me/adder"],
        env={**os.environ, **hub_variables, "HF_HUB_OFFLINE": "0"},
        capture_output=True,
        text=True,
        check=False,
    )


def test_an_export_is_pushed_to_a_private_repository_of_the_hub(
    exporting: RunDir, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    with hub() as found:
        refused = pushed(exporting, out, found.url, "hf_wrong")
        assert refused.returncode == 2 and "HF_TOKEN" in refused.stderr
        assert "Traceback" not in refused.stderr and not out.exists(), (
            "refused before it is written"
        )
        done = pushed(exporting, out, found.url, TOKEN)
        assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert answer["step"] == 4 and answer["url"].startswith(found.url)
    assert found.repositories["me/adder"]["visibility"] == "private"
    assert found.files == {path.name: path.read_bytes() for path in out.iterdir()}
    assert found.messages == ["Weights after step 4"]


def test_an_export_that_fails_or_hangs_is_reported_and_does_not_end_the_learner(
    run: RunDir, caplog: pytest.LogCaptureFixture
) -> None:
    run.new_attempt()
    run.write_info(RunInfo(Config(run_dir=str(run.path))))
    for timeout_s, reason in ((60.0, "no checkpoint of step 4"), (0.0, "it took 0 s")):
        exports = PeriodicExport(run, ExportConf(every=2), timeout_s)
        exports.durable(None)
        exports.durable(3)
        assert exports._child is None, "not due"
        exports.durable(4)
        wait_for("the end", "the export", lambda each=exports: each.last_done(4), 60.0)
        assert reason in caplog.messages[-1] and "step 4 is not exported" in caplog.messages[-1]


def test_only_the_newest_exports_are_kept_and_their_cards_are_renewed(
    run: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    from atropos_hpc.learner import export as module

    def write(_run: RunDir, out: Path, step: int, spare_bytes: int) -> None:
        out.mkdir()
        (out / "weights").write_text(f"{step} {spare_bytes}")

    manifest = type("Manifest", (), {"files": ()})
    monkeypatch.setattr(module, "export", write)
    monkeypatch.setattr(periodic_export, "find", lambda *_: (run.path, manifest))
    monkeypatch.setattr(periodic_export, "model_card", lambda _run, step: f"card of {step}")
    (run.exports / ".step-2.7.abcd").mkdir(parents=True)
    (run.exports / "step-2-to-keep").mkdir()
    for step in (2, 4, 4, 10):
        periodic_export.export_step(run, step, keep=2)
    (run.exports / "step-2-to-keep").rmdir()  # a copy of the user's: not removed, no number
    found = {path.name: (path / "README.md").read_text() for path in run.exports.iterdir()}
    assert found == {"step-4": "card of 4", "step-10": "card of 10"}
