"""Show and check an indexed dataset: argv to `megatron_mixtral.data.indexed.inspection`. See docs/data.md.

    python tools/inspect_dataset.py encoded/common_crawl_text_document --show 3
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # works from a clone that is not installed

from megatron_mixtral.data.indexed import inspection  # noqa: E402
from megatron_mixtral.errors import ConfigError, MixtralError  # noqa: E402
from megatron_mixtral.tokenizer.tokenizer import load_tokenizer  # noqa: E402


def main(argv: Sequence[str] | None = None) -> int:
    """0 for a dataset that is whole, 1 with sentences for one that is not."""
    parser = argparse.ArgumentParser(prog="inspect_dataset.py", allow_abbrev=False,
                                     description="Show and check an indexed dataset.")  # fmt: skip
    parser.add_argument("prefix", metavar="PREFIX", help="the dataset, with or without .idx")
    parser.add_argument("--show", type=int, default=0, metavar="N", help="decode the beginnings of N sequences")
    parser.add_argument("--tokenizer-model", metavar="PATH", help="default: the one that the report names")
    args = parser.parse_args(argv)
    try:
        path = args.tokenizer_model
        if path is None and args.show and (noted := inspection.tokenizer_of(args.prefix)):
            path = noted["path"]
        if path is None and args.show:
            raise ConfigError("--show needs --tokenizer-model: no report beside the dataset names one.")
        tokenizer = load_tokenizer("HuggingFaceTokenizer", path) if path else None
        if tokenizer:
            inspection.check_tokenizer(args.prefix, tokenizer)
        found = inspection.inspect(args.prefix, tokenizer.vocab_size if tokenizer else None)
        print(found)
        for sample in inspection.samples(args.prefix, tokenizer, args.show) if tokenizer else ():
            print(sample)
    except (MixtralError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 1 if found.problems else 0


if __name__ == "__main__":
    sys.exit(main())
