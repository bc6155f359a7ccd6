"""The language-model loss of one micro-batch, in the form the engine's schedules reduce."""

import torch


def masked_sum(losses_bs: torch.Tensor, loss_mask_bs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, dict]:
    """Sum of the token losses that the mask keeps.

    `losses_bs` [batch, sequence] are cross entropies in nats, `loss_mask_bs` [batch, sequence] is 1.0 or 0.0.
    Returns (sum, number of kept tokens as an int tensor, {"lm loss": [sum, number]}): the engine divides by the number,
    per micro-batch or (`--calculate-per-token-loss`) over the global batch, and logs sum / number over all of it.
    """
    mask = loss_mask_bs.view(-1).float()
    total = torch.sum(losses_bs.view(-1).float() * mask)
    count = mask.sum().to(torch.int)
    return total, count, {"lm loss": torch.stack((total.detach(), count.to(total.dtype)))}
