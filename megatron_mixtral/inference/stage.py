"""One packed pass over this rank's stage of the model, through three seams of the engine.

1. `SelfAttention._adjust_key_value_for_inference`, which the engine calls between QKV and attention: here keys and
   queries are rotated to their tokens' own positions, and keys and values go to the cache.
2. The core attention, in whose place stands one that reads the cache.
3. `GPTModel.forward(output_processor=...)`: only the wanted tokens meet the output layer.

The first two are put into the model's own objects for the length of a pass, so that a model in training is as it was
afterwards; nothing of the engine is altered. `tests/unit/inference/test_seams.py` fails when one of the three changes.
The engine's `InferenceMode` stays off: it is of the whole process, and training does not work in it.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from megatron.core.models.common.embeddings.rope_utils import apply_rotary_pos_emb
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer.enums import AttnMaskType

from megatron_mixtral.config import engine
from megatron_mixtral.inference.cache import Cache, Row
from megatron_mixtral.lora import AdaptedModel

if TYPE_CHECKING:
    from megatron_mixtral.model import MixtralModel


class Context:
    """What the engine's layers pass along as `inference_context`: it names the cache, and says that batching is static,
    with which the engine uses no inference code of its own.
    """

    def __init__(self, cache: Cache, max_sequence_length: int) -> None:
        """`max_sequence_length`: for so many positions the engine makes its table of rotations."""
        self.cache, self.max_sequence_length = cache, max_sequence_length

    def is_static_batching(self) -> bool:
        return True

    def is_dynamic_batching(self) -> bool:
        return False

    def is_decode_only(self) -> bool:
        return False


class _CacheAttention(torch.nn.Module):
    """The core attention of one layer during a pass. It is given [t, 1, n, d] and gives [t, 1, n * d]."""

    def __init__(self, cache: Cache, layer: int) -> None:
        super().__init__()
        self.cache, self.layer = cache, layer

    def forward(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args: Any,
                **kwargs: Any) -> torch.Tensor:
        return self.cache.attend(self.layer, query[:, 0])[:, None]


class Stage:
    """This rank's pipeline stage, ready to read tokens. `model` is the engine's, in evaluation mode when it reads."""

    def __init__(self, model: "MixtralModel", cache: Cache, longest_step: int, max_length: int) -> None:
        """`longest_step` is the most tokens that a pass may have."""
        self.model, self.cache, self.config = model, cache, model.config
        self.context = Context(cache, max(longest_step, max_length))
        self.pipeline = model.pg_collection.pp
        self.first, self.last = model.pre_process, model.post_process
        # The experts' communication cuts the tokens of a pass evenly over the tensor-parallel ranks.
        self.multiple = self.config.tensor_model_parallel_size if self.config.sequence_parallel else 1
        self._attention = [_CacheAttention(cache, layer) for layer in range(len(model.decoder.layers))]
        self._wanted: Sequence[int] = ()

    @torch.no_grad()  # not inference_mode: what the engine keeps between calls has to serve training too
    def read(self, rows: Sequence[Row], token_ids: Sequence[int], wanted: Sequence[int],
             adapter: bool = True) -> torch.Tensor | None:
        """Read the rows' tokens, one row behind the other; on the last stage the logits [len(wanted), vocabulary] of
        the tokens at those places, in the model's dtype, on every tensor-parallel rank. All ranks of a pipeline call it
        with the same arguments, and all ranks that share experts call it equally often: without rows, one token of
        padding is read. `adapter` False leaves out adapters that the model has.
        """
        padded = max(-(-len(token_ids) // self.multiple), 1) * self.multiple
        self.cache.begin(rows, padded)
        self._wanted = wanted
        positions = self.cache.positions_t
        tokens = torch.zeros_like(positions)
        tokens[:len(token_ids)] = torch.tensor(token_ids, dtype=tokens.dtype, device=tokens.device)
        if not self.first:
            received = torch.empty(padded // self.multiple, 1, self.config.hidden_size, device=positions.device,
                                   dtype=self.config.pipeline_dtype or self.config.params_dtype)
            torch.distributed.recv(received, group=self.pipeline, group_src=self.pipeline.rank() - 1)
            self.model.set_input_tensor(received)
        with self._opened(), self.model.adapters(adapter) if isinstance(self.model, AdaptedModel) else nullcontext():
            found = self.model(tokens[None], positions[None], None, inference_context=self.context,
                               output_processor=self._logits if self.last else None)
        if self.last:
            return found
        torch.distributed.send(found.contiguous(), group=self.pipeline, group_dst=self.pipeline.rank() + 1)
        return None

    @contextmanager
    def _opened(self) -> Iterator[None]:
        """The layers, with seams 1 and 2 open."""
        layers = [layer.self_attention for layer in self.model.decoder.layers]
        own = [attention.core_attention for attention in layers]
        for attention, core in zip(layers, self._attention, strict=True):
            attention.core_attention = core
            attention._adjust_key_value_for_inference = _Adjust(attention, core)
        try:
            yield
        finally:
            for attention, core in zip(layers, own, strict=True):
                attention.core_attention = core
                del attention._adjust_key_value_for_inference

    def _logits(self, hidden_states: torch.Tensor, output_layer: Any, output_weight: torch.Tensor | None,
                **kwargs: Any) -> torch.Tensor:
        """Seam 3: the output layer for the wanted tokens alone, gathered from its shards, without padded rows."""
        if not self._wanted:
            return hidden_states.new_empty(0, self.model.mixtral.vocab_size)
        if output_layer.sequence_parallel:
            hidden_states = gather_from_sequence_parallel_region(hidden_states, group=self.model.pg_collection.tp)
        wanted = torch.tensor(self._wanted, dtype=torch.int64, device=hidden_states.device)
        gathers = output_layer.sequence_parallel
        output_layer.sequence_parallel = False  # it would gather again
        try:
            logits_w1v, _ = output_layer(hidden_states[wanted], weight=output_weight, runtime_gather_output=True)
        finally:
            output_layer.sequence_parallel = gathers
        # Padded rows of the vocabulary have logits of 0, which may be the highest.
        return logits_w1v[:, 0, :self.model.mixtral.vocab_size]


class _Adjust:
    """Seam 1 of one layer. What it returns is for the engine: no rotation is left to do, nor a block table to read."""

    def __init__(self, attention: Any, core: _CacheAttention) -> None:
        self.attention, self.core = attention, core

    def __call__(self, context: Context, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
                 rotary_pos_emb: tuple[torch.Tensor, torch.Tensor], *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        cache, attention = context.cache, self.attention
        rotations = rotary_pos_emb[0][cache.positions_t]
        # Both in one call: for a few tokens the number of operations is what takes the time.
        both = apply_rotary_pos_emb(torch.cat((query, key), dim=2), rotations, config=attention.config,
                                    cp_group=attention.pg_collection.cp)
        query, key = both.split((query.shape[2], key.shape[2]), dim=2)
        cache.write(self.core.layer, key[:, 0], value[:, 0])
        return query, key, value, None, AttnMaskType.causal, None


def cache_of(model: "MixtralModel", slots: int, length: int) -> Cache:
    """An empty cache for this rank's stage of the model."""
    config, weight = model.config, next(model.parameters())
    scale = config.softmax_scale if config.softmax_scale is not None else config.kv_channels ** -0.5
    return Cache(len(model.decoder.layers), slots, length, config.num_query_groups // config.tensor_model_parallel_size,
                 config.kv_channels, scale=scale, window=engine.sliding_window(config.window_size),
                 dtype=config.params_dtype, device=weight.device)
