# Everything a newcomer or CI types. `make demo` and `make test` set the machine up themselves; run `make help`.
SHELL := /bin/bash
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
VENV := .venv
OLDEST := .venv-oldest
BIN := $(VENV)/bin
ARGS ?=
# Twice as many as there are cores: the tests of whole programs wait as much as they work.
WORKERS ?= $(shell echo $$(( $$(getconf _NPROCESSORS_ONLN 2>/dev/null || echo 2) * 2 )))
PIP := PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_WARN_SCRIPT_LOCATION=1 PIP_ROOT_USER_ACTION=ignore
# Some images set it. Without bytecode each of the hundreds of processes that the tests start compiles the connector anew:
# half of its start. Each Python version keeps files of its own in __pycache__.
unexport PYTHONDONTWRITEBYTECODE

# Prints "version path" of every interpreter that runs, is new enough and can make a virtual environment. Candidates
# are run, not looked up: a pyenv shim can exist and fail, and hide one that works further along PATH.
define PYTHONS
{ PATH="$$PATH:/usr/local/bin:/usr/bin" type -aP python3.14 python3.13 python3.12 python3.11 python3; \
  printf '%s\n' "$$HOME"/.pyenv/versions/*/bin/python3; } 2>/dev/null | while IFS= read -r c; do \
  "$$c" -c 'import sys, ssl, venv, ensurepip; v = sys.version_info; \
assert v >= (3, 11) and sys.implementation.name == "cpython"; \
print("%d.%02d.%02d %s" % (v.major, v.minor, v.micro, sys.executable))' 2>/dev/null </dev/null; \
done | sort -u
endef

# Where no Python suits, root and apt can mend it (Debian 12/13, Ubuntu): python3 may lack ensurepip, or be too old.
define NEED_PYTHON
if [ -z "$$($(PYTHONS))" ]; then \
  if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
    echo "setup: no Python 3.11+ with venv found; installing it with apt-get"; \
    apt-get update -qq; export DEBIAN_FRONTEND=noninteractive; \
    apt-get install -y -qq python3 python3-venv >/dev/null; \
    [ -n "$$($(PYTHONS))" ] || apt-get install -y -qq python3.11 python3.11-venv >/dev/null; \
  fi; \
  [ -n "$$($(PYTHONS))" ] || { \
    echo "setup: needs Python 3.11 or newer with the venv module (Debian: apt-get install python3-venv)" >&2; exit 1; }; \
fi
endef

# $(1) environment, $(2) which end of the sorted list, $(3) lock file, $(4) stamp. Versions and hashes come from the lock.
# An environment without any stamp was interrupted half-way: it is made anew.
define MAKE_VENV
@$(NEED_PYTHON); set -e; \
python=$$($(PYTHONS) | $(2) -n 1 | cut -d' ' -f2-); \
echo "setup: $(1) from $$python ($$("$$python" -c 'import platform; print(platform.python_version())'))"; \
{ ls $(1)/*.stamp && $(1)/bin/python -m pip --version; } >/dev/null 2>&1 || { rm -rf $(1); "$$python" -m venv $(1); }; \
rm -f $(1)/*.stamp; \
$(PIP) $(1)/bin/python -m pip install -q --require-hashes -r $(3); \
$(PIP) $(1)/bin/python -m pip install -q --no-deps --no-build-isolation -e .; \
$(1)/bin/python -m compileall -q connector launcher; \
touch $(1)/$(4)
endef

$(VENV)/run.stamp: pyproject.toml requirements.lock
	$(call MAKE_VENV,$(VENV),tail,requirements.lock,run.stamp)

$(VENV)/dev.stamp: pyproject.toml tests/requirements.lock
	$(call MAKE_VENV,$(VENV),tail,tests/requirements.lock,dev.stamp)
	@touch $(VENV)/run.stamp

$(OLDEST)/dev.stamp: pyproject.toml tests/requirements.lock
	$(call MAKE_VENV,$(OLDEST),head,tests/requirements.lock,dev.stamp)

.PHONY: help
help:  ## List the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 24

.PHONY: setup
setup: $(VENV)/run.stamp  ## Make the virtual environment (.venv) with what a run needs

.PHONY: broker
broker:  # Mosquitto from the distribution where root and apt are there; elsewhere the demo falls back and tests skip loudly
	@if ! PATH="$$PATH:/usr/sbin:/usr/local/sbin:/opt/homebrew/sbin" command -v mosquitto >/dev/null; then \
	  if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	    echo "setup: installing Mosquitto with apt-get"; \
	    printf '#!/bin/sh\nexit 101\n' >/tmp/policy-rc.d.$$$$; \
	    if [ ! -e /usr/sbin/policy-rc.d ]; then install -m 755 /tmp/policy-rc.d.$$$$ /usr/sbin/policy-rc.d; ours=1; fi; \
	    { apt-get install -y -qq --no-install-recommends mosquitto mosquitto-clients >/dev/null 2>&1 || \
	      { apt-get update -qq && apt-get install -y -qq --no-install-recommends mosquitto mosquitto-clients >/dev/null; }; } || \
	      echo "setup: Mosquitto could not be installed; the demo will use the embedded broker"; \
	    [ -z "$$ours" ] || rm -f /usr/sbin/policy-rc.d; rm -f /tmp/policy-rc.d.$$$$; \
	  else \
	    echo "setup: no Mosquitto here and no root with apt to install it"; \
	  fi; \
	fi

.PHONY: inspection
inspection:  # Chromium and tshark for the inspector's tests, which skip loudly without them
	@if ! { command -v chromium && command -v tshark; } >/dev/null; then \
	  if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	    echo "setup: installing Chromium and tshark with apt-get"; export DEBIAN_FRONTEND=noninteractive; \
	    { apt-get install -y -qq --no-install-recommends chromium tshark >/dev/null 2>&1 || \
	      { apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium tshark >/dev/null; }; } || \
	      echo "setup: Chromium or tshark could not be installed; their tests are skipped"; \
	  else \
	    echo "setup: no Chromium or tshark here and no root with apt to install them"; \
	  fi; \
	fi

.PHONY: promtool
promtool:  # reads metrics and alert rules in tests, which skip loudly without it
	@if ! command -v promtool >/dev/null; then \
	  if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	    echo "setup: installing Prometheus with apt-get, for its promtool"; \
	    printf '#!/bin/sh\nexit 101\n' >/tmp/policy-rc.d.$$$$; \
	    if [ ! -e /usr/sbin/policy-rc.d ]; then install -m 755 /tmp/policy-rc.d.$$$$ /usr/sbin/policy-rc.d; ours=1; fi; \
	    { apt-get install -y -qq --no-install-recommends prometheus >/dev/null 2>&1 || \
	      { apt-get update -qq && apt-get install -y -qq --no-install-recommends prometheus >/dev/null; }; } || \
	      echo "setup: Prometheus could not be installed; its tests are skipped"; \
	    [ -z "$$ours" ] || rm -f /usr/sbin/policy-rc.d; rm -f /tmp/policy-rc.d.$$$$; \
	  else \
	    echo "setup: no promtool here and no root with apt to install it; its tests are skipped"; \
	  fi; \
	fi

.PHONY: shells
shells:  # zsh and fish, 2 MB, for the tests of the completion scripts, which skip without them
	@if ! { command -v zsh && command -v fish; } >/dev/null; then \
	  if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	    echo "setup: installing zsh and fish with apt-get"; export DEBIAN_FRONTEND=noninteractive; \
	    { apt-get install -y -qq --no-install-recommends zsh fish >/dev/null 2>&1 || \
	      { apt-get update -qq && apt-get install -y -qq --no-install-recommends zsh fish >/dev/null; }; } || \
	      echo "setup: zsh or fish could not be installed; their tests are skipped"; \
	  else \
	    echo "setup: no zsh or fish here and no root with apt to install it; their tests are skipped"; \
	  fi; \
	fi

.PHONY: demo
demo: $(VENV)/run.stamp broker  ## Broker, dev edge and connector on this machine; ARGS=--once checks and exits
	@$(BIN)/launcher demo $(ARGS)

.PHONY: check
check: lint types imports  ## Everything that reads the code without running it

.PHONY: lint
lint: $(VENV)/dev.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

.PHONY: types
types: $(VENV)/dev.stamp
	$(BIN)/mypy

.PHONY: imports
imports: $(VENV)/dev.stamp
	$(BIN)/lint-imports

.PHONY: format
format: $(VENV)/dev.stamp  ## Rewrite the code in the project's format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

DISTRIBUTION := broker promtool inspection shells

.PHONY: distribution
distribution:  # one after the other: the package manager knows no other way
	@for target in $(DISTRIBUTION); do $(MAKE) --no-print-directory $$target || exit; done

# Both environments, the distribution's programs and the checks side by side: most of the first two is waiting.
.PHONY: test
test:  ## All checks and tests, on the newest and the oldest Python found
	@$(NEED_PYTHON)
	@$(MAKE) --no-print-directory -j4 check $(OLDEST)/dev.stamp distribution
	@$(MAKE) --no-print-directory test-newest
	@$(MAKE) --no-print-directory test-oldest

.PHONY: test-newest
test-newest: $(VENV)/dev.stamp distribution  ## The tests on the newest Python
	$(BIN)/python -m pytest -n $(WORKERS) $(ARGS)

.PHONY: test-oldest
test-oldest: $(OLDEST)/dev.stamp distribution  ## The tests on the oldest Python
	@if [ "$$($(OLDEST)/bin/python -V)" = "$$($(BIN)/python -V)" ]; then \
	  echo "setup: only one suitable Python here; the oldest is the newest"; \
	else \
	  ON_THE_OLDEST=1 $(OLDEST)/bin/python -m pytest -n $(WORKERS) $(ARGS); \
	fi

COMPILED := .venv-compiled
.PHONY: compiled
compiled: $(VENV)/dev.stamp  ## .venv-compiled/bin/connector: the hot path compiled by mypyc (a C compiler, a minute or two)
	$(call MAKE_VENV,$(COMPILED),tail,requirements.lock,run.stamp)
	@$(PIP) $(COMPILED)/bin/python -m pip install -q --no-deps --no-build-isolation --force-reinstall .
	@PYTHONPATH=$(CURDIR)/$$($(BIN)/python -c 'import mypy, os; print(os.path.relpath(os.path.dirname(os.path.dirname(mypy.__file__))))') \
	  $(COMPILED)/bin/python deploy/compile.py \
	  $$($(COMPILED)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')

.PHONY: test-compiled
test-compiled: $(VENV)/dev.stamp broker  ## The tests of what is compiled, on a compiled copy of the sources
	@rm -rf build/compiled && mkdir -p build/compiled && git ls-files -z -co --exclude-standard | xargs -0 cp --parents -t build/compiled
	cd build/compiled && LEVEL=0 ../../$(BIN)/python deploy/compile.py . && \
	  PYTHONPATH=$$PWD ../../$(BIN)/python -m pytest -n $(WORKERS) -p no:cacheprovider tests/wire tests/protocol tests/transport tests/proxy \
	  tests/integration/test_main_job.py tests/integration/test_services.py tests/integration/test_budget.py $(ARGS)

.PHONY: test-containers
test-containers: $(VENV)/dev.stamp  ## The launcher with a real Docker engine, the image, compose (root and apt; skips loudly)
	nice tests/containers/run.sh $(ARGS)

.PHONY: image-reproducible
image-reproducible: $(VENV)/dev.stamp  ## Build the image twice on an engine of its own and compare the layers
	REPRODUCE=1 tests/containers/run.sh -k drop_in

.PHONY: coverage
coverage: $(VENV)/dev.stamp broker  ## The tests with branch coverage; report in htmlcov/
	$(BIN)/coverage erase
	$(BIN)/coverage run -m pytest $(ARGS)
	$(BIN)/coverage combine -q
	$(BIN)/coverage report
	$(BIN)/coverage html -q

.PHONY: bench
bench: $(VENV)/dev.stamp  ## Connectors side by side; CLOUDFLARED=/path adds the original; ARGS=--quick is short
	$(BIN)/python -m benchmarks $(ARGS)

.PHONY: test-browser
test-browser: $(VENV)/dev.stamp broker inspection  ## The inspector's page, clicked through in Chromium (two minutes)
	BROWSER=1 $(BIN)/python -m pytest tests/inspector/test_browser.py tests/inspector/test_devtools.py $(ARGS)

.PHONY: soak-inspect
soak-inspect: $(VENV)/dev.stamp broker inspection  ## 5,000 messages/s for ten minutes with the page open; ARGS='--minutes 2'
	$(BIN)/python tests/inspector/soak.py $(ARGS)

.PHONY: autobahn
autobahn: $(VENV)/dev.stamp  ## WebSockets judged by the Autobahn suite (its Python 2 comes from Debian); ARGS=--all goes on where it stopped
	PYTHON=$(CURDIR)/$(BIN)/python tests/autobahn/setup.sh $(CURDIR)/.autobahn
	AUTOBAHN=$(CURDIR)/.autobahn AUTOBAHN_ALL=$(if $(findstring --all,$(ARGS)),1) \
	  $(BIN)/python -m pytest -rPs tests/integration/test_autobahn.py $(filter-out --all,$(ARGS))

.PHONY: components
components: $(VENV)/dev.stamp  ## cloudflared's component scenarios, all of them; CLOUDFLARED=/path asks the original too
	COMPONENTS=all $(BIN)/python -m pytest tests/conformance $(ARGS)

.PHONY: bodies
bodies: $(VENV)/dev.stamp  ## 1 GB bodies over both transports with flat memory (`make test` has smaller ones)
	SIZE=1024 $(BIN)/python -m pytest --timeout 1800 tests/integration/test_main_job.py -k large_body

.PHONY: fuzz
fuzz: $(VENV)/dev.stamp  ## Long fuzzing of every decoder (minutes; CI runs a bounded smoke of it)
	HYPOTHESIS_PROFILE=long $(BIN)/python -m pytest tests/fuzz $(ARGS)

COMPILE := $(BIN)/uv pip compile -q --universal --python-version 3.11 --generate-hashes --no-emit-index-url --no-header

.PHONY: tshark
tshark:  # Wireshark's decoder from the distribution where root and apt are there; elsewhere its test skips loudly
	@if ! command -v tshark >/dev/null && [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	  echo "setup: installing tshark with apt-get"; export DEBIAN_FRONTEND=noninteractive; \
	  { apt-get install -y -qq --no-install-recommends tshark >/dev/null 2>&1 || \
	    { apt-get update -qq && apt-get install -y -qq --no-install-recommends tshark >/dev/null; }; } || \
	    echo "setup: tshark could not be installed; the test that decrypts with it skips"; \
	fi

.PHONY: faults
faults: $(VENV)/dev.stamp tshark  ## The whole fault matrix (minutes; CI runs a smoke of it): weather, dead edges, namespaces
	FAULTS=1 $(BIN)/python -m pytest -n 2 --dist=worksteal tests/faults $(ARGS)

.PHONY: soak
soak: $(VENV)/dev.stamp  ## 1,000 reconnects over either transport, memory flat
	RECONNECTS=1000 $(BIN)/python -m pytest -s --timeout=3600 tests/soak $(ARGS)

.PHONY: workers
workers: $(VENV)/dev.stamp  ## Everything about --workers, the long test too; then two workers against one (2 cores, idle)
	WORKERS_LONG=1 $(BIN)/python -m pytest tests/app/test_workers.py tests/integration/test_workers.py
	$(BIN)/python -m benchmarks.workers $(ARGS)

.PHONY: transfers
transfers: $(VENV)/dev.stamp  ## 1 GB against a reader of 1 MB/s, both ways, both transports (17 min; TRANSFER_RATE=16 is 1)
	TRANSFER_MB=1000 TRANSFER_RATE=$${TRANSFER_RATE:-1} $(BIN)/python -m pytest -n 4 --dist=load -rP tests/faults/test_transfers.py

.PHONY: lock
lock: $(VENV)/dev.stamp  ## Refresh both lock files (versions and hashes; they name no host)
	$(PIP) $(BIN)/python -m pip install -q uv
	$(COMPILE) --upgrade --extra embedded-broker --extra tui --extra build --extra dev pyproject.toml -o tests/requirements.lock
	$(COMPILE) --constraint tests/requirements.lock --extra embedded-broker --extra build pyproject.toml -o requirements.lock

.PHONY: clean
clean:  ## Remove environments and caches
	rm -rf $(VENV) $(OLDEST) build dist htmlcov .coverage* .pytest_cache .mypy_cache .ruff_cache .hypothesis
