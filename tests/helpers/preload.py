"""Imported once by the fork server, so that every rank of every test starts with torch and the engine in memory.

A process that has asked CUDA how many GPUs there are cannot fork ranks that use them; the answer "none" counts too. So
`ranks.py` asks before it starts the server, and says here which it is.
"""

import os

ON_GPU = os.environ["RANKS_ON"] == "cuda"
# torch then asks NVML instead, which may be asked before a fork, or nobody where all GPUs are hidden.
os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"
if not ON_GPU:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""

import megatron_mixtral.runtime  # noqa: E402
import megatron_mixtral.training.pretrain  # noqa: E402, F401

if not ON_GPU:  # there each rank readies itself (see ranks.py)
    megatron_mixtral.runtime.ready(training=True)
