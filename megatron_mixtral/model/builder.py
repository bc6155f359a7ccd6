"""From a `MixtralConfig` to the engine's `GPTModel`.

What a Mixtral is in the engine's terms stands in `config/engine.py`; here it becomes a `TransformerConfig` and a model,
and a configuration that the engine made of a run's flags is compared with it.
"""

import dataclasses
from functools import partial
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import scatter_to_sequence_parallel_region
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_mixtral.config import MixtralConfig, ParallelLayout
from megatron_mixtral.config import engine as engine_table
from megatron_mixtral.errors import CheckpointError, ConfigError
from megatron_mixtral.model.cpu import WordEmbedding
from megatron_mixtral.model.cross_entropy import chunked_loss
from megatron_mixtral.model.router import LayerPool, MicroBatch
from megatron_mixtral.model.spec import Parts, block_spec


def architecture(config: MixtralConfig) -> dict[str, Any]:
    """`TransformerConfig` fields that the architecture fixes."""
    return {**engine_table.transformer_fields(config), "activation_func": torch.nn.functional.silu}


def transformer_config(config: MixtralConfig, layout: ParallelLayout, dtype: torch.dtype = torch.float32,
                       transformer_impl: str = "local", **overrides: Any) -> TransformerConfig:
    """An engine configuration for use without `megatron.training`'s flags (generation, evaluation, tests).

    `overrides` are further `TransformerConfig` fields, e.g. `moe_aux_loss_coeff` (default 0 here).
    """
    return TransformerConfig(**{
        **architecture(config),
        "init_method_std": config.initializer_range,
        "tensor_model_parallel_size": layout.tp,
        "pipeline_model_parallel_size": layout.pp,
        "virtual_pipeline_model_parallel_size": layout.vpp if layout.vpp > 1 else None,
        "expert_model_parallel_size": layout.ep,
        "expert_tensor_parallel_size": layout.etp,
        "context_parallel_size": layout.cp,
        # Interleaved stages: with pp 2 both neighbours are one rank, and batched sends would be paired with the wrong
        # receives (megatron.training asserts this; here nothing else would).
        "overlap_p2p_comm": layout.vpp > 1,
        "batch_p2p_comm": layout.vpp == 1,
        "sequence_parallel": layout.tp > 1,
        "num_layers_in_first_pipeline_stage": layout.first,
        "num_layers_in_last_pipeline_stage": layout.last,
        "params_dtype": dtype,
        "pipeline_dtype": dtype,
        "bf16": dtype == torch.bfloat16,
        "fp16": dtype == torch.float16,
        "transformer_impl": transformer_impl,
        "moe_grouped_gemm": True,
        "moe_token_dispatcher_type": "alltoall",
        "moe_router_load_balancing_type": "aux_loss",
        "moe_aux_loss_coeff": 0.0,
        "moe_router_dtype": "fp32",
        "bias_activation_fusion": False,
        "masked_softmax_fusion": False,
        "persist_layer_norm": False,
        "gradient_accumulation_fusion": False,
        "apply_rope_fusion": False,
        **overrides,
    })


def check_config(config: MixtralConfig, engine: TransformerConfig) -> None:
    """`ConfigError` where an engine configuration would compute another model than `config`."""
    for name, expected in architecture(config).items():
        found = getattr(engine, name)
        if engine_table.differs(name, found, expected):
            raise ConfigError(f"the engine's {name} is {found!r}, the Mixtral's is {expected!r}: "
                              f"remove the flag that sets it, or load the checkpoint that has it")


class MixtralModel(GPTModel):
    """The engine's GPTModel, which keeps its `MixtralConfig` and refuses a state dict that does not fit it exactly."""

    mixtral: MixtralConfig
    micro_batch: MicroBatch

    def forward(self, *args: Any, loss_mask: torch.Tensor | None = None, padding_mask: torch.Tensor | None = None,
                **kwargs: Any) -> torch.Tensor:
        """As GPTModel's. `loss_mask` [batch, sequence] is 1.0 where a token is trained on, `padding_mask` [batch,
        sequence] is True where it is none; give both to every pipeline stage, or to none. With `labels` [batch,
        sequence] the loss is made in chunks of tokens; `--cross-entropy-loss-fusion` takes the engine's instead.
        """
        self._begin(kwargs, loss_mask)
        if padding_mask is not None and not self.pre_process:
            padding_mask = self._own_part(padding_mask)  # the engine does this in the first stage only
        return super().forward(*args, loss_mask=loss_mask, padding_mask=padding_mask, **kwargs)

    def build_schedule_plan(self, *args: Any, loss_mask: torch.Tensor | None = None,
                            padding_mask: torch.Tensor | None = None, **kwargs: Any) -> Any:
        """What `forward` does, as pieces that the engine runs between those of another micro-batch's backward pass
        (`--overlap-moe-expert-parallel-comm`). Of each model chunk one micro-batch is in its forward pass at a time.
        """
        self._begin(kwargs, loss_mask)
        if padding_mask is not None:  # the engine's pieces do not hand it to the routers
            self.micro_batch.padding_mask = self._own_part(padding_mask).t()
        return super().build_schedule_plan(*args, loss_mask=loss_mask, **kwargs)

    def _begin(self, kwargs: dict[str, Any], loss_mask: torch.Tensor | None) -> None:
        """Choose the loss, and note what the routers must know of the micro-batch."""
        if kwargs.get("labels") is not None and not self.config.cross_entropy_loss_fusion:
            kwargs.setdefault("output_processor", chunked_loss)
        self.micro_batch.padding_mask = self.micro_batch.trained_tokens = None
        if loss_mask is not None and self.config.calculate_per_token_loss:
            self.micro_batch.trained_tokens = loss_mask.sum()
            if self.config.context_parallel_size > 1:
                torch.distributed.all_reduce(self.micro_batch.trained_tokens, group=self.pg_collection.cp)

    def _own_part(self, padding_mask: torch.Tensor) -> torch.Tensor:
        """This rank's part of the sequence, of a mask [batch, sequence], under sequence parallelism."""
        if not self.config.sequence_parallel:
            return padding_mask
        parts = scatter_to_sequence_parallel_region(padding_mask.t().contiguous(), group=self.pg_collection.tp)
        return parts.t().contiguous()

    def load_state_dict(self, state_dict: dict[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load; every parameter must be there and nothing may be left over, whatever `strict` says.

        The engine answers a failed strict load with `strict=False` and goes on with a half-loaded model.
        `_extra_state` entries (transformer-engine's FP8 scales, None elsewhere) may be missing or left over.
        """
        result = super().load_state_dict(state_dict, strict=False, assign=assign)
        missing = [key for key in result.missing_keys if "_extra_state" not in key]
        unexpected = [key for key in result.unexpected_keys if "_extra_state" not in key]
        if missing or unexpected:
            raise CheckpointError(
                f"the checkpoint does not fit this model stage: {len(missing)} tensors missing {missing[:3]}, "
                f"{len(unexpected)} left over {unexpected[:3]}; was it converted for another layout or another model?")
        return result


def build(config: MixtralConfig, engine: TransformerConfig, *, max_sequence_length: int, padded_vocab_size: int,
          pg_collection: ProcessGroupCollection | None = None, pre_process: bool = True, post_process: bool = True,
          vp_stage: int | None = None, parallel_output: bool = True, pool_aux_loss: bool = False,
          parts: Parts = Parts(), kind: type[MixtralModel] = MixtralModel) -> MixtralModel:  # noqa: B008 - it is frozen
    """One pipeline stage (model chunk with `vp_stage`) of a Mixtral on this rank; the engine is initialised before.

    `padded_vocab_size` is a multiple of the tensor-parallel size. `pool_aux_loss` makes the balancing loss Hugging
    Face's. `parts` and `kind` are those of a network with adapters (`lora.adapted`).
    Raises `ConfigError` where `engine` contradicts `config`, or cannot pool, or where nothing is initialised.
    """
    if pg_collection is None and not parallel_state.model_parallel_is_initialized():
        raise ConfigError("the engine has no process groups yet: call megatron_mixtral.model.initialize(layout) before "
                          "build(), or from_pretrained(directory, layout), which does both")
    check_config(config, engine)
    micro_batch = MicroBatch()
    pool = _pool(config, engine) if pool_aux_loss else None
    pg_collection = pg_collection or ProcessGroupCollection.use_mpu_process_groups()
    pp_rank = torch.distributed.get_rank(pg_collection.pp)
    router = partial(parts.router, micro_batch=micro_batch, pool=pool)
    model = kind(
        config=engine,
        transformer_layer_spec=block_spec(engine, dataclasses.replace(parts, router=router), vp_stage, pp_rank),
        vocab_size=padded_vocab_size,
        max_sequence_length=max_sequence_length,
        pre_process=pre_process,
        post_process=post_process,
        parallel_output=parallel_output,
        share_embeddings_and_output_weights=config.tie_word_embeddings,
        position_embedding_type="rope",
        rotary_base=config.rope_theta,
        pg_collection=pg_collection,
        vp_stage=vp_stage,
    )
    model.mixtral, model.micro_batch = config, micro_batch
    if pre_process:
        WordEmbedding.take_over(model.embedding.word_embeddings, shared=config.tie_word_embeddings)
    return model


def _pool(config: MixtralConfig, engine: TransformerConfig) -> LayerPool:
    """`ConfigError` where the layers of a micro-batch have not all run before its first backward begins."""
    if engine.pipeline_model_parallel_size > 1 or engine.overlap_moe_expert_parallel_comm:
        raise ConfigError("a balancing loss pooled over all layers needs all of them on one rank, one micro-batch at a "
                          f"time: found pipeline parallel {engine.pipeline_model_parallel_size}, overlap of experts' "
                          f"communication {engine.overlap_moe_expert_parallel_comm}; use the other convention, "
                          "--moe-aux-loss-convention megatron")
    if engine.moe_router_load_balancing_type != "aux_loss":
        raise ConfigError("--moe-aux-loss-convention hf is a form of --moe-router-load-balancing-type aux_loss, found "
                          f"{engine.moe_router_load_balancing_type}; drop one of the two flags")
    return LayerPool(config.num_hidden_layers, config.num_local_experts, config.num_experts_per_tok)
