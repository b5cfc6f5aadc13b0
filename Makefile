# make quickstart [TEXT=path]   set up .venv, then train a small LLaMA on 4 ranks and use it
# make test [ARGS=...]          set up .venv, then run the test suite (ARGS go to pytest)
# make check                    what to run after every edit: lint of what changed and the quick tests, within a minute
# make lint                     ruff and mypy
# make gpu PY=python3           GPU tests and benchmarks, in GPU_SECONDS (600), results into OUT (benchmarks/README.md)
# make gpu-carry [FOR=3.12]     what they need on a machine without a package index, into .carry/
# make clean                    remove .venv and runs/quickstart
#
# PYTHON=...    the interpreter to build .venv from         VENV=...   where to build it (default .venv)
# PIP_ARGS=...  further options for pip: a mirror, a proxy            JOBS=...   test files that run at a time (default 2)

VENV ?= .venv
JOBS ?= 2
PY := $(VENV)/bin/python
SETUP = p=$$(for c in $(or $(PYTHON),python3.11 python3.12 python3); do \
	  "$$c" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && { echo "$$c"; break; }; \
	done); \
	if [ -z "$$p" ]; then \
	  echo "error: no usable Python: $(or $(PYTHON),python3.11 python3.12 python3) is not 3.11 or newer with the venv module."; \
	  echo "  Debian, Ubuntu:  sudo apt install python3-venv   (or, for one version, python3.11-venv)"; \
	  echo "  without root:    conda create -n py311 python=3.11, or uv python install 3.11, or pyenv install 3.11"; \
	  echo "  then:            make $(MAKECMDGOALS) PYTHON=/path/to/python3.11"; \
	  exit 1; \
	fi; "$$p" tools/setup_env.py "$(VENV)"

.PHONY: help quickstart test check lint gpu gpu-carry clean
help:
	@sed -n '1,/^$$/s/^# \{0,1\}//p' Makefile

quickstart: $(VENV)/.base
	@$(PY) tools/quickstart.py $(if $(TEXT),--text "$(TEXT)") $(ARGS)

test: $(VENV)/.test
	$(PY) -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder $(ARGS)

check: $(VENV)/.test
	@$(PY) -m tests.check

lint: $(VENV)/.test
	$(PY) -m ruff check .
	$(PY) -m mypy megallama tools

gpu:
	$(PY) benchmarks/gpu_session.py --seconds $(or $(GPU_SECONDS),600) $(if $(OUT),--out "$(OUT)")

gpu-carry:
	rm -rf .carry
	$(PY) -m pip install --disable-pip-version-check --target .carry --no-deps --no-compile --only-binary=:all: \
	  --python-version $(or $(FOR),3.12) $(PIP_ARGS) \
	  $$(grep -E '^(pydantic|pydantic_core|annotated-types|typing_extensions|typing-inspection)==' requirements/base.txt)
	git describe --always --dirty --abbrev=12 > .carry/COMMIT

clean:
	[ ! -f "$(VENV)/pyvenv.cfg" ] || rm -rf "$(VENV)"
	rm -rf runs/quickstart build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

$(VENV)/.base: requirements/torch.txt requirements/base.txt pyproject.toml
	@$(SETUP) base -- $(PIP_ARGS)
	@touch $@

$(VENV)/.test: $(VENV)/.base requirements/test.txt
	@$(SETUP) test -- $(PIP_ARGS)
	@touch $@
