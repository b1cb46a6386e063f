# make demo: set up, then verify, train, generate and inspect. make test: set up, then all tests.
# VENV=none runs in the environment at hand, straight from the checkout (a CUDA machine's, say).
VENV ?= .venv
PYTHON ?= python3

ifeq ($(VENV),none)
RUN := $(PYTHON)
READY :=
PARALLEL := $(shell $(PYTHON) -c "import xdist" 2>/dev/null && echo "-n auto")
else
RUN := $(VENV)/bin/python
READY := $(VENV)/ready
PARALLEL := -n auto
endif

.PHONY: demo test gpu gpu-tests readme oracle proof lint clean

demo: $(READY)
	$(RUN) -m gaugeblock.benchmarks.demo

test: $(READY)
	$(RUN) -m pytest $(PARALLEL) -m "not slow and not gpu"

gpu: $(READY)
	$(RUN) -m gaugeblock.benchmarks.gpu $(if $(OUT),--out "$(OUT)")

# every case, dtype, layout and implementation on the GPU: each compiles, so this takes long
gpu-tests: $(READY)
	$(RUN) -m pytest $(PARALLEL) -m gpu tests
	$(RUN) -m pytest tests/test_kernels.py

readme: $(READY)
	$(RUN) -m gaugeblock.benchmarks.readme

# what the oracle sees, blames and costs, for docs/oracle.md; a long run. A kernel that it misses is
# in the tables and does not end the run.
oracle: $(READY)
	-$(RUN) -m tests.bank --cases full --out docs/oracle/mutants.json
	$(RUN) -m tests.bank.measure --seeds 4 --slow-seeds 1 --brief --out docs/oracle/legal.json
	$(RUN) -m examples.peers --out docs/oracle/peers.json
	$(RUN) -m tests.bank.quick --out docs/oracle/quick.json
	$(RUN) -m gaugeblock.benchmarks.readme

# how far the reference is from exact, and what its tests see, for docs/reference.md; minutes
proof: $(READY)
	$(RUN) -m gaugeblock.benchmarks.reference_speed --out docs/reference/speed.json
	$(RUN) -m tests.proof

lint: $(READY)
	$(RUN) -m pip install --quiet --constraint constraints.txt ruff
	$(RUN) -m ruff check . && $(RUN) -m ruff format --check .

$(VENV)/ready: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "gaugeblock needs Python 3.11 or newer, this is " + sys.version.split()[0] + "; pass PYTHON=…")'
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[test]"
	touch $@

clean:
	rm -rf $(VENV) runs build *.egg-info
