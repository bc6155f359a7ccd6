#!/usr/bin/env python3
"""Make a Mixtral out of a dense Mistral or Llama: its MLP is every expert, the router is new; see docs/weights.md."""

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # works from a clone that is not installed

from megatron_mixtral.errors import MixtralError  # noqa: E402
from megatron_mixtral.weights.convert import convert  # noqa: E402
from megatron_mixtral.weights.edits.upcycle import UpcycledSource  # noqa: E402
from megatron_mixtral.weights.formats.hf_sink import HFSink  # noqa: E402


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status 0, or 1 after one message on the standard error."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    parser = argparse.ArgumentParser(description="Make a Mixtral out of a dense Mistral or Llama.")
    parser.add_argument("--load-dir", type=Path, required=True, help="Hugging Face directory of the dense model")
    parser.add_argument("--save-dir", type=Path, required=True, help="Hugging Face directory of the Mixtral")
    parser.add_argument("--num-experts", type=int, default=8)
    parser.add_argument("--moe-router-topk", type=int, default=2, help="experts that a token meets")
    parser.add_argument("--router-std", type=float, default=0.02, help="standard deviation of the new router")
    parser.add_argument("--expert-noise", type=float, default=0.0,
                        help="noise of each expert, as a share of its matrices' root mean square; 0: exact copies")
    parser.add_argument("--seed", type=int, default=1234, help="of the router and of the noise")
    parser.add_argument("--max-shard-size", default="5GB")
    parser.add_argument("--verify", action="store_true", help="read the result back and compare checksums")
    parser.add_argument("--overwrite", action="store_true")
    args = parser.parse_args(argv)
    try:
        source = UpcycledSource(args.load_dir, args.num_experts, args.moe_router_topk, seed=args.seed,
                                router_std=args.router_std, expert_noise=args.expert_noise)
        sink = HFSink(args.save_dir, source.config, max_shard_size=args.max_shard_size, replace=args.overwrite)
        print(convert(source, sink, verify=args.verify))
    except MixtralError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
