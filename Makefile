# Two commands do all the set-up: `make run` runs the demo, `make test` passes the tests.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/installed

.PHONY: run test check format lock chaos clean

run: $(STAMP)  ## the demo: results in runs/<run id>/
	JOB_PRESET=demo $(BIN)/python -m job

test: $(STAMP)  ## all tests
	$(BIN)/python -m pytest -n 2 -q

check: $(STAMP)  ## lint, format, types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/yamllint --strict -c .github/yamllint.yaml infra

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# torch comes first and by version alone: which build it is (CPU, CUDA) is the machine's choice. Everything else is
# pinned by hash. --no-deps: the lock is complete, nothing may come in beside it.
$(STAMP): requirements.lock pyproject.toml
	$(PYTHON) -m venv --clear .venv
	$(BIN)/python -m pip install -q --disable-pip-version-check "torch==$$(sed -n 's/^# torch==//p' requirements.lock)"
	$(BIN)/python -m pip install -q --disable-pip-version-check --no-deps --require-hashes -r requirements.lock
	$(BIN)/python -m pip install -q --disable-pip-version-check --no-deps --editable .
	touch $@

lock:  ## resolve again; needs uv on PATH or in the environment
	sh .github/lock.sh

clean:
	rm -rf .venv runs .pytest_cache .mypy_cache .ruff_cache .hypothesis *.egg-info

chaos: $(STAMP)  ## 100 runs killed at random points, each compared with an undisturbed one; 50 races of two attempts
	OMP_NUM_THREADS=1 $(BIN)/python tests/chaos/full.py --runs $${RUNS:-100}
	OMP_NUM_THREADS=1 $(BIN)/python tests/chaos/race.py --races $${RACES:-50}
