# Everything runs from .venv, which `make install` fills from requirements.lock.
# Another interpreter: make clean, then make install PYTHON=python3.12

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
UV_VERSION := 0.13.9
JOBS ?= 2

# The versions that requirements.lock has wheels for.
PYTHON_VERSIONS := 3.11 3.12 3.13 3.14
define MAKE_VENV
{ \
	found=$$($(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])') || \
		found=none; \
	case " $(PYTHON_VERSIONS) " in *" $$found "*) ;; *) \
		echo "attn_jax needs Python $(PYTHON_VERSIONS); '$(PYTHON)' is: $$found." \
			"Name one: make $(or $(MAKECMDGOALS),install) PYTHON=python3.12" >&2; \
		exit 1 ;; esac; \
	$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
		echo "'$(PYTHON)' cannot make a virtual environment with pip." \
			"On Debian or Ubuntu: apt install python$$found-venv" >&2; \
		exit 1; }; \
	echo "$(PYTHON) -m venv $(VENV)"; \
	$(PYTHON) -m venv --clear $(VENV); \
}
endef

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help install data run test test-slow test-newest check lint typecheck bench figures docs lock clean

help: ## Show this list
	@echo "attn_jax: make <target>"
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-12s %s\n", $$1, $$2 }' \
		$(firstword $(MAKEFILE_LIST))

install: $(INSTALLED) ## Make .venv with the locked versions and attn_jax, editable

# An environment that works is kept: making it anew over another interpreter's
# would break it.
$(INSTALLED): requirements.lock setup.cfg pyproject.toml
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(MAKE_VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check \
		--require-hashes -r requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check \
		--no-deps --no-build-isolation --editable .
	@touch $@

data: install ## Fetch recorded speech once, check it, say where it came from
	$(BIN)/python -m experiments.data --allow-fallback festvox_ru

run: install ## Where self-attention overtakes, quick preset: table and figure
	$(BIN)/python -m experiments.data_scaling --preset quick

test: install ## Run the tests and the examples in docstrings (ARGS: pytest's)
	$(BIN)/python -m pytest -m "not slow" $(ARGS)

test-slow: install ## Run the few that take a quarter of a minute and more
	$(BIN)/python -m pytest -m slow $(ARGS)

test-newest: ## The same on the newest JAX: in a Debian of its own, or NEWEST_PYTHON
	.ci/newest make install test ARGS='$(ARGS)'

check: install ## Try every claim of every built-in variant
	$(BIN)/python -m attn_jax check --all --jobs $(JOBS)

lint: install ## Check style and likely bugs (ruff)
	$(BIN)/python -m ruff check .

typecheck: install ## Check types (mypy)
	$(BIN)/python -m mypy

bench: install ## Install the peers and measure side by side with them
	$(BIN)/python -m pip install --quiet --disable-pip-version-check \
		--no-build-isolation --editable '.[bench]'
	$(BIN)/python -m benchmarks

figures: install ## Redraw reports and figures of all committed results
	$(BIN)/python -m experiments --redraw

docs: install ## Make the site, its code run, into docs/_build/html: no network
	$(BIN)/python docs/_ext/site_pages.py docs/_build/pages docs/_build/extra
	$(BIN)/python -m sphinx --quiet --fail-on-warning --keep-going \
		-c docs -d docs/_build/doctrees docs/_build/pages docs/_build/html
	@echo "Open docs/_build/html/index.html"

lock: install ## Resolve requirements.lock anew (UPGRADE=1: to the newest in range)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check \
		uv==$(UV_VERSION)
	$(BIN)/python -m uv pip compile setup.cfg --extra experiments --extra ode --extra cluster --extra docs --extra dev \
		--universal --python-version 3.11 --fork-strategy requires-python \
		--generate-hashes $(if $(UPGRADE),--upgrade) --quiet \
		--custom-compile-command 'make lock' --output-file requirements.lock

clean: ## Remove .venv and every cache and build output; data and results stay
	rm -rf $(VENV) build dist docs/_build *.egg-info .pytest_cache .mypy_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
