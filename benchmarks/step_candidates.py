"""The models that `train_step.py` compares, each with its optimizer, behind one small interface."""

import argparse
import os
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any
from unittest.mock import patch

import torch

from megatron_mixtral import runtime
from megatron_mixtral.config import MixtralConfig, ParallelLayout
from megatron_mixtral.model import build, transformer_config

LEARNING_RATE = 1e-4


class NotHere(Exception):
    """A candidate that this machine or layout cannot run, and why."""


def initialize(backend: Any, tp: int, ep: int) -> None:
    """Process groups for one rank, or for those that torchrun started."""
    from megatron.core import parallel_state, tensor_parallel

    if "RANK" in os.environ:
        if backend.device == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        torch.distributed.init_process_group(backend.collectives)
    else:
        store = torch.distributed.FileStore(tempfile.mktemp(), 1)
        torch.distributed.init_process_group(backend.collectives, store=store, rank=0, world_size=1)
    parallel_state.initialize_model_parallel(tp, 1, expert_model_parallel_size=ep)
    tensor_parallel.model_parallel_cuda_manual_seed(1234)


class Candidate:
    """A model with random weights, micro-batches of random tokens, the same for all candidates, and its optimizer."""

    model: torch.nn.Module

    def __init__(self, config: MixtralConfig, args: argparse.Namespace) -> None:
        from megatron_mixtral.runtime import current_device

        self._shape, self._generator = (args.micro_batch, args.sequence + 1), torch.Generator().manual_seed(1)
        self._vocabulary, self._device = config.vocab_size, current_device()
        self.next_batch()
        self.positions = torch.arange(args.sequence, device=self._device)[None].expand(args.micro_batch, -1)

    def next_batch(self) -> None:
        """Other tokens, as in every step of a run: how many go to an expert changes from step to step."""
        ids = torch.randint(self._vocabulary, self._shape, generator=self._generator).to(self._device)
        self.tokens, self.labels = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()

    def loss(self) -> torch.Tensor:
        raise NotImplementedError

    def update(self) -> None:
        raise NotImplementedError

    def zero_grad(self) -> None:
        raise NotImplementedError

    def forward_backward(self) -> None:
        self.loss().backward()

    def step(self) -> None:
        self.zero_grad()
        self.forward_backward()
        self.update()


class Engine(Candidate):
    """A GPTModel in the engine's DDP with its distributed optimizer, in its mixed precision."""

    def __init__(self, model: torch.nn.Module, config: MixtralConfig, args: argparse.Namespace) -> None:
        from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
        from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
        from megatron.core.tensor_parallel import set_defaults_if_not_set_tensor_model_parallel_attributes
        from megatron.core.transformer.module import Float16Module

        super().__init__(config, args)
        model.cuda(torch.cuda.current_device())  # the norms are made on the CPU
        for parameter in model.parameters():
            set_defaults_if_not_set_tensor_model_parallel_attributes(parameter)
        half = model.config.bf16
        ddp = DistributedDataParallelConfig(use_distributed_optimizer=True, grad_reduce_in_fp32=True)
        self.model = DistributedDataParallel(model.config, ddp, Float16Module(model.config, model) if half else model)
        self.optimizer = get_megatron_optimizer(
            OptimizerConfig(optimizer="adam", lr=LEARNING_RATE, clip_grad=1.0, bf16=half,
                            params_dtype=model.config.params_dtype, use_distributed_optimizer=True), [self.model])
        mask = torch.ones(args.sequence, args.sequence, dtype=torch.bool, device=self.tokens.device).triu(1)
        self.mask = mask[None, None] if self.needs_mask else None

    needs_mask = False

    def loss(self) -> torch.Tensor:
        return self.model(self.tokens, self.positions, self.mask, labels=self.labels).float().mean()

    def update(self) -> None:
        self.model.finish_grad_sync()
        self.optimizer.step()

    def zero_grad(self) -> None:
        self.model.zero_grad_buffer()
        self.optimizer.zero_grad()


class Stock(Engine):
    """The engine's own attention reads the causal mask, its own clipping copies."""

    needs_mask = True

    def forward_backward(self) -> None:
        from megatron.core.transformer import attention
        from megatron.core.transformer.moe import token_dispatcher

        with ExitStack() as stack:  # what runtime/gpu has put in the place of the engine's
            for module, name in ((attention, "apply_rotary_pos_emb"), (token_dispatcher, "permute"),
                                 (token_dispatcher, "unpermute"), (token_dispatcher, "sort_chunks_by_idxs")):
                stack.enter_context(patch.object(module, name, getattr(module, name).__wrapped__))
            super().forward_backward()

    def update(self) -> None:
        from megatron.core import utils
        from megatron.core.optimizer import clip_grads

        with patch.object(clip_grads, "multi_tensor_scale_impl", utils.local_multi_tensor_scale), \
                patch.object(clip_grads, "l2_norm_impl", utils.local_multi_tensor_l2_norm):
            super().update()


def _field(text: str) -> tuple[str, Any]:
    name, _, value = text.partition("=")
    words = value.split(",")
    return name, {"true": True, "false": False}.get(value.lower(), int(value) if value.isdigit() else
                                                    words if name.endswith("modules") else value)


def fields_of(args: argparse.Namespace) -> dict[str, Any]:
    """The engine's fields that --engine gives."""
    return dict(_field(text) for text in args.engine)


def ours(config: MixtralConfig, layout: ParallelLayout, args: argparse.Namespace, dtype: torch.dtype,
         implementation: str = "local") -> Candidate:
    engine = transformer_config(config, layout, dtype, transformer_impl=implementation,
                                **{"bias_activation_fusion": True,
                                   "gradient_accumulation_fusion": runtime.ready().device == "cuda", **fields_of(args)})
    return Engine(build(config, engine, max_sequence_length=args.sequence, padded_vocab_size=config.vocab_size),
                  config, args)


def te(config: MixtralConfig, layout: ParallelLayout, args: argparse.Namespace, dtype: torch.dtype) -> Candidate:
    if not runtime.ready().transformer_engine:
        raise NotHere("transformer-engine cannot be imported")
    return ours(config, layout, args, dtype, "transformer_engine")


def stock(config: MixtralConfig, layout: ParallelLayout, args: argparse.Namespace, dtype: torch.dtype) -> Candidate:
    from megatron.core import optimizer
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

    if layout.tp > 1:
        raise NotHere("the engine's local norm refuses sequence parallelism, its MoE layer TP without it")
    engine = transformer_config(config, layout, dtype, moe_grouped_gemm=False, bias_activation_fusion=True)
    spec = get_gpt_layer_local_spec(num_experts=config.num_local_experts, normalization="RMSNorm")
    model = GPTModel(engine, spec, vocab_size=config.vocab_size, max_sequence_length=args.sequence,
                     position_embedding_type="rope", rotary_base=config.rope_theta,
                     share_embeddings_and_output_weights=False)
    with patch.object(optimizer, "Adam", torch.optim.AdamW), patch.object(optimizer, "USING_PYTORCH_OPTIMIZER", True):
        return Stock(model, config, args)


class Transformers(Candidate):
    def __init__(self, config: MixtralConfig, args: argparse.Namespace, dtype: torch.dtype) -> None:
        from transformers import MixtralConfig as Theirs
        from transformers import MixtralForCausalLM

        super().__init__(config, args)
        theirs = Theirs(**{key: value for key, value in config.to_hf_dict().items() if key != "architectures"})
        theirs._attn_implementation = "sdpa"
        with torch.device(self.tokens.device):
            self.model = MixtralForCausalLM(theirs).to(dtype)
        self.model.set_experts_implementation("grouped_mm")
        self.model.train()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=LEARNING_RATE, fused=True)

    def loss(self) -> torch.Tensor:
        logits = self.model(self.tokens, position_ids=self.positions, use_cache=False).logits
        return torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), self.labels.flatten())

    def update(self) -> None:
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()

    def zero_grad(self) -> None:
        self.optimizer.zero_grad()


def transformers(config: MixtralConfig, layout: ParallelLayout, args: argparse.Namespace,
                 dtype: torch.dtype) -> Candidate:
    if layout.world > 1:
        raise NotHere("it is measured on one rank")
    return Transformers(config, args, dtype)


class Autocast(Transformers):
    """fp32 weights, gradients and optimizer state; products in bf16."""

    def __init__(self, config: MixtralConfig, args: argparse.Namespace) -> None:
        super().__init__(config, args, torch.float32)

    def loss(self) -> torch.Tensor:
        with torch.autocast(self.tokens.device.type, torch.bfloat16):
            return super().loss()


def autocast(config: MixtralConfig, layout: ParallelLayout, args: argparse.Namespace, dtype: torch.dtype) -> Candidate:
    if layout.world > 1 or dtype != torch.bfloat16:
        raise NotHere("it is measured on one rank, in bf16")
    return Autocast(config, args)


def with_adapters(name: str) -> Callable[..., Candidate]:
    """A candidate of `step_adapters`, which is imported when it is made."""
    def make(*arguments: Any) -> Candidate:
        import step_adapters

        return getattr(step_adapters, name)(*arguments)

    return make


WHOLE: dict[str, Callable[..., Candidate]] = {"ours": ours, "stock": stock, "transformers": transformers,
                                              "autocast": autocast, "te": te}
MAKERS = WHOLE | {name: with_adapters(name) for name in ("lora", "qlora", "peft")}
OURS = ("ours", "te", "lora", "qlora")
