"""What holds for every test: none leaves the library's logger in another state than it found."""

import logging
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def _logger_as_it_was() -> Iterator[None]:
    """Commands that are called in the tests' own process set its level."""
    logger = logging.getLogger("megatron_mixtral")
    level, propagates, off = logger.level, logger.propagate, logging.root.manager.disable
    yield
    logger.setLevel(level)
    logger.propagate = propagates
    logging.disable(off)
