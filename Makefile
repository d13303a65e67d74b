# The first of any of these commands installs everything: `make run` runs the demo, `make test` the tests.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/installed
DOCKER ?= docker
IMAGE ?= qlora-job

.PHONY: help run run-dpo test test-long check format lock chaos chaos-processes standstill servers damage hostile combinations families bench image image-test registry-test store-test clean bench-gpu

run: $(STAMP)  ## the demo: results in runs/<run id>/
	JOB_PRESET=demo $(BIN)/python -m job

run-dpo: $(STAMP)  ## the demo of DPO: results in runs/<run id>/
	JOB_PRESET=demo-dpo $(BIN)/python -m job

help:  ## this list
	@sed -n 's/^\([a-z-]*\):.*## /make \1: /p' Makefile

test: $(STAMP)  ## the tests, three at a time, because they spend a third of the time waiting for other processes
	$(BIN)/python -m pytest -n 3 -q -m "not long"

test-long: $(STAMP)  ## the slow tests that `make test` leaves out: more kills, methods and numbers of processes
	$(BIN)/python -m pytest -n 3 -q -m long

check: $(STAMP)  ## lint, format, types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache --no-logo .github/imports.toml
	$(BIN)/shellcheck entrypoint.sh .ci/run .github/lock.sh
	$(BIN)/hadolint Dockerfile infra/sagemaker/Dockerfile
	$(BIN)/check-jsonschema --builtin-schema vendor.github-workflows .github/workflows/*.yml
	$(BIN)/check-jsonschema --builtin-schema vendor.dependabot .github/dependabot.yml
	$(BIN)/check-jsonschema --builtin-schema vendor.compose-spec infra/docker/compose*.yaml
	$(BIN)/zizmor --offline --quiet --pedantic .github
	$(BIN)/yamllint --strict -c .github/yamllint.yaml infra/docker infra/helm/qlora-job/*.yaml infra/helm/qlora-job/examples infra/kubernetes infra/orchestrators infra/serving

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# BASE_IMAGE and TORCH_INDEX, if given, are passed to the Dockerfile as the arguments of the same name.
image:  ## builds the image: make image [IMAGE=name:tag] [BASE_IMAGE=...] [TORCH_INDEX=...]
	$(DOCKER) build --tag $(IMAGE) $(foreach name,BASE_IMAGE TORCH_INDEX,$(if $($(name)),--build-arg $(name)=$($(name)))) \
		--build-arg VERSION=$$(sed -n 's/^__version__ = "\(.*\)"/\1/p' job/__init__.py) \
		--build-arg REVISION=$$(git describe --always --abbrev=40 --dirty --exclude='*') .

image-test: $(STAMP)  ## runs the image with Docker Engine, in every way that infra/docker/README.md describes
	DOCKER=$(DOCKER) IMAGE=$(IMAGE) BASE_IMAGE=$(BASE_IMAGE) $(BIN)/python -m pytest -q tests/image

# REGISTRY is the executable of a registry server, such as Debian's docker-registry (apt-get install docker-registry).
registry-test: $(STAMP)  ## pushes to a real registry, and pulls with Docker Engine
	DOCKER=$(DOCKER) REGISTRY=$${REGISTRY:-docker-registry} $(BIN)/python -m pytest -q tests/registry

# These servers are in no lock: npm and pip install them into a temporary folder, unless AZURITE and FAKE_GCS_SERVER are set.
store-test: $(STAMP)  ## the tests of gs:// and az:// with servers by others, Azurite and fake-gcs-server
	$(BIN)/python -m tests.store_servers --required $(BIN)/python -m pytest -n 3 -q -k "contract or azure" \
		tests/contract tests/unit/storage tests/unit/runs/test_lease.py tests/integration/test_clouds.py tests/integration/test_killed_runs.py

# torch is installed first and pinned by version only, because its build (CPU, CUDA) depends on the machine; pip shows
# its progress, since CUDA builds are several GB. Everything else is pinned by hash. --no-deps: the locks are complete,
# so no other package may be installed.
LOCKS := requirements.lock requirements-dev.lock
$(STAMP): $(LOCKS) requirements-cuda.lock pyproject.toml
	$(PYTHON) -m venv --clear .venv
	$(BIN)/python -m pip install --disable-pip-version-check $$(sed -n 's/^\(torch==[^ ]*\).*/\1/p' requirements-cuda.lock)
	$(BIN)/python -m pip install -q --disable-pip-version-check --no-deps --require-hashes $(addprefix -r ,$(LOCKS))
	$(BIN)/python -m pip install -q --disable-pip-version-check --no-deps --editable .
	touch $@

lock:  ## resolves the locks again; needs uv on PATH or in the environment
	sh .github/lock.sh

clean:  ## removes .venv and caches, but not runs/
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache .hypothesis *.egg-info

# STORE=s3, gcs or azure: chaos, standstill and damage use an imitation of that store instead of a folder.
chaos: $(STAMP)  ## 100 runs killed at random points, each compared with an undisturbed one; 50 races of two attempts
	OMP_NUM_THREADS=1 $(BIN)/python tests/chaos/full.py --runs $${RUNS:-100} $${STORE:+--store $$STORE}
	OMP_NUM_THREADS=1 $(BIN)/python tests/chaos/race.py --races $${RACES:-50} $${STORE:+--store $$STORE}

# SEED=1 draws other moments; RUNS=200 sets the number of runs.
chaos-processes: $(STAMP)  ## runs of 2 and 3 processes, of which one is killed, suspended or hangs: the others must end, and the run must resume
	OMP_NUM_THREADS=1 $(BIN)/python tests/chaos/processes.py --runs $${RUNS:-40} --seed $${SEED:-0}

families: $(STAMP)  ## every causal model family of transformers must be correct if packed, correct one by one, or refused
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.families.table --jobs $${JOBS:-1}

standstill: $(STAMP)  ## an attempt is suspended before each kind of write until the next attempt has published
	OMP_NUM_THREADS=1 $(BIN)/python tests/chaos/standstill.py $${STORE:+--store $$STORE}

servers: $(STAMP)  ## the job with S3 servers that refuse requests, cut connections or send other answers
	OMP_NUM_THREADS=1 $(BIN)/python tests/chaos/foreign_servers.py

# SEED=1 damages other files; JOBS=8 uses 8 processes.
damage: $(STAMP)  ## damages 500 run folders: the job must give the same result, or refuse with the right exit code
	OMP_NUM_THREADS=1 $(BIN)/python tests/chaos/damage.py --count $${COUNT:-500} --seed $${SEED:-0} $${STORE:+--store $$STORE} --jobs $${JOBS:-1}

hostile: $(STAMP)  ## malicious model folders and chat templates must be refused with a message, within limits of time and memory
	OMP_NUM_THREADS=1 $(BIN)/python tests/chaos/hostile.py

# SEED=1 draws other combinations; FIRST=100 COUNT=50 runs 50 of them, from number 100 on.
combinations: $(STAMP)  ## 100 random combinations of settings: each must be refused in time, or trained, killed, resumed and verified
	OMP_NUM_THREADS=1 $(BIN)/python tests/chaos/combinations.py --count $${COUNT:-100} --first $${FIRST:-0} --seed $${SEED:-0}

# FULL=1 scores all of ARC-Easy; UNSLOTH is a Python interpreter that has Unsloth; FAMILY is llama, mistral or qwen2.
# tests/bench/checkouts.py compares whole jobs of several checkouts.
bench: $(STAMP)  ## speed on this CPU, compared with plain scripts that do the same work
	$(BIN)/python tests/bench/cpu.py --json $${JSON:-tests/bench/results/cpu.json} $${FULL:+--full} $${UNSLOTH:+--unsloth $$UNSLOTH} $${FAMILY:+--family $$FAMILY}

# UNSLOTH is a Python interpreter that has Unsloth. All sections: tests/bench/gpu.py. Two GPUs: tests/bench/gpu_processes.py.
bench-gpu: $(STAMP)  ## speed on this machine's GPU, compared with plain TRL, HFLM and Unsloth, in one table
	UNSLOTH=$(UNSLOTH) $(BIN)/python tests/bench/gpu.py --buyers --out tests/bench/results
