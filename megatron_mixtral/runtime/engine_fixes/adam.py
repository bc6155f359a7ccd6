"""AdamW with the state layout of apex's and transformer-engine's FusedAdam, in torch's own fused kernels.

The engine's distributed optimizer expects `exp_avg` and `exp_avg_sq` in a parameter's state and one integer `step` in
the parameter group. torch.optim.AdamW keeps a `step` tensor per parameter. The arithmetic is torch's: this class only
keeps the books (Loshchilov and Hutter, "Decoupled weight decay regularization", with bias correction).
"""

import pkgutil
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch.optim.adam import adam

from megatron_mixtral.runtime.replacements import Fix, Replacements


class FusedAdam(torch.optim.Optimizer):
    """Adam (`adam_w_mode=False`: weight decay in the gradient) or AdamW (`True`, decoupled), one step count a group."""

    def __init__(self, params: Iterable[Any], lr: float = 1e-3, betas: tuple[float, float] = (0.9, 0.999),
                 eps: float = 1e-8, weight_decay: float = 0.0, adam_w_mode: bool = True,
                 bias_correction: bool = True, capturable: bool = False) -> None:
        if not bias_correction:
            raise ValueError("FusedAdam without bias correction is not implemented; the engine never asks for it")
        if capturable:
            raise ValueError("--optimizer-cuda-graph needs the FusedAdam of transformer-engine or apex")
        self.adam_w_mode = adam_w_mode
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay,
                                  "bias_correction": bias_correction})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One update of every parameter that has a gradient (`grad`, or `decoupled_grad` where the engine sets it)."""
        loss = closure() if closure is not None else None
        for group in self.param_groups:
            group["step"] = int(group.get("step", 0)) + 1
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            for param in params:
                state = self.state[param]
                if "exp_avg" not in state:
                    state["exp_avg"] = torch.zeros_like(param)
                    state["exp_avg_sq"] = torch.zeros_like(param)
            # torch's kernels count one step before they use it, and want a tensor for each parameter: parts of one
            # that is filled on the device, for which the host need not wait.
            before = list(torch.full((len(params),), float(group["step"] - 1), device=params[0].device).unbind())
            adam(params, [p.grad for p in params], [self.state[p]["exp_avg"] for p in params],
                 [self.state[p]["exp_avg_sq"] for p in params], [], before,
                 foreach=False, fused=True, amsgrad=False, maximize=False,
                 decoupled_weight_decay=self.adam_w_mode,
                 beta1=group["betas"][0], beta2=group["betas"][1], lr=group["lr"],
                 weight_decay=group["weight_decay"], eps=group["eps"])
        return loss


def _stand_in_for_fused_adam(replacements: Replacements) -> None:
    from megatron.core import optimizer
    from megatron.core.optimizer import distrib_optimizer

    replacements.set(optimizer, "Adam", FusedAdam)
    replacements.set(distrib_optimizer, "Adam", FusedAdam)
    replacements.set(optimizer, "USING_PYTORCH_OPTIMIZER", False)
    replacements.set(distrib_optimizer, "HAVE_APEX_OR_TE", True)


FIX = Fix(
    name="fused-adam",
    symptom="a distributed-optimizer checkpoint cannot be loaded before the first step: 'assert len(steps) == 1'",
    cause="without transformer-engine and apex the engine takes torch.optim.AdamW, which keeps `step` in each "
          "parameter's state and creates its state at the first step; the checkpoint code expects FusedAdam's form",
    versions="0.19.2",
    remove_when="DistributedOptimizer saves and loads torch.optim.AdamW at step 0",
    needed=partial(pkgutil.resolve_name, "megatron.core.optimizer:USING_PYTORCH_OPTIMIZER"),
    apply=_stand_in_for_fused_adam,
)
