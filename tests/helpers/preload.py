"""Imported once by the fork server, so that every rank of every test starts with torch and the engine in memory."""

import torch

import megatron_mixtral.runtime
import megatron_mixtral.training.pretrain  # noqa: F401

# With a GPU, CUDA must not be touched before the fork: each rank readies itself (see ranks.py).
if not torch.cuda.is_available():
    megatron_mixtral.runtime.ready(training=True)
