"""Activations: the bytes that autograd keeps from the forward pass of one micro-batch, tensor by tensor.

The tables list what this library's modules save for their backward pass (`model/`), for one token, in units of one
number of the compute dtype. Tokens are spread evenly over experts. `tests/distributed/test_planning_memory.py` measures
a real run against them.
"""

from megatron_mixtral.planning.shape import RunShape


def layer(shape: RunShape, recompute: str | None = None) -> float:
    """Bytes that one transformer layer keeps of one micro-batch on one device."""
    recompute = recompute or shape.recompute
    if recompute == "full":
        return shape.tokens_per_micro_batch * shape.config.hidden_size / shape.layout.tp * shape.weight_bytes
    return _attention(shape) + _experts(shape, recompute)


def _attention(shape: RunShape) -> float:
    config, tp = shape.config, shape.layout.tp
    query, key_value = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    numbers = 2 * config.hidden_size  # input of the norm, input of the projections
    numbers += 2 * query + 2 * key_value  # rotated queries and keys, values, attention's output
    statistics = 4 * config.num_attention_heads  # log-sum-exp of each row, fp32
    return shape.tokens_per_micro_batch / tp * (numbers * shape.weight_bytes + statistics)


def _experts(shape: RunShape, recompute: str) -> float:
    config, layout = shape.config, shape.layout
    hidden, ffn = config.hidden_size, config.intermediate_size
    local = 2 * hidden  # input of the norm, input of the router
    # Every device of an expert-tensor-parallel group holds the tokens of the whole group.
    routed = config.num_experts_per_tok * (hidden + 2 * ffn / layout.etp * layout.etp + hidden)
    if recompute == "none":
        routed += config.num_experts_per_tok * ffn  # SwiGLU's output
    return shape.tokens_per_micro_batch / layout.tp * (local + routed) * shape.weight_bytes


def embedding(shape: RunShape) -> float:
    """Token ids, int64."""
    return 8.0 * shape.tokens_per_micro_batch


def logits(shape: RunShape) -> float:
    """Logits of one micro-batch and the softmax of the cross entropy, fp32."""
    vocabulary = shape.config.vocab_size / shape.layout.tp
    return shape.tokens_per_micro_batch * vocabulary * (shape.weight_bytes + 4)
