# make demo   sets up what is missing and trains a tiny policy on this machine, end to end
# make test   sets up what is missing and runs every test
#
# The trainer role, with the login and development tools, lives in .venv; the rollout role in .venv-rollout: verl and vLLM pin
# versions that exclude one another. `make setup DEVICE=cuda` installs the CUDA pins instead of the CPU ones.

DEVICE ?= cpu
PYTHON ?= python3
SEED ?= 0
RUN ?= runs/demo
NAME ?=

# uv does not read pip's configuration: wheels that pip would find in a local directory are pointed out to it. Where there is no such
# directory, the CPU build of torch comes from PyTorch's own index.
FIND_LINKS := $(or $(PIP_FIND_LINKS),$(shell $(PYTHON) -m pip config get global.find-links 2>/dev/null))
UV := UV_SYSTEM_CERTS=1 .venv/bin/uv
UV_WHEELS := $(if $(FIND_LINKS),--find-links $(FIND_LINKS),$(if $(filter cpu,$(DEVICE)),--torch-backend=cpu))
# DeepSpeed comes as source; none of its kernels is wanted, and building them needs a compiler.
INSTALL := DS_BUILD_OPS=0 $(UV) pip install --quiet $(UV_WHEELS) --compile-bytecode

TRAINER := .venv/ready-$(DEVICE)
ROLLOUT := .venv-rollout/ready-$(DEVICE)
TRL := .venv-trl/ready

.PHONY: demo setup apt test lint bench faults soak clean

demo: setup
	.venv/bin/python -m atropos_hpc.train run_dir=$(RUN) seed=$(SEED)

setup: $(TRAINER) $(ROLLOUT)

.venv/bin/uv:
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --quiet uv

$(TRAINER): requirements/trainer-$(DEVICE).txt requirements/dev.txt pyproject.toml | .venv/bin/uv
	$(INSTALL) --python .venv/bin/python -r requirements/trainer-$(DEVICE).txt -r requirements/dev.txt
	$(UV) pip install --quiet --python .venv/bin/python --no-deps --editable .
	touch $@

$(ROLLOUT): requirements/rollout-$(DEVICE).txt requirements/dev.txt requirements/rollout-overrides.txt pyproject.toml | .venv/bin/uv
	test -x .venv-rollout/bin/python || $(UV) venv --quiet --python .venv/bin/python .venv-rollout
	$(INSTALL) --python .venv-rollout/bin/python $(if $(filter cpu,$(DEVICE)),--override requirements/rollout-overrides.txt) \
		-r requirements/rollout-$(DEVICE).txt -r requirements/dev.txt
	$(UV) pip install --quiet --python .venv-rollout/bin/python --no-deps --editable .
	touch $@

lint: $(TRAINER)
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy atropos_hpc

# Debian's Slurm, for the tests that bring up a private cluster; installed where this user may.
apt:
	@if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && \
		! { command -v slurmctld && command -v slurmd && command -v sbatch && command -v munged; } >/dev/null; then \
		apt-get -qq update && DEBIAN_FRONTEND=noninteractive apt-get -qq install -y slurmctld slurmd slurm-client munge >/dev/null; fi

# Each test file belongs to one role's environment (tests/conftest.py says which).
test: setup apt
	TEST_ROLE=trainer .venv/bin/python -m pytest
	TEST_ROLE=rollout .venv-rollout/bin/python -m pytest

# TRL, which one bench compares with, has an environment of its own.
$(TRL): requirements/bench-trl-cpu.txt | .venv/bin/uv
	test -x .venv-trl/bin/python || $(UV) venv --quiet --python .venv/bin/python .venv-trl
	$(INSTALL) --python .venv-trl/bin/python -r requirements/bench-trl-cpu.txt
	touch $@

bench: setup apt $(if $(filter-out end_to_end,$(NAME)),,$(TRL))
	.venv/bin/python -m bench $(NAME)

# Random faults against a live run: SEED is one number or a range, MINUTES of faults for each. Summed up over all calls.
MINUTES ?= 0.5
faults: setup
	.venv/bin/python tests/faults.py --seed $(SEED) --minutes $(MINUTES) --record bench/results/faults.jsonl

# A kill every 30 to 90 seconds for an hour; MINUTES is another time.
soak: MINUTES := 60
soak: setup
	.venv/bin/python tests/soak.py --minutes $(MINUTES)

# Run directories and the cache of made models stay: they are results.
clean:
	rm -rf .venv .venv-rollout .venv-trl build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
