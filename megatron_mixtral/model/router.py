"""The engine's top-k router with balancing losses whose gradients mean the same in every run.

Routing itself is the engine's. The losses differ from the engine's where tokens are left out of them:

- With padding under sequence parallelism the engine weights each tensor-parallel rank's part by that rank's own number
  of tokens; here every part is weighted by the micro-batch's.
- With `--calculate-per-token-loss` the engine divides all gradients by the tokens that are trained on, and multiplies
  these losses by the tokens that are routed. Where the two differ (instruction data), the losses would grow with every
  token that is not trained on; here they are multiplied by the tokens trained on, so a step's weights add up to one.

And they can be Hugging Face's (`LayerPool`). `model/spec.py` puts the router into the layers.

Shape suffixes: t tokens of this rank, e experts.
"""

from collections import deque
from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe.moe_logging import get_moe_metrics_tracker
from megatron.core.transformer.moe.moe_utils import (
    MoEAuxLossAutoScaler,
    compute_routing_scores_for_aux_loss,
    get_tokens_per_expert_and_token_count,
    switch_load_balancing_loss_func,
)
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.transformer_config import TransformerConfig


class MicroBatch:
    """What the routers of a model chunk must know of the micro-batch that passes; `MixtralModel.forward` sets it."""

    trained_tokens: torch.Tensor | None = None  # of the whole micro-batch; None: as many as are routed
    padding_mask: torch.Tensor | None = None  # [sequence, batch] of this rank, where the engine hands none on


class LayerPool:
    """The balancing loss of `transformers.models.mixtral.modeling_mixtral.load_balancing_loss_func`.

    It is E sum_i f_i P_i, where f_i (tokens that chose expert i / rows) and P_i (mean probability of expert i) are
    taken over the rows of *all layers* of a micro-batch. So no layer knows its gradient, E f_i / rows, before all have
    run. They have when the first backward begins, as long as one micro-batch is on its way at a time: without pipeline
    parallelism. Layers overwrite their own row, so a recomputed layer is not counted twice.
    """

    def __init__(self, layers: int, experts: int, topk: int) -> None:
        self._layers, self._experts, self._topk = layers, experts, topk
        self._chosen: list[torch.Tensor] = [torch.empty(0)] * layers  # [e], over all ranks that share the micro-batch
        self._scores: list[torch.Tensor] = [torch.empty(0)] * layers  # [e] sums over this rank's tokens

    def put(self, layer: int, chosen_e: torch.Tensor, scores_te: torch.Tensor) -> None:
        """A layer's number of tokens of each expert and this rank's router probabilities."""
        self._chosen[layer], self._scores[layer] = chosen_e, scores_te.detach().sum(dim=0)

    def gradient(self) -> torch.Tensor:
        """[e]: d loss / d score, the same for every token."""
        chosen_e = torch.stack(self._chosen).sum(dim=0).float()
        rows = (chosen_e.sum() / self._topk).clamp(min=1)
        return self._experts * chosen_e / rows**2

    def logged(self, layer: int) -> torch.Tensor:
        """What a layer notes of the loss for the log, which is the mean over the layers: all in the last, where all are
        known. The parts of the ranks that share the micro-batch add up to it.
        """
        if layer < self._layers - 1:
            return torch.zeros_like(self._scores[layer][0])
        return self._layers * (self.gradient() * torch.stack(self._scores).sum(dim=0)).sum()


class _PooledLoss(torch.autograd.Function):
    """The pooled loss as a layer sees it: what it notes for the log, and the gradient of its scores."""

    @staticmethod
    def forward(ctx: Any, scores_te: torch.Tensor, pool: LayerPool, layer: int) -> torch.Tensor:
        ctx.pool, ctx.shape = pool, scores_te.shape
        return pool.logged(layer)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return (gradient * ctx.pool.gradient()).expand(ctx.shape), None, None


class MixtralRouter(TopKRouter):
    """The engine's router with the losses described above."""

    def __init__(self, config: TransformerConfig, pg_collection: ProcessGroupCollection | None = None,
                 is_mtp_layer: bool = False, *, micro_batch: MicroBatch, pool: LayerPool | None = None) -> None:
        """`pool`, shared by the layers, makes the `aux_loss` Hugging Face's."""
        super().__init__(config, pg_collection, is_mtp_layer)
        self._micro_batch, self._pool = micro_batch, pool
        self._trained_tokens: torch.Tensor | None = None
        self._waiting: deque[torch.Tensor | None] = deque()

    def routing(self, logits: torch.Tensor, padding_mask: torch.Tensor | None = None) -> Any:
        """[sequence, batch, e] -> the engine's probabilities and routing map, each [t, e]."""
        if padding_mask is None:
            padding_mask = self.noted_padding
        if self.training:
            self._begin(logits, padding_mask)
        return super().routing(logits, padding_mask)

    @property
    def noted_padding(self) -> torch.Tensor | None:
        """The mask that counts where none is handed to the router."""
        return self._micro_batch.padding_mask

    def _begin(self, logits: torch.Tensor, padding_mask: torch.Tensor | None) -> None:
        """Note what the losses need to know. A recomputed layer comes here twice: first without gradients, and then,
        in backward, in the same order of micro-batches, when later micro-batches may have passed.
        """
        if torch.is_grad_enabled():
            self._trained_tokens = self._waiting.popleft() if self._waiting else self._micro_batch.trained_tokens
            return
        self._waiting.append(self._micro_batch.trained_tokens)
        if self._pool is not None:
            mask = None if padding_mask is None else padding_mask.reshape(-1)
            chosen_te, scores_te = compute_routing_scores_for_aux_loss(
                logits.view(-1, self.config.num_moe_experts), self.topk, self.score_function, padding_mask=mask)
            chosen_e, _, _ = get_tokens_per_expert_and_token_count(chosen_te, self.tp_cp_group, self.topk)
            self._pool.put(self.layer_number - 1, chosen_e, scores_te)

    def _apply_aux_loss(self, probs: torch.Tensor, scores_for_aux_loss: torch.Tensor, routing_map: torch.Tensor,
                        with_padding_mask: bool = False) -> torch.Tensor:
        coefficient = self.get_aux_loss_coeff("aux_loss")
        if coefficient == 0:
            return probs
        chosen_e, routed, rows = get_tokens_per_expert_and_token_count(routing_map, self.tp_cp_group, self.topk,
                                                                       with_padding_mask)
        if self._pool is not None:
            self._pool.put(self.layer_number - 1, chosen_e, scores_for_aux_loss)
            loss = coefficient * _PooledLoss.apply(scores_for_aux_loss, self._pool, self.layer_number - 1)
        else:
            loss = switch_load_balancing_loss_func(
                probs=scores_for_aux_loss, tokens_per_expert=chosen_e, topk=self.topk,
                total_num_tokens=rows.clamp(min=1) if with_padding_mask else rows,  # may be all padding
                num_experts=self.config.num_moe_experts, moe_aux_loss_coeff=coefficient,
                fused=self.config.moe_router_fusion)
        return self.attach_and_log_load_balancing_loss(probs, coefficient, loss, "load_balancing_loss",
                                                       self.tp_cp_group, valid_token_count=routed)

    def attach_and_log_load_balancing_loss(self, activation: torch.Tensor, aux_loss_coeff: float,
                                           aux_loss: torch.Tensor, aux_loss_name: str, reduce_group: Any,
                                           needs_dp_avg: bool = True, valid_token_count: Any = None) -> torch.Tensor:
        """As the engine's, with the micro-batch's tokens in place of this rank's."""
        if self.calculate_per_token_loss:
            # The engine multiplies the loss by this count and by the size of the group.
            valid_token_count = self._weight(valid_token_count) / self.tp_cp_group.size()
        return super().attach_and_log_load_balancing_loss(activation, aux_loss_coeff, aux_loss, aux_loss_name,
                                                          reduce_group, needs_dp_avg, valid_token_count)

    def _weight(self, routed: int | torch.Tensor) -> int | torch.Tensor:
        """The micro-batch's tokens that are trained on, of which `routed` are this rank's if all that are routed are.

        Only with padding do the ranks that share a micro-batch route different numbers of tokens.
        """
        return self._whole(routed) if self._trained_tokens is None else self._trained_tokens

    def _whole(self, routed: int | torch.Tensor) -> int | torch.Tensor:
        if not isinstance(routed, torch.Tensor):
            return routed * self.tp_cp_group.size()
        total = routed.detach().clone()
        torch.distributed.all_reduce(total, group=self.tp_cp_group)
        return total

    def apply_z_loss(self, logits: torch.Tensor, padding_mask: torch.Tensor | None = None) -> torch.Tensor:
        """Attach coeff * mean over the micro-batch's tokens of logsumexp(logits)^2 (ST-MoE, arXiv:2202.08906, eq. 5).

        [t, e] -> the same. `padding_mask` [t] is True where a token is none.
        """
        coefficient = self.config.moe_z_loss_coeff
        if coefficient is None or not self.training or not torch.is_grad_enabled():
            return logits
        squares_t = torch.logsumexp(logits, dim=-1).square()
        routed: int | torch.Tensor = logits.shape[0]
        if padding_mask is not None:
            squares_t, routed = squares_t * ~padding_mask, (~padding_mask).sum()
        tokens = self._whole(routed)
        tokens = tokens.clamp(min=1) if isinstance(tokens, torch.Tensor) else tokens
        share = squares_t.sum() / tokens  # this rank's; the shares add up to the mean
        weight = self._weight(routed) if self.calculate_per_token_loss else 1
        get_moe_metrics_tracker().record("z_loss", share * self.tp_cp_group.size(), self.layer_number,
                                         self.config.num_layers, avg_group=self.tp_dp_cp_group)
        return MoEAuxLossAutoScaler.apply(logits, coefficient * weight * share)
