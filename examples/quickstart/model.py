"""A small random Mixtral in Hugging Face's format, with the real tokenizer: what a download would give, in seconds.

    python examples/quickstart/model.py --output-dir DIR [--seed 1234]

writes config.json, model.safetensors (14 M parameters, the preset `tiny`) and the tokenizer files of Mixtral-8x7B.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
import transformers
from hf_tokenizer import write_hf_tokenizer  # beside this file

from megatron_mixtral.config import preset


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Write a small random Mixtral in Hugging Face's format.")
    parser.add_argument("--output-dir", type=Path, required=True, metavar="DIR")
    parser.add_argument("--seed", type=int, default=1234)
    flags = parser.parse_args(argv)
    config = preset("tiny")
    torch.manual_seed(flags.seed)
    model = transformers.MixtralForCausalLM(transformers.MixtralConfig(**config.to_hf_dict("float32")))
    transformers.logging.disable_progress_bar()
    model.save_pretrained(flags.output_dir)
    write_hf_tokenizer(flags.output_dir)
    print(f"{flags.output_dir}: {config.total_parameters / 1e6:.1f} M parameters, of which a token meets "
          f"{config.active_parameters / 1e6:.1f} M; {config.num_local_experts} experts in each of "
          f"{config.num_hidden_layers} layers, vocabulary {config.vocab_size}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
