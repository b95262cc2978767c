"""Roles that cannot fit into their GPUs, or into the host memory of their jobs, without either."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from click.testing import CliRunner
from config_parts import composed

from atropos_hpc import cli
from atropos_hpc.config import Config
from atropos_hpc.launch import machine_memory, memory_check, preflight, sweep
from atropos_hpc.launch.memory_check import Devices
from atropos_hpc.launch.slurm.cluster import Cluster, parse_cluster
from atropos_hpc.launch.sweep_point import Point
from atropos_hpc.runtime import sizing
from atropos_hpc.runtime.model_sizes import sizes
from bench.parts.published import CONFIGS

GIB = 2.0**30
NODES = """\
main|4|256|2000000|gpu:a100:4|(null)
main|2|256|2000000|gpu:nvidia_h200_141gb:8|h200
mixed|2|256|2000000|gpu:8|(null)
mixed|2|256|2000000|gpu:l4:8|l4
"""
PARTITION = (
    "PartitionName={name} AllowAccounts=ALL AllowQos=ALL Default={default} JobDefaults={job}"
    " MaxNodes=9 MaxTime=UNLIMITED MinNodes=0 State=UP {memory} MaxMemPerNode=UNLIMITED\n"
)


def cluster(
    memory: str = "DefMemPerNode=UNLIMITED", job: str = "(null)", conf: str = ""
) -> Cluster:
    shown = PARTITION.format(name="main", default="YES", memory=memory, job=job)
    shown += PARTITION.format(name="mixed", default="NO", memory=memory, job=job)
    return parse_cluster(NODES, shown, f"SchedulerType = sched/backfill\n{conf}")


def large(*overrides: str) -> Config:
    """Full fine-tuning of 32B on 4 nodes, and servers over 8 GPUs."""
    target = "environment.target=math_server.py:MathEnv"
    return composed("experiment=math_qwen2_5_32b", target, *overrides)


def found(config: Config, devices: Devices) -> dict[str, str]:
    model = sizes(CONFIGS[config.model.path or ""])
    return {each.key: each.message for each in memory_check.too_large(config, model, devices)}


def test_a_trainer_that_cannot_fit_is_refused_with_the_figures_and_what_helps() -> None:
    config = large()
    assert found(config, Devices(80 * GIB, 80 * GIB)) == found(config, Devices()) == {}
    problems = found(config, Devices(24 * GIB, 80 * GIB))
    assert list(problems) == ["roles.trainer.gpus_per_node"]
    message = problems["roles.trainer.gpus_per_node"]
    assert "to need 40.1 GiB of GPU memory, and a GPU has 24 GiB; less with" in message
    assert "trainer.offload=true (22.9 GiB), model.lora.rank=32 (" in message
    assert "roles.trainer.nodes=8 (" in message
    assert "gradient_checkpointing" not in message  # it is on already
    config.trainer.offload = True
    assert found(config, Devices(24 * GIB, 80 * GIB)) == {}


@pytest.mark.parametrize(
    ("changes", "gib", "key"),
    [
        ([], 80, None),
        (["rollout.tensor_parallel=1"], 80, None),  # 61 GiB of weights and 8 of cache
        (["rollout.tensor_parallel=1"], 64, "rollout.tensor_parallel"),
        (["rollout.tensor_parallel=2"], 80, None),
        (["rollout.tensor_parallel=2", "rollout.memory_utilization=0.4"], 80, "tensor_parallel"),
        (["rollout.tensor_parallel=1", "rollout.memory_utilization=0.7"], 94, "tensor_parallel"),
        (["rollout.tensor_parallel=1", "rollout.memory_utilization=0.7"], None, None),
        (["rollout.tensor_parallel=1", "rollout.arguments=['--quantization=fp8']"], 40, None),
        (["rollout.kv_cache_bytes=100000000"], None, "rollout.kv_cache_bytes"),
        (["rollout.kv_cache_bytes=80000000000"], 80, "rollout.tensor_parallel"),
    ],
)
def test_a_server_needs_memory_for_its_weights_and_one_sequence(
    changes: list[str], gib: float | None, key: str | None
) -> None:
    memory = gib and gib * GIB
    problems = found(large("model.max_length=32768", *changes), Devices(None, memory))
    assert len(problems) == (key is not None) and all(str(key) in each for each in problems)


@pytest.mark.parametrize(
    ("changes", "gib", "fits"),
    [
        ([], 80, True),
        ([], 40, False),
        (["trainer.tokens_per_micro_batch=8192"], 40, True),
        (["rollout.kv_cache_bytes=30000000000"], 48, False),
    ],
)
def test_a_learner_and_a_server_have_to_fit_into_the_gpu_that_they_share(
    changes: list[str], gib: int, fits: bool
) -> None:
    config = composed("experiment=gsm8k_one_gpu", *changes)
    assert found(config, Devices(gib * GIB, gib * GIB)) == {}  # one each
    problems = found(config, Devices(gib * GIB, gib * GIB, shared=True))
    assert bool(problems) is not fits
    assert all(key.startswith("rollout.") for key in problems)


def test_on_this_machine_the_driver_and_the_visible_devices_decide() -> None:
    config = composed("experiment=gsm8k_one_gpu")
    memory = {"0": 80 * GIB, "GPU-a": 80 * GIB, "1": 24 * GIB, "GPU-b": 24 * GIB}
    both = memory_check.of_machine(config, memory, {"CUDA_VISIBLE_DEVICES": "GPU-b,0"})
    assert both == Devices(24 * GIB, 80 * GIB, shared=False)
    one = memory_check.of_machine(config, memory, {"CUDA_VISIBLE_DEVICES": "1"})
    assert one == Devices(24 * GIB, 24 * GIB, shared=True)
    unknown = memory_check.of_machine(config, memory, {"CUDA_VISIBLE_DEVICES": "MIG-c"})
    assert unknown == Devices(None, None, shared=True)


@pytest.mark.parametrize(
    ("changes", "gib"),
    [
        (["roles.trainer.gres='gpu:nvidia_a100-sxm4-40gb:8'"], 40),
        (["roles.trainer.gres='gpu:a100:4,gpu:h200:4'"], 80),
        (["roles.trainer.gres='gpu:newest:8'"], None),
        (["cluster.gpus='--gres=gpu:v100:{n}'"], 32),
        ([], 141),  # the only nodes with 8
        (["roles.trainer.gpus_per_node=4", "roles.trainer.ranks_per_node=4"], 141),  # the largest
        (["roles.trainer.partition=mixed"], None),
        (["roles.trainer.partition=mixed", "roles.trainer.constraint=l4"], 24),
    ],
)
def test_in_a_job_the_types_of_gpus_decide(changes: list[str], gib: int | None) -> None:
    config = large("launch=het", *changes)
    assert memory_check.of_job(config, cluster()).trainer == (gib and gib * GIB)


@pytest.mark.parametrize(
    ("shown", "says"),
    [
        ({}, None),
        ({"memory": "DefMemPerCPU=1000"}, "gets 112,000M per node (DefMemPerCPU=1000)"),
        ({"memory": "DefMemPerNode=8000"}, "gets 8,000M per node (DefMemPerNode=8000)"),
        ({"conf": "DefMemPerNode = 8000\n"}, "gets 8,000M per node (DefMemPerNode=8000)"),
        ({"job": "DefCpuPerGPU=4,DefMemPerGPU=4000"}, "gets 32,000M per node (DefMemPerGPU=4000)"),
        ({"memory": "DefMemPerCPU=64000"}, None),
    ],
)
def test_a_default_of_the_partition_that_is_too_small_is_a_warning(
    shown: dict[str, str], says: str | None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    config = large("launch=het", "roles.trainer.cpus_per_task=14")
    (tmp_path / "config.json").write_text(json.dumps(CONFIGS[config.model.path or ""]))
    config.model.path, config.roles.trainer.mem = str(tmp_path), None
    warned = [*memory_check.default_too_small(config, cluster(**shown))]
    assert [each.key for each in warned] == ["roles.trainer.mem"] * (says is not None)
    assert not warned or (
        f"{says}; a node of this role is estimated to need 162 GiB: roles.trainer.mem=163G"
        in warned[0].message
    )
    config.cluster.sbatch["mem_per_cpu"] = "16G"
    assert not [*memory_check.default_too_small(config, cluster(**shown))]


@pytest.mark.parametrize(
    ("mem", "says"),
    [(None, ""), ("0", ""), ("2048", "refused"), ("8G", "warning"), ("1T", ""), ("much", "")],
)
def test_a_role_with_too_little_host_memory_is_refused(
    tmp_path: Path, mem: str | None, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the processes themselves need is an assumption, for which nothing is refused."""
    monkeypatch.setattr(memory_check, "_cluster", lambda: None)
    config = Config(run_dir="/run")
    (tmp_path / "config.json").write_text(json.dumps(CONFIGS["Qwen/Qwen2.5-0.5B-Instruct"]))
    config.model.path = str(tmp_path)
    config.roles.trainer.gpus_per_node, config.roles.trainer.mem = 1, mem
    config.launch.allocation = "het"
    found = {"refused": memory_check.check(config, False), "warning": memory_check.warnings(config)}
    keys = {kind: [each.key for each in problems] for kind, problems in found.items()}
    assert keys == {kind: ["roles.trainer.mem"] * (kind == says) for kind in keys}


@pytest.fixture
def model(tmp_path: Path) -> str:
    (tmp_path / "config.json").write_text(json.dumps(CONFIGS["Qwen/Qwen2.5-32B-Instruct"]))
    (tmp_path / "tokenizer.json").write_text("{}")
    return f"model.path={tmp_path}"


def test_nothing_is_queued_for_a_type_of_gpu_that_is_too_small(model: str, tmp_path: Path) -> None:
    config = large("launch=het", model, "roles.trainer.gres='gpu:l4:8'")
    problems = preflight.check(config, tmp_path / "run", None, roles=False)
    assert "roles.trainer.gpus_per_node" in [each.key for each in problems]


@pytest.fixture
def default_of_8_gb(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory_check.slurm, "is_installed", lambda: True)
    monkeypatch.setattr(memory_check, "read_cluster", lambda: cluster("DefMemPerNode=8000"))
    monkeypatch.setattr(preflight, "check", lambda *_, **__: [])


WARNING = "warning: roles.rollout.mem: is null, and a job in partition main"


@pytest.mark.usefixtures("default_of_8_gb")
def test_validate_shows_the_warning(model: str) -> None:
    asked = ["experiment=math_qwen2_5_32b", "environment.target=math_server.py:MathEnv", model]
    asked += ["run_dir=/nowhere", "launch=het", "roles.rollout.mem=null"]
    shown = CliRunner().invoke(cli.app, ["validate", *asked])
    assert WARNING in shown.output and shown.exit_code == 0
    shown = CliRunner().invoke(cli.app, ["validate", "--json", *asked])
    (warning,) = json.loads(shown.output)["warnings"]
    assert warning["key"] == "roles.rollout.mem" and shown.exit_code == 0


@pytest.mark.usefixtures("default_of_8_gb")
def test_a_submission_shows_the_warning_once_for_all_points(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sweep, "cluster_answers", lambda: True)
    dry = large("launch=het", model, "roles.rollout.mem=null", "launch.dry_run=true")
    points = [Point(num, [], dry, tmp_path / str(num)) for num in range(2)]
    sweep.on_slurm(points, tmp_path, 0)
    assert capsys.readouterr().err.count(WARNING) == 1


@pytest.mark.usefixtures("default_of_8_gb")
def test_validate_shows_what_each_phase_needs_beside_what_there_is(model: str) -> None:
    asked = ["experiment=math_qwen2_5_32b", "environment.target=math_server.py:MathEnv", model]
    asked += ["run_dir=/nowhere", "launch=het", "roles.trainer.gres='gpu:a100:8'"]
    asked += ["roles.rollout.gres='gpu:unknown:8'", "roles.trainer.mem=600G"]
    shown = CliRunner().invoke(cli.app, ["validate", "--json", *asked])
    needs = {each["part"]: each for each in json.loads(shown.output)["memory"]}
    assert needs["trainer rank: loss head"]["available_bytes"] == 80 * GIB
    assert needs["trainer node: host memory"]["available_bytes"] == 600 * GIB
    assert needs["server: weights"]["available_bytes"] is None
    assert needs["server: weights"]["needed_bytes"] == pytest.approx(32.8e9 * 2 / 8, rel=0.01)
    peak = max(each["needed_bytes"] for part, each in needs.items() if "trainer rank" in part)
    assert peak == pytest.approx(40.1 * GIB, rel=0.01)  # the figure of the refusal above
    text = CliRunner().invoke(cli.app, ["validate", *asked]).output
    assert "memory, estimated" in text and "600 GiB" in text


@pytest.mark.parametrize("state, free, total, said", [
    ("float32", 64, 64, None),
    ("float32", 8, 64, "8.0 GiB are free"),
    ("bfloat16", 8, 64, "8.0 GiB are free"),
    ("float32", 4, 4, "the machine has 4.0 GiB"),
])  # fmt: skip
def test_a_run_on_this_machine_is_compared_with_its_memory(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, state: str, free: int, total: int,
    said: str | None,
) -> None:  # fmt: skip
    shape = CONFIGS["Qwen/Qwen2.5-0.5B-Instruct"]
    (tmp_path / "config.json").write_text(json.dumps(shape))
    config = composed("experiment=gsm8k_qwen2_5_coder_0_5b_cpu", f"model.path={tmp_path}",
                      f"trainer.optimizer_state={state}")  # fmt: skip
    monkeypatch.setattr(sizing, "free_memory", lambda: free * GIB)
    memory = SimpleNamespace(total=total * GIB)
    monkeypatch.setattr(machine_memory.psutil, "virtual_memory", lambda: memory)
    warned = [each.message for each in memory_check.warnings(config)]
    refused = [each.message for each in memory_check.check(config, False)]
    assert bool(warned) == (said is not None) and bool(refused) == (total == 4)
    assert all(said in each for each in refused or warned if said)
    assert all(("optimizer_state" in each) == (state == "float32") for each in warned)
    assert memory_check.needs(config, False)[-1].available_bytes == free * GIB
