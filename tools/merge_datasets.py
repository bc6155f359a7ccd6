"""Merge indexed datasets into one: argv to `megatron_mixtral.data.indexed.merge.merge`. See docs/data.md.

    python tools/merge_datasets.py --input encoded/c-*_text_document.idx --output-prefix encoded/c_text_document
"""

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # works from a clone that is not installed

from megatron_mixtral.data.indexed.merge import merge  # noqa: E402
from megatron_mixtral.errors import MixtralError  # noqa: E402


def main(argv: Sequence[str] | None = None) -> int:
    """0 when the merged dataset is written, 1 with a sentence otherwise."""
    parser = argparse.ArgumentParser(prog="merge_datasets.py", allow_abbrev=False,
                                     description="Merge indexed datasets into one.")  # fmt: skip
    parser.add_argument("--input", nargs="+", required=True, metavar="PREFIX", help="datasets, with or without .idx")
    parser.add_argument("--output-prefix", required=True, metavar="PREFIX", help="the new dataset, without an ending")
    parser.add_argument("--order", choices=["natural", "given"], default="natural",
                        help="natural order of the names (default), or as given")  # fmt: skip
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    try:
        report = merge(args.input, args.output_prefix, args.order == "natural")
    except (MixtralError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"wrote {args.output_prefix}: {report['documents']} documents, {report['tokens']} tokens")
    return 0


if __name__ == "__main__":
    sys.exit(main())
