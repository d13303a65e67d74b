# Two commands do all the set-up: `make run` runs the demo, `make test` passes the tests.
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

test: $(STAMP)  ## the tests, three at a time: they wait for other processes a third of the time
	$(BIN)/python -m pytest -n 3 -q -m "not long"

test-long: $(STAMP)  ## tests that the others leave out: more kills, methods and numbers of processes
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

# BASE_IMAGE and TORCH_INDEX, where given, are the Dockerfile's arguments of that name.
image:  ## the image: make image [IMAGE=name:tag] [BASE_IMAGE=...] [TORCH_INDEX=...]
	$(DOCKER) build --tag $(IMAGE) $(foreach name,BASE_IMAGE TORCH_INDEX,$(if $($(name)),--build-arg $(name)=$($(name)))) \
		--build-arg VERSION=$$(sed -n 's/^__version__ = "\(.*\)"/\1/p' job/__init__.py) \
		--build-arg REVISION=$$(git describe --always --abbrev=40 --dirty --exclude='*') .

image-test: $(STAMP)  ## runs the image with Docker Engine, in every way that infra/docker/README.md describes
	DOCKER=$(DOCKER) IMAGE=$(IMAGE) BASE_IMAGE=$(BASE_IMAGE) $(BIN)/python -m pytest -q tests/image

# REGISTRY is the program of a registry, such as Debian's docker-registry: apt-get install docker-registry
registry-test: $(STAMP)  ## pushes to a real registry, and pulls with Docker Engine
	DOCKER=$(DOCKER) REGISTRY=$${REGISTRY:-docker-registry} $(BIN)/python -m pytest -q tests/registry

# No lock has these servers: npm and pip bring them into a temporary folder. AZURITE and FAKE_GCS_SERVER name others.
store-test: $(STAMP)  ## the tests of gs:// and az:// against servers that others wrote, Azurite and fake-gcs-server
	$(BIN)/python -m tests.store_servers --required $(BIN)/python -m pytest -n 3 -q -k "contract or azure" \
		tests/contract tests/unit/storage tests/unit/runs/test_lease.py tests/integration/test_clouds.py tests/integration/test_survival.py

# torch is installed first, pinned by version only, because its build (CPU, CUDA) depends on the machine; pip shows its
# progress, since it is several GB with CUDA. Everything else is pinned by hash. --no-deps: the locks are complete, so no
# other package may be installed.
LOCKS := requirements.lock requirements-dev.lock
$(STAMP): $(LOCKS) requirements-cuda.lock pyproject.toml
	$(PYTHON) -m venv --clear .venv
	$(BIN)/python -m pip install --disable-pip-version-check $$(sed -n 's/^\(torch==[^ ]*\).*/\1/p' requirements-cuda.lock)
	$(BIN)/python -m pip install -q --disable-pip-version-check --no-deps --require-hashes $(addprefix -r ,$(LOCKS))
	$(BIN)/python -m pip install -q --disable-pip-version-check --no-deps --editable .
	touch $@

lock:  ## resolve again; needs uv on PATH or in the environment
	sh .github/lock.sh

clean:  ## removes .venv and caches; runs/ stays
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache .hypothesis *.egg-info

# STORE=s3, gcs or azure: chaos, standstill and damage use an imitation of that store instead of a folder.
chaos: $(STAMP)  ## 100 runs killed at random points, each compared with an undisturbed one; 50 races of two attempts
	OMP_NUM_THREADS=1 $(BIN)/python tests/chaos/full.py --runs $${RUNS:-100} $${STORE:+--store $$STORE}
	OMP_NUM_THREADS=1 $(BIN)/python tests/chaos/race.py --races $${RACES:-50} $${STORE:+--store $$STORE}

# SEED=1 draws other moments; RUNS=200 runs more.
chaos-processes: $(STAMP)  ## runs of 2 and 3 processes, of which one is killed, stopped or hangs: the others end, and the run resumes
	OMP_NUM_THREADS=1 $(BIN)/python tests/chaos/processes.py --runs $${RUNS:-40} --seed $${SEED:-0}

families: $(STAMP)  ## every causal model family of transformers: correct if packed, correct one by one, or refused
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.families.table --jobs $${JOBS:-1}

standstill: $(STAMP)  ## an attempt hangs before each kind of write until the next attempt has published
	OMP_NUM_THREADS=1 $(BIN)/python tests/chaos/standstill.py $${STORE:+--store $$STORE}

servers: $(STAMP)  ## the job against S3 servers that refuse, cut or answer otherwise
	OMP_NUM_THREADS=1 $(BIN)/python tests/chaos/foreign_servers.py

# SEED=1 damages other files; JOBS=8 uses 8 processes.
damage: $(STAMP)  ## damages 500 run folders: the job must give the same result, or refuse with the right exit code
	OMP_NUM_THREADS=1 $(BIN)/python tests/chaos/damage.py --count $${COUNT:-500} --seed $${SEED:-0} $${STORE:+--store $$STORE} --jobs $${JOBS:-1}

hostile: $(STAMP)  ## malicious model folders and chat templates: refused with a message, within limits of time and memory
	OMP_NUM_THREADS=1 $(BIN)/python tests/chaos/hostile.py

# SEED=1 draws others; FIRST=100 COUNT=50 begins with the hundredth.
combinations: $(STAMP)  ## 100 random combinations of settings: refused in time, or trained, killed, resumed and verified
	OMP_NUM_THREADS=1 $(BIN)/python tests/chaos/combinations.py --count $${COUNT:-100} --first $${FIRST:-0} --seed $${SEED:-0}

# FULL=1 scores all of ARC-Easy; UNSLOTH=python is an interpreter that has Unsloth; FAMILY is llama, mistral or qwen2.
# tests/bench/checkouts.py compares whole jobs of several checkouts.
bench: $(STAMP)  ## speed on this CPU, compared with plain scripts that do the same work
	$(BIN)/python tests/bench/cpu.py --json $${JSON:-tests/bench/results/cpu.json} $${FULL:+--full} $${UNSLOTH:+--unsloth $$UNSLOTH} $${FAMILY:+--family $$FAMILY}

# UNSLOTH=python is an interpreter that has Unsloth. All sections: tests/bench/gpu.py. Two GPUs: tests/bench/gpu_processes.py.
bench-gpu: $(STAMP)  ## speed on this machine's GPU, compared with plain TRL, HFLM and Unsloth, in one table
	UNSLOTH=$(UNSLOTH) $(BIN)/python tests/bench/gpu.py --buyers --out tests/bench/results
