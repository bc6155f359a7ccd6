"""A training program on the engine alone: its own model, flags, load and save, and none of this library's repairs.

Run by `helpers.program.Running`. Only the stand-in for CUDA is active where no GPU is visible, and the compilation
of dataset helpers, which the wheel has compiled already, is skipped. Every sample is made of its index. After the run
`rank{N}.pt` of a last stage holds (iteration, tokens [S + 1], losses of each token [S]) of every micro-batch.

Flags of its own: --metrics-file, beside which these files are written, and --house-norm for the engine's GPTModel with
this library's norm, since the engine's own norm refuses tensor parallelism.
"""

import os
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from helpers.ranks import undo_ready

VOCABULARY, SEQUENCE = 96, 32


def sample(index: int) -> torch.Tensor:
    """The tokens [S + 1] of a sample."""
    return torch.randint(VOCABULARY, (SEQUENCE + 1,), generator=torch.Generator().manual_seed(index))


class Samples(torch.utils.data.Dataset):
    """As many samples as asked for."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"row": sample(index)}


def datasets(counts: Any, vp_stage: int | None = None) -> tuple[Samples, None, None]:
    """The engine's datasets provider."""
    return Samples(counts[0]), None, None


datasets.is_distributed = True


def forward_step(seen: list[Any], iterator: Any, model: Any) -> tuple[Any, Any]:
    """One micro-batch; a last stage notes its losses."""
    from megatron.core.utils import get_attr_wrapped_model
    from megatron.training import get_args

    row = next(iterator)["row"]
    tokens, labels = row[:, :-1].contiguous(), row[:, 1:].contiguous()
    output = model(tokens, torch.arange(tokens.shape[1])[None], None, labels=labels)
    if get_attr_wrapped_model(model, "post_process"):
        seen.append((get_args().curr_iteration, row[0], output[0].detach().clone()))

    def mean(losses: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        loss = losses.float().mean()
        return loss, {"lm loss": loss.detach()}

    return output, mean


def house_model(args: Any, pre_process: bool = True, post_process: bool = True, vp_stage: int | None = None,
                config: Any = None, pg_collection: Any = None) -> Any:
    """The engine's model provider: its local layers with the norm of this library."""
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_submodules
    from megatron.core.transformer.spec_utils import ModuleSpec
    from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
    from megatron.core.transformer.transformer_layer import TransformerLayer
    from megatron.training.argument_utils import core_transformer_config_from_args

    from megatron_mixtral.model.norm import RMSNorm

    config = config or core_transformer_config_from_args(args)
    parts = get_gpt_layer_local_submodules(num_experts=config.num_moe_experts, normalization="RMSNorm")
    layer = ModuleSpec(TransformerLayer, submodules=replace(parts, input_layernorm=RMSNorm, pre_mlp_layernorm=RMSNorm))
    spec = TransformerBlockSubmodules([layer] * get_num_layers_to_build(config, vp_stage), layer_norm=RMSNorm)
    return GPTModel(config=config, transformer_layer_spec=spec, pre_process=pre_process,
                    vocab_size=args.padded_vocab_size, max_sequence_length=args.max_position_embeddings,
                    post_process=post_process, position_embedding_type="rope", rotary_base=args.rotary_base,
                    share_embeddings_and_output_weights=not args.untie_embeddings_and_output_weights,
                    pg_collection=pg_collection, vp_stage=vp_stage)


def stand_in() -> None:
    """Take back what the server of `ranks.py` made ready, then enable the stand-in for CUDA and nothing else."""
    from megatron.core.datasets import utils

    from megatron_mixtral.runtime import cpu
    from megatron_mixtral.runtime.engine_fixes import FIXES
    from megatron_mixtral.runtime.replacements import Replacements

    undo_ready()
    assert all(fix.needed() for fix in FIXES), "a repair is still active"
    replacements = Replacements()
    cpu.enable(replacements)
    cpu.enable_training(replacements)
    os.environ["CUDA_DEVICE_MAX_CONNECTIONS"] = "1"
    replacements.set(utils, "compile_helpers", lambda: None)


def main(argv: list[str]) -> int:
    """Train as the engine's flags say."""
    stand_in()
    from megatron.core.enums import ModelType
    from megatron.training import pretrain
    from megatron.training.argument_utils import gpt_config_from_args, pretrain_cfg_container_from_args
    from megatron.training.arguments import parse_and_validate_args

    def extra(parser: Any) -> Any:
        parser.add_argument("--metrics-file", type=Path, required=True)
        parser.add_argument("--house-norm", action="store_true")
        return parser

    sys.argv = ["stock", *argv]
    args = parse_and_validate_args(extra)
    seen: list[Any] = []
    own = {"model_provider": partial(house_model, args)} if args.house_norm else {}
    container = pretrain_cfg_container_from_args(args, None if args.house_norm else gpt_config_from_args(args))
    pretrain(container, datasets, ModelType.encoder_or_decoder, partial(forward_step, seen), **own)
    if seen:
        torch.save(seen, args.metrics_file.parent / f"rank{args.rank}.pt")
    return 0
