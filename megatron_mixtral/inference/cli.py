"""The commands, and the flags that all programs of this room and above it share.

    parser = argparse.ArgumentParser(...)
    model_flags(parser); sampling_flags(parser)
    args = parser.parse_args(argv)
    generator = open_generator(args, "generate", argv)   # starts the ranks first, where this process is none

Whoever serves on top of this room (chat, server) takes its model by the same flags.
"""

import argparse
from collections.abc import Sequence

from megatron_mixtral.inference.generator import Generator
from megatron_mixtral.inference.parameters import SamplingParams


def model_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags that say which model, in which layout and with how large a cache."""


def sampling_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `SamplingParams`."""


def sampling_params(args: argparse.Namespace) -> SamplingParams:
    """What `sampling_flags` were given."""


def open_generator(args: argparse.Namespace, command: str, argv: Sequence[str]) -> Generator:
    """The generator of `model_flags`. Where the layout needs more ranks than this process, it becomes torchrun, which
    starts `megatron-mixtral COMMAND ARGV` as so many ranks, and does not return.
    """


def generate(argv: Sequence[str]) -> int:
    """Continue prompts and print a JSON object for each. Returns 0."""
    return 0
