"""The layers of a model that a CPU has whole, read without gradients: the same numbers in far fewer operations.

The engine's modules are made for training on many ranks. Of a pass over a few tokens, as generation makes them, a
quarter of the time or more would go to what one rank does not need: dispatch of tokens to other ranks, autograd's
bookkeeping, views and checks. Here stands the network alone, on the engine's own parameters, which are looked up at
every pass: a model in training may be read between its steps. The engine's modules stay the way of every other layout,
of adapters and of GPUs. `inference/stage.py` chooses.

Shape suffixes: t tokens, h hidden, n query heads, g query groups, d head, e experts, k of them for each token, r rows
of experts (t times k).
"""

from collections.abc import Callable

import torch
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor
from torch.nn.functional import linear, rms_norm

from megatron_mixtral.config import engine
from megatron_mixtral.model.builder import MixtralModel
from megatron_mixtral.model.cpu import linear_of_few
from megatron_mixtral.model.experts import GroupedExperts
from megatron_mixtral.model.norm import RMSNorm
from megatron_mixtral.model.router import MixtralRouter

Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]  # layer, rotated q [t, n, d], k and v [t, g, d] -> [t, n * d]

_PARTS = {"": TransformerLayer, "input_layernorm": RMSNorm, "self_attention": SelfAttention,
          "self_attention.linear_qkv": ColumnParallelLinear, "self_attention.linear_proj": RowParallelLinear,
          "pre_mlp_layernorm": RMSNorm, "mlp": MoELayer, "mlp.router": MixtralRouter, "mlp.experts": GroupedExperts}
# Settings of a run that change what its layers compute, also where nothing is learned. Those of another model than a
# Mixtral are refused before (config/engine.py).
_UNCHANGED = {"tensor_model_parallel_size": 1, "expert_model_parallel_size": 1, "expert_tensor_parallel_size": 1,
              "context_parallel_size": 1, "moe_expert_capacity_factor": None, "moe_input_jitter_eps": None,
              "moe_router_force_load_balancing": False, "moe_router_force_biased": None,
              "moe_router_load_balancing_type": "aux_loss", "fp32_residual_connection": False, "fp8": None,
              "fp4": None}
_FEW = 16  # tokens
_ROUTER_DTYPES = {"fp32": torch.float32, "fp64": torch.float64}


class PlainLayers:
    """The embedding and layers of one pipeline stage, in evaluation mode."""

    @classmethod
    def fit(cls, model: MixtralModel) -> bool:
        """Whether this is the way to read `model`: on a CPU, with every part whole on this rank and none replaced."""
        config = model.config
        return (type(model) is MixtralModel and next(model.parameters()).device.type == "cpu"
                and all(type(layer.get_submodule(name)) is kind for layer in model.decoder.layers
                        for name, kind in _PARTS.items())
                and not any(layer.mlp.experts.activation_recompute for layer in model.decoder.layers)
                and all(getattr(config, name) == value for name, value in _UNCHANGED.items())
                and all(getattr(config, name, None) in (None, False, *harmless)
                        for name, harmless in engine.FOREIGN.items()))

    def __init__(self, model: MixtralModel, max_length: int) -> None:
        """`max_length`: positions are below it."""
        self._model, config = model, model.config
        self._groups, self._head, self._topk = config.num_query_groups, config.kv_channels, config.moe_router_topk
        self._eps, self._router_dtype = config.layernorm_epsilon, _ROUTER_DTYPES.get(config.moe_router_dtype)
        angles = model.rotary_pos_emb(max_length)[:, 0, None]  # [positions, 1, 1, d], both halves alike
        signs = torch.ones(self._head).index_fill_(0, torch.arange(self._head // 2), -1.0)
        self._rotations = [one.to(config.params_dtype) for one in (angles.cos(), angles.sin() * signs)]

    def read(self, into: Tensor, positions_t: Tensor, attend: Attend) -> Tensor:
        """[t, h] behind the last layer, and its norm where this stage ends the model. `into` are the ids [t] of the
        tokens, or what the stage before gave, [t, h].
        """
        decoder = self._model.decoder
        x = into
        if self._model.pre_process:
            x = self._model.embedding.word_embeddings.weight[into]
        cos, sin = (table[positions_t] for table in self._rotations)
        for number, layer in enumerate(decoder.layers):
            attention, mlp = layer.self_attention, layer.mlp
            mixed = linear_of_few(self._norm(layer.input_layernorm, x), attention.linear_qkv.weight)
            x = x + linear_of_few(self._attention(number, mixed, cos, sin, attend), attention.linear_proj.weight)
            x = x + self._experts(mlp, self._norm(layer.pre_mlp_layernorm, x))
        return x if decoder.final_layernorm is None else self._norm(decoder.final_layernorm, x)

    def logits(self, x_th: Tensor) -> Tensor:
        """[t, vocabulary, its padding included] of the last stage."""
        model = self._model
        shared = model.share_embeddings_and_output_weights
        return linear_of_few(x_th, model.shared_embedding_or_output_weight() if shared else model.output_layer.weight)

    def _norm(self, norm: RMSNorm, x_th: Tensor) -> Tensor:
        return rms_norm(x_th, norm.weight.shape, norm.weight, self._eps)

    def _attention(self, number: int, mixed_t: Tensor, cos: Tensor, sin: Tensor, attend: Attend) -> Tensor:
        """The rows of the QKV weight are, group for group, those of its query heads, its key and its value."""
        mixed = mixed_t.view(len(mixed_t), self._groups, -1, self._head)
        turned, value = mixed[:, :, :-1], mixed[:, :, -1]
        turned = turned * cos + turned.roll(self._head // 2, -1) * sin
        return attend(number, turned[:, :, :-1].flatten(1, 2), turned[:, :, -1], value)

    def _experts(self, mlp: MoELayer, x_th: Tensor) -> Tensor:
        weight_eh, dtype = mlp.router.weight, self._router_dtype or x_th.dtype
        best = linear(x_th.to(dtype), weight_eh.to(dtype)).topk(self._topk)
        shares_tk = best.values.softmax(-1, dtype=torch.float32).to(dtype)
        if len(x_th) <= _FEW:  # lists are quicker than so small tensors
            chosen = best.indices.flatten().tolist()
            order_r = sorted(range(len(chosen)), key=chosen.__getitem__)
            from_r, back_r = [one // self._topk for one in order_r], sorted(range(len(chosen)), key=order_r.__getitem__)
            counts_e = [chosen.count(one) for one in range(len(weight_eh))]
        else:
            order_r = best.indices.flatten().argsort(stable=True)  # rows by expert
            from_r, back_r = order_r // self._topk, order_r.argsort()
            counts_e = best.indices.flatten().bincount(minlength=len(weight_eh))
        rows, _ = mlp.experts(x_th[from_r], counts_e, shares_tk.flatten()[order_r])
        return rows[back_r].view(-1, self._topk, rows.shape[-1]).sum(1)
