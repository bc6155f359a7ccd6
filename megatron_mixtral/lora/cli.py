"""The command merge-lora: adapters into their base, in any form, streamed like every conversion."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_mixtral.command_line import Parser, hush_libraries
from megatron_mixtral.config import TARGET_FLAGS, ParallelLayout
from megatron_mixtral.errors import ConfigError
from megatron_mixtral.weights import convert, open_sink, open_source
from megatron_mixtral.weights.edits import MergedSource


def merge_lora(argv: Sequence[str]) -> int:
    """`tools/checkpoint/merge_lora.py`."""
    parser = Parser(description="Merge adapters into the model that they were trained on.")
    parser.add_argument("--load-dir", type=Path, required=True, help="the base: Hugging Face or Megatron, any layout")
    parser.add_argument("--adapter", type=Path, required=True, help="a PEFT folder, or a checkpoint of adapters")
    parser.add_argument("--save-dir", type=Path, required=True)
    parser.add_argument("--into", choices=["original", "rounded"], default="original",
                        help="the base as it is stored, or rounded to 4 bits as a --qlora run computed with it")
    parser.add_argument("--save-model-type", choices=["huggingface", "torch", "torch_dist"], default="huggingface",
                        help="Hugging Face, rank directories, or a distributed checkpoint")
    for axis in ("tp", "pp", "ep", "etp", "vpp", "first", "last"):
        parser.add_argument(TARGET_FLAGS[axis], type=int, dest=axis, help=argparse.SUPPRESS if axis in (
            "vpp", "first", "last") else "of Megatron's forms (default: 1)")
    parser.add_argument("--params-dtype", help="cast; default: the base's types")
    parser.add_argument("--max-shard-size", default="5GB", help="of a safetensors file")
    parser.add_argument("--jobs", type=int, help="threads that write; default: one for each core")
    parser.add_argument("--verify", action="store_true", help="read the result back and compare checksums")
    parser.add_argument("--overwrite", action="store_true")
    parser.add_argument("--compare-logits", type=int, metavar="TOKENS", default=0,
                        help="load the result, and the base with the adapters beside it, and print how far their "
                             "logits are apart on so many random tokens (takes the memory of a model)")
    args = parser.parse_args(argv)
    base = open_source(args.load_dir, holds="model")
    adapter = open_source(args.adapter, base=base.config, holds="adapters")
    sizes = {axis: value for axis in TARGET_FLAGS if (value := getattr(args, axis, None)) is not None}
    if sizes and args.save_model_type == "huggingface":
        raise ConfigError(f"{', '.join(TARGET_FLAGS[axis] for axis in sizes)} name a layout, which a Hugging Face "
                          "folder has not: give --save-model-type torch or torch_dist")
    source = MergedSource(base, adapter, rounded=args.into == "rounded", dtype=args.params_dtype)
    template = args.load_dir if (args.load_dir / "config.json").is_file() else None
    sink = open_sink(args.save_dir, args.save_model_type, ParallelLayout(**sizes), replace=args.overwrite,
                     template=template, max_shard_size=args.max_shard_size)
    print(convert(source, sink, dtype=args.params_dtype, jobs=args.jobs, verify=args.verify))
    if adapter.config.quantized and args.into == "original":
        print("the adapters were trained beside a base rounded to 4 bits; this is the base as it is stored, and so the "
              "logits differ (--compare-logits says how far; --into rounded merges into what the run computed with)")
    if args.compare_logits:
        hush_libraries()
        print(logits_gap(args.load_dir, args.adapter, args.save_dir, args.compare_logits))
    return 0


def logits_gap(base: Path, adapter: Path, merged: Path, tokens: int) -> str:
    """How far the logits of a merged model are from those of the base with adapters beside it, in float32."""
    import torch

    from megatron_mixtral.lora.pretrained import from_pretrained
    from megatron_mixtral.model import from_pretrained as plain

    found: list[Any] = []
    for model in (from_pretrained(base, adapter, dtype=torch.float32), plain(merged, dtype=torch.float32)):
        size = model.mixtral.vocab_size
        ids = torch.randint(size, (1, tokens), generator=torch.Generator().manual_seed(0))
        place = next(model.parameters()).device
        with torch.no_grad():
            logits = model(ids.to(place), torch.arange(tokens, device=place)[None], None)
        found.append(logits[..., :size].float().cpu())
    trained, now = found
    gap = now - trained
    return (f"logits of {tokens} random tokens: the merged model's differ from those of base and adapters, as trained, "
            f"by {float(gap.abs().max()):.2e} at most and {float(gap.square().mean().sqrt()):.2e} in the mean (root of "
            f"squares); they are {float(trained.square().mean().sqrt()):.2e} themselves")
