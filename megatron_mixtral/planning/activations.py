"""Activations: the bytes that autograd keeps from the forward pass of one micro-batch, tensor by tensor.

The tables list what this library's modules save for their backward pass (`model/`), for one token, in units of one
number of the compute dtype. Tokens are spread evenly over experts. A real run is measured against them in
`tests/distributed/test_planning_measured.py`.
"""

from megatron_mixtral.planning.shape import RunShape

# What an expert keeps of a token, in widths of the expert: the two halves of fc1's output and, without recomputation of
# the activation, SwiGLU's output times the router's probability.
WIDTHS, WIDTHS_RECOMPUTED = 3, 2
NORM = 2  # a norm's output, and x / rms(x), which torch keeps where it has no fused norm, as on a CPU
ROTATIONS = 4  # sines and cosines of queries and of keys
LOGITS_AT_ONCE = 2**27  # of a chunk of the loss on a GPU (model/cross_entropy.py)


def layer(shape: RunShape, recompute: str | None = None) -> float:
    """Bytes that one transformer layer keeps of one micro-batch on one device."""
    recompute = recompute or shape.recompute
    if recompute == "full":
        return shape.tokens_per_micro_batch * shape.config.hidden_size / shape.layout.tp * shape.weight_bytes
    return _attention(shape, recompute) + _experts(shape, recompute) + _adapters(shape)


def _adapters(shape: RunShape) -> float:
    """What each A makes of its input: of q, k and v for the whole sequence on every tensor-parallel rank."""
    adapter, layout = shape.adapter, shape.layout
    if adapter is None:
        return 0.0
    whole, part, routed = (sum(name in adapter.targets for name in names) for names in (
        ("q_proj", "k_proj", "v_proj"), ("o_proj", "gate"), ("w1", "w2", "w3")))
    numbers = whole + (part + routed * shape.config.num_experts_per_tok * layout.etp) / layout.tp
    return shape.tokens_per_micro_batch * adapter.rank * numbers * shape.weight_bytes


def _attention(shape: RunShape, recompute: str) -> float:
    config, tp = shape.config, shape.layout.tp
    query, key_value = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    numbers = config.hidden_size  # input of the norm
    numbers += NORM * config.hidden_size if recompute == "none" else 0  # its output, input of the projections
    if shape.layout.cp == 1:
        numbers += query + 2 * key_value  # their output, kept whole because the values are a part of it
        numbers += query + key_value  # rotated queries and keys
    else:
        numbers += query  # rotated; of its keys and values a rank keeps those that it gathers
        numbers += _gathered_tokens(shape) * 2 * key_value
    numbers += query  # attention's output
    statistics = 4 * config.num_attention_heads  # log-sum-exp of each row, fp32
    rotations = ROTATIONS * config.head_dim * shape.weight_bytes  # of the whole sequence, on every rank
    return shape.tokens_per_micro_batch * ((numbers * shape.weight_bytes + statistics) / tp + rotations)


def _gathered_tokens(shape: RunShape) -> float:
    """Tokens whose keys and values a context-parallel rank keeps, for each token of its own. Of 2 cp chunks rank r has
    two, which attend to the first r + 1 and the first 2 cp - r: 2 cp + 1 chunks together, whichever rank it is.
    """
    return (shape.layout.chunks + 1) / 2


def _experts(shape: RunShape, recompute: str) -> float:
    config, layout = shape.config, shape.layout
    hidden, width = config.hidden_size, config.intermediate_size / layout.etp
    local = hidden + (NORM * hidden if recompute == "none" else 0)  # input of the norm; its output, for the router
    # Every rank of an expert-tensor-parallel group holds the tokens of the whole group, and a part of each expert.
    arriving = config.num_experts_per_tok * layout.etp
    order = 8 * config.num_local_experts + 28 * config.num_experts_per_tok  # bytes: which token goes where, how much
    kept = WIDTHS if recompute == "none" else WIDTHS_RECOMPUTED
    routed = arriving * (hidden + kept * width)
    return shape.tokens_per_micro_batch / layout.tp * ((local + routed) * shape.weight_bytes + order)


def temporaries(shape: RunShape, stage: int) -> float:
    """Bytes that the experts' backward pass has beside what the graph keeps, at its fullest moment: at SwiGLU the
    gradients of its output and of fc1's; or, of a base in 4 bits, at fc2 or fc1 that weight, dense, with the gradients
    of its output and, from base and adapters, two of its input. By fc1 the graph has given back what `WIDTHS` counts.
    """
    config, layout = shape.config, shape.layout
    width = config.intermediate_size / layout.etp
    tokens = shape.tokens_per_micro_batch / layout.tp * layout.etp * config.num_experts_per_tok
    moments = [3 * tokens * width]
    if shape.adapter is not None and shape.adapter.quantized:
        fc2 = shape.parameters_of_stage(stage).expert / shape.layers_of_stage(stage) / 3
        moments.append(fc2 + tokens * (2 * width + config.hidden_size))
        moments.append(2 * fc2 + tokens * (2 * config.hidden_size + (2 - WIDTHS) * width))
    return max(moments) * shape.weight_bytes


def embedding(shape: RunShape) -> float:
    """Token ids, int64."""
    return 8.0 * shape.tokens_per_micro_batch


def logits(shape: RunShape) -> float:
    """The logits of a chunk of tokens: in the weights' dtype, in fp32, and their gradient. The graph keeps none."""
    numbers = min(shape.tokens_per_micro_batch * shape.config.vocab_size / shape.layout.tp, LOGITS_AT_ONCE)
    return numbers * (4.0 + 2 * shape.weight_bytes)
