# Every target works on a fresh clone; .venv/ is made and kept up to date by tools/setup_env.py.
PYTHON ?= python3
VENV := .venv/bin/python
JOBS ?= 2
# The tests run in JOBS processes, one thread each, so that results do not depend on the cores. Those
# of a file stay together: what one of them compiled or started, the others find.
test fault gpu ray: export OMP_NUM_THREADS = 1

RAY_PYTHON := .venv-ray/bin/python

.PHONY: setup lock lint check test fault gpu ray bench demo wheel clean

setup:  ## make or update .venv (asks nothing, does nothing if it is up to date)
	@$(PYTHON) tools/setup_env.py

lock: setup  ## rewrite requirements.lock from what .venv holds
	$(VENV) tools/write_lock.py

lint: setup
	$(VENV) -m ruff check .
	$(VENV) -m ruff format --check .

check: lint  ## lint, format, types
	$(VENV) tools/check_types.py

test: lint  ## everything that must pass before a merge; types are checked beside the tests
	@$(VENV) tools/check_types.py & types=$$!; \
	$(VENV) -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder; tests=$$?; \
	wait $$types && exit $$tests

fault: setup  ## what happens when disks fill, lie or hang
	$(VENV) -m pytest tests/fault

gpu: setup  ## the tests that need a CUDA device
	$(VENV) -m pytest -m gpu

ray: setup  ## the tests that need Ray Serve, in an environment of their own
	$(VENV) tools/ray_env.py
	OFFLOAD_TEST_RAY=$(CURDIR)/$(RAY_PYTHON) $(VENV) -m pytest -rP tests/integration/test_ray.py

bench: setup  ## every benchmark at its quick size; results go to benchmarks/results/
	@set -e; for name in $(basename $(notdir $(wildcard benchmarks/*.py))); do \
		echo "benchmarks.$$name"; $(VENV) -m benchmarks.$$name; done

demo: setup  ## answer questions about a long document with a cache that does not fit
	$(VENV) -m offload.cli demo

wheel: setup  ## build, install into a clean environment, look at what a user gets
	$(VENV) tools/check_wheel.py

clean:
	rm -rf .venv .venv-ray build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
