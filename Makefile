# Every target makes what it needs on its first run: a virtual environment .venv-3.x for each version of Python, and in it
# the packages that pyproject.toml names.
PYTHON  ?= python3
FULL    ?=
OLDEST  ?=
ARGS    ?=
JOBS    ?= 2

full     := $(filter-out 0,$(FULL))
config   := configs/mnist_lenet.py$(if $(full),,:quick)
WORKDIR  ?= runs/figure1$(if $(full),-full)

# A pyenv shim fails for a Python that is installed but not selected; the second half then asks pyenv where it is.
python   := $(shell $(PYTHON) -c 'import sys; print(sys.executable)' 2>/dev/null || \
              PATH="$$PATH:$$HOME/.pyenv/bin" PYENV_VERSION=$(PYTHON:python%=%) pyenv which $(PYTHON) 2>/dev/null)
version  := $(if $(python),$(shell $(python) -c 'import sys; print("%d.%d" % sys.version_info[:2])'))
too_old  := $(filter 2.% 3.0 3.1 3.2 3.3 3.4 3.5 3.6 3.7 3.8 3.9 3.10,$(version))
venv     := .venv-$(version)$(if $(OLDEST),-oldest)

.DEFAULT_GOAL := help
.PHONY: help install figure1 table1 test bench

help:  ## this list
	@sed -nE 's/^([a-z0-9]+):.*## (.*)/  make \1\t\2/p' Makefile | expand -t 18
	@echo 'PYTHON=python3.12 chooses another Python, ARGS="..." is handed on to the program.'

install: $(venv)/.installed-mnist  ## the virtual environment alone

figure1: $(venv)/.installed-mnist  ## accuracy against sparsity on MNIST, quick; FULL=1: as in the paper; WORKDIR=runs/figure1
	@$(venv)/bin/python -m experiments.main --config=$(config) --workdir=$(WORKDIR) $(ARGS)

table1: $(venv)/.installed-mnist  ## every algorithm of sparse training on MNIST, with and without Powerpropagation: hours
	@$(venv)/bin/python -m experiments.suite --config=configs/mnist_sparse.py --workdir=runs/mnist_sparse $(ARGS)

# Old packages declare fewer types: the check is of ours against the newest.
test: $(venv)/.installed-test  ## lint, types and the default tests; OLDEST=1: with the oldest packages allowed
	$(venv)/bin/ruff check .
	$(if $(OLDEST),,$(venv)/bin/mypy)
	$(venv)/bin/python -m pytest -n $(JOBS) $(ARGS)

bench: $(venv)/.installed-mnist  ## what RESULTS.md says about speed, measured again
	@$(venv)/bin/python -m benchmarks $(ARGS)

# The file stands for "installed with this extra"; a change of pyproject.toml installs again, and leaves alone what still fits.
$(venv)/.installed-%: pyproject.toml
	$(if $(python),,$(error $(PYTHON) was not found; name one that is there, for example PYTHON=python3.12))
	$(if $(too_old),$(error $(PYTHON) is Python $(version); 3.11 or newer is needed, for example PYTHON=python3.12))
	@echo 'Installing the packages into $(venv): one to two minutes, this once ...'
	@test -x $(venv)/bin/pip || $(python) -m venv $(venv)
	@$(if $(OLDEST),sed -nE 's/^ *"([A-Za-z_-]+)>=([0-9.]+).*/\1==\2/p' pyproject.toml) >$(venv)/constraints.txt
	@$(venv)/bin/python -m pip install -qq --disable-pip-version-check \
	  --constraint $(venv)/constraints.txt --editable '.[$*]'
	@touch $@
