# Shortcuts for development. Each target sets up the environment first, as examples/environment.sh does.
SHELL := bash
ENV := source examples/environment.sh &&

.PHONY: help check format lint unit test soak faults lock clean

help:  ## this list
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/'

check: lint unit  ## before every commit: lint and unit tests

format:  ## sort imports and apply the linter's safe repairs
	$(ENV) ruff check --fix .

lint:  ## ruff on Python, shellcheck on shell
	$(ENV) ruff check .
	$(ENV) shellcheck -x $$(git ls-files '*.sh') .ci/run

unit:  ## unit tests only
	bash tests/run.sh tests/unit

test:  ## the whole everyday suite
	bash tests/run.sh

faults:  ## plant errors and see the tests fail (FAULTS='words of their names'; minutes)
	$(ENV) python tests/faults/run.py $(FAULTS)

soak:  ## 1,000 requests and 300 malformed ones to a server in ten minutes: nothing leaks
	bash tests/run.sh -m slow -s tests/integration/test_serve_soak.py

# A version in the lock stays as long as it fits pyproject.toml; UPGRADE="--upgrade-package torch", or --upgrade for all.
lock:  ## renew requirements.lock after a change of the dependencies (UPGRADE=... for newer versions)
	$(ENV) PATH="$$PATH:$(CURDIR)/.venv.bootstrap/bin" uv pip compile --quiet --universal --python-version 3.12 \
	    --generate-hashes --annotation-style line --extra dev $(UPGRADE) \
	    --custom-compile-command 'make lock (UPGRADE=... for newer versions); environment.sh installs it' \
	    --output-file requirements.lock pyproject.toml

clean:  ## what the quickstart made; the environment stays
	rm -rf work_quickstart .pytest_cache .ruff_cache .hypothesis build
