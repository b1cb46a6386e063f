# make demo: set up, then verify, train, generate and inspect. make test: set up, then all tests.
# VENV=none runs in the environment at hand, straight from the checkout (a CUDA machine's, say).
VENV ?= .venv
PYTHON ?= python3

ifeq ($(VENV),none)
RUN := $(PYTHON)
READY :=
else
RUN := $(VENV)/bin/python
READY := $(VENV)/ready
endif

.PHONY: demo test slow gpu lint clean

demo: $(READY)
	$(RUN) -m gaugeblock.benchmarks.demo

test: $(READY)
	$(RUN) -m pytest -n auto -m "not slow and not gpu"

slow: $(READY)
	$(RUN) -m pytest -n auto -m "slow and not gpu"

gpu: $(READY)
	$(RUN) -m gaugeblock.benchmarks.gpu

lint: $(READY)
	$(RUN) -m pip install --quiet --constraint constraints.txt ruff
	$(RUN) -m ruff check . && $(RUN) -m ruff format --check .

$(VENV)/ready: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "gaugeblock needs Python 3.11 or newer, this is " + sys.version.split()[0] + "; pass PYTHON=…")'
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[test]"
	touch $@

clean:
	rm -rf $(VENV) runs build *.egg-info
