"""RMSNorm in plain torch that works with sequence parallelism, which the engine's torch wrapper refuses."""

import torch
from megatron.core.transformer.transformer_config import TransformerConfig


class RMSNorm(torch.nn.Module):
    """x / rms(x) * weight over the last dimension (Zhang and Sennrich, 2019), statistics in fp32.

    Under sequence parallelism each tensor-parallel rank norms its own slice of the sequence, so the weight's gradient
    is a partial sum; the attribute `sequence_parallel` makes the engine all-reduce it over the tensor-parallel group.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        self.weight.sequence_parallel = config.sequence_parallel

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., hidden_size] -> the same shape and dtype."""
        return torch.nn.functional.rms_norm(x, (x.shape[-1],), self.weight, self.eps)
