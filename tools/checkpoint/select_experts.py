#!/usr/bin/env python3
"""Keep some experts of a Mixtral, for example 8x7B to 4x7B, as a Hugging Face directory; see docs/weights.md."""

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # works from a clone that is not installed

from megatron_mixtral.errors import MixtralError  # noqa: E402
from megatron_mixtral.weights.convert import convert, open_source  # noqa: E402
from megatron_mixtral.weights.edits.select_experts import SelectedExperts, busiest  # noqa: E402
from megatron_mixtral.weights.formats.hf_sink import HFSink  # noqa: E402


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status 0, or 1 after one message on the standard error."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    parser = argparse.ArgumentParser(description="Keep some experts of every layer of a Mixtral.")
    parser.add_argument("--load-dir", type=Path, required=True, help="Hugging Face or Megatron")
    parser.add_argument("--save-dir", type=Path, required=True, help="Hugging Face")
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--experts", type=int, nargs="+", help="their numbers, the same in every layer")
    which.add_argument("--router-load", type=Path,
                       help="JSON: for each layer the tokens of each expert; or a run's JSON lines with expert_load")
    parser.add_argument("--keep", type=int, default=4, help="with --router-load: how many, the busiest of each layer")
    parser.add_argument("--max-shard-size", default="5GB")
    parser.add_argument("--verify", action="store_true", help="read the result back and compare checksums")
    parser.add_argument("--overwrite", action="store_true")
    args = parser.parse_args(argv)
    try:
        whole = open_source(args.load_dir)
        source = SelectedExperts(whole, args.experts or busiest(args.router_load, args.keep, whole.config))
        sink = HFSink(args.save_dir, source.config, max_shard_size=args.max_shard_size, replace=args.overwrite)
        print(convert(source, sink, verify=args.verify))
    except MixtralError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
