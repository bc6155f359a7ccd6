# Shortcuts for development. Each target sets up the environment first, as examples/environment.sh does.
SHELL := bash
ENV := source examples/environment.sh &&

.PHONY: help check format lint unit test clean

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

clean:  ## what the quickstart made; the environment stays
	rm -rf work_quickstart .pytest_cache .ruff_cache .hypothesis build
