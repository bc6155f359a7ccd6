"""Predicted time of one optimizer step, term by term. A model with few constants, not a measurement.

A step is its micro-batches one after another through the slowest stage, the pipeline's idle time, and what is left
uncovered of the reduction of gradients, and the optimizer. The constants below were set once, on two published runs of
Mixtral on H100 (docs/parallelism.md has the points, and the error of each).
"""

from dataclasses import dataclass, field

from megatron_mixtral.config import hardware
from megatron_mixtral.planning import activations
from megatron_mixtral.planning.communication import Volume, communication_volume
from megatron_mixtral.planning.shape import RunShape, Summed

MATRIX_SHARE = 0.73  # of the peak, for large matrix products
ATTENTION_SHARE = 0.45  # of the peak, for causal flash attention
HALF_SPEED_ROWS = 192  # rows of a matrix product at which it runs at half of its share: tiles and launches
HALF_SPEED_COLUMNS = 192  # the same for the side that tensor parallelism cuts
LINK_SHARE = 0.7  # of a link's rate that a collective reaches
PASSES_OVER_ACTIVATIONS = 6.0  # reads and writes of what a layer keeps, by everything that is not a matrix product
LAUNCH_SECONDS = 4e-4  # a layer's forward and backward on a micro-batch, on the host, where it is not covered
IMBALANCE = 1.12  # the fullest expert's device against the mean, with a balancing loss
UNPACK_SHARE = 0.5  # of the memory's bandwidth, at which a base of 4 bits is made dense
UNCOVERED_REPLICAS = 0.35  # of the reduction over replicas that does not hide behind the backward pass
UNCOVERED_PIPELINE = 0.25  # of the transfers between stages; interleaved stages overlap them


_H100 = hardware.DEVICES["h100-sxm"]


@dataclass(frozen=True)
class Machine:
    """A cluster; each field is a flag of the planner. Defaults are those of an H100 SXM node with one 400 Gb/s adapter
    a device.
    """

    devices: int = field(metadata={"help": "number of devices"})
    device_memory: float = field(default=_H100.memory, metadata={"help": "memory of a device, GB (1e9 bytes)"})
    device_tflops: float = field(default=_H100.tflops, metadata={"help": "dense bf16 peak of a device, TFLOP/s"})
    device_bandwidth: float = field(default=_H100.bandwidth, metadata={"help": "bandwidth of a device's memory, GB/s"})
    intra_node_gbps: float = field(default=_H100.link, metadata={
        "help": "link of a device inside its node, Gb/s in one direction (NVLink 4: 3600)"})
    inter_node_gbps: float = field(default=400.0, metadata={
        "help": "link of a device to other nodes, Gb/s in one direction (one NDR InfiniBand adapter: 400)"})
    devices_per_node: int = field(default=8, metadata={"help": "devices of a node"})

    @classmethod
    def of(cls, device: hardware.Device, **given: float) -> "Machine":
        """A machine of such devices; what is given wins over their data sheet."""
        sheet = {"device_memory": device.memory, "device_tflops": device.tflops, "device_bandwidth": device.bandwidth,
                 "intra_node_gbps": device.link}  # fmt: skip
        return cls(**sheet | given)

    def in_nodes(self, span: int) -> bool:
        """Whether every group of `span` neighbouring ranks, the first from rank 0 on, lies in one node."""
        alone = self.devices <= self.devices_per_node
        return span <= self.devices_per_node and (alone or self.devices_per_node % span == 0)

    def link(self, span: int) -> float:
        """Bytes per second of the groups of `span` neighbouring ranks; the slowest of them counts."""
        return self._rate(self.in_nodes(span))

    def link_to(self, distance: int) -> float:
        """Bytes per second to the rank that is so many further, of a device that begins a node."""
        return self._rate(distance < self.devices_per_node)

    def _rate(self, inside: bool) -> float:
        return (self.intra_node_gbps if inside else self.inter_node_gbps) * 1e9 / 8 * LINK_SHARE


@dataclass(frozen=True)
class StepTime(Summed):
    """Seconds of one optimizer step, by what they are spent on."""

    dense: float = field(metadata={"is": "matrix products of attention, router and output layer"})
    attention: float = field(metadata={"is": "scores and values"})
    experts: float = field(metadata={"is": "matrix products of the experts"})
    adapters: float = field(metadata={"is": "matrix products of adapters"})
    unpacking: float = field(metadata={"is": "weights of 4 bits made dense"})
    memory_bound: float = field(metadata={"is": "norms, rotary, permutation, SwiGLU"})
    launches: float = field(metadata={"is": "kernel launches"})
    tensor: float = field(metadata={"is": "tensor parallelism"})
    expert_tensor: float = field(metadata={"is": "tensor parallelism of the experts"})
    expert: float = field(metadata={"is": "tokens to their experts and back"})
    context: float = field(metadata={"is": "context parallelism"})
    pipeline: float = field(metadata={"is": "between stages"})
    bubble: float = field(metadata={"is": "idle pipeline"})
    replicas: float = field(metadata={"is": "gradients and weights of replicas, uncovered"})
    optimizer: float = field(metadata={"is": "Adam"})


def model_flops_rate(shape: RunShape, seconds: float) -> float:
    """Model FLOP/s of each device when a step takes `seconds` (recomputation is not counted, nor adapters' own; beside
    adapters the model's weights have no gradients).
    """
    flops = shape.config.training_flops_per_token(shape.seq_length) * (1 if shape.adapter is None else 2 / 3)
    return flops * shape.tokens / seconds / shape.layout.world


def predicted_step(shape: RunShape, machine: Machine) -> StepTime:
    """The predicted step; the slowest stage decides, which is the last: it has the output layer."""
    stage = shape.layout.pp - 1
    rounds = shape.layers_of_stage(stage) * shape.micro_batches
    volume = communication_volume(shape, stage)
    work = {
        "dense": rounds * _dense(shape, machine) + shape.micro_batches * _output_layer(shape, machine),
        "attention": rounds * _attention(shape, machine),
        "experts": rounds * _experts(shape, machine),
        "adapters": shape.micro_batches * _adapters(shape, machine, stage),
        "unpacking": shape.micro_batches * unpacking(shape, machine, stage),
        "memory_bound": rounds * activations.layer(shape, recompute="none") * PASSES_OVER_ACTIVATIONS
        / (machine.device_bandwidth * 1e9),
        "launches": rounds * LAUNCH_SECONDS,
        **_within_layers(shape, machine, volume),
    }
    return StepTime(**work, bubble=shape.bubble * sum(work.values()),
                    replicas=UNCOVERED_REPLICAS * _replicas(shape, machine, volume),
                    optimizer=_optimizer(shape, machine, stage))


def _passes(shape: RunShape) -> float:
    """Forward passes' worth of matrix products: backward is two, or one of frozen weights; full recomputation one
    more.
    """
    return (3.0 if shape.adapter is None else 2.0) + (shape.recompute == "full")


def _product_seconds(flops: float, machine: Machine, rows: float, columns: float) -> float:
    saturation = rows / (rows + HALF_SPEED_ROWS) * columns / (columns + HALF_SPEED_COLUMNS)  # small ones are slower
    return flops / (machine.device_tflops * 1e12 * MATRIX_SHARE * saturation)


def _dense(shape: RunShape, machine: Machine) -> float:
    config, tokens, tp = shape.config, shape.tokens_per_micro_batch, shape.layout.tp
    flops = 2 * tokens * (config.attention_parameters / tp + config.hidden_size * config.num_local_experts / tp)
    columns = config.num_attention_heads * config.head_dim / tp
    return _passes(shape) * _product_seconds(flops, machine, tokens, columns)


def _output_layer(shape: RunShape, machine: Machine) -> float:
    config, tokens, tp = shape.config, shape.tokens_per_micro_batch, shape.layout.tp
    flops = 2 * tokens * config.vocab_size * config.hidden_size / tp
    return (3 if shape.adapter is None else 2) * _product_seconds(flops, machine, tokens, config.vocab_size / tp)


def _attention(shape: RunShape, machine: Machine) -> float:
    config = shape.config
    keys = shape.seq_length / 2 if config.sliding_window is None else min(shape.seq_length / 2, config.sliding_window)
    flops = 4 * shape.tokens_per_micro_batch * keys * config.num_attention_heads * config.head_dim / shape.layout.tp
    passes = 4.5 if shape.recompute == "full" else 3.5  # backward is 2.5 forwards
    return passes * flops / (machine.device_tflops * 1e12 * ATTENTION_SHARE)


def _experts(shape: RunShape, machine: Machine) -> float:
    config, layout = shape.config, shape.layout
    arriving = shape.tokens_per_micro_batch / layout.tp * layout.etp * config.num_experts_per_tok
    rows = arriving / (config.num_local_experts / layout.ep)
    flops = 2 * arriving * config.expert_parameters / layout.etp
    uneven = IMBALANCE if config.num_local_experts > 1 else 1.0  # a dense model's one expert gets all tokens
    return uneven * _passes(shape) * _product_seconds(flops, machine, rows, config.intermediate_size / layout.etp)


def _adapters(shape: RunShape, machine: Machine, stage: int) -> float:
    """Thin products, forward and twice backward, for each micro-batch."""
    if shape.adapter is None:
        return 0.0
    config, layout, found = shape.config, shape.layout, shape.trained_of_stage(stage)
    met = config.num_experts_per_tok / config.num_local_experts * layout.ep  # of this rank's experts, by a token
    flops = 2 * shape.tokens_per_micro_batch * (found.dense + found.expert * met * layout.etp / layout.tp)
    passes = 4.0 if shape.recompute == "full" else 3.0
    return passes * _product_seconds(flops, machine, shape.tokens_per_micro_batch, shape.adapter.rank)


def unpacking(shape: RunShape, machine: Machine, stage: int) -> float:
    """Seconds of one micro-batch in which a base of 4 bits is read, and written dense: in each pass over it."""
    if shape.adapter is None or not shape.adapter.quantized:
        return 0.0
    numbers = shape.layers_of_stage(stage) * (shape.config.attention_parameters // shape.layout.tp)
    numbers += shape.parameters_of_stage(stage).expert
    moved = numbers * (shape.adapter.packed_bytes(shape.weight_bytes) + shape.weight_bytes)
    return _passes(shape) * moved / (machine.device_bandwidth * 1e9 * UNPACK_SHARE)


def _within_layers(shape: RunShape, machine: Machine, volume: Volume) -> dict[str, float]:
    """Collectives that a layer waits for. Ranks of a group are neighbours: tp, then cp; etp, then ep; then replicas."""
    layout = shape.layout
    replicas_span = shape.layout.world // layout.pp
    return {
        "tensor": volume.tensor / machine.link(layout.tp),
        "expert_tensor": volume.expert_tensor / machine.link(layout.etp),
        "expert": IMBALANCE * volume.expert / machine.link(layout.etp * layout.ep),
        "context": volume.context / machine.link(layout.tp * layout.cp),
        "pipeline": UNCOVERED_PIPELINE * volume.pipeline / machine.link_to(replicas_span),
    }


def _replicas(shape: RunShape, machine: Machine, volume: Volume) -> float:
    layout = shape.layout
    span = layout.world // layout.pp
    dense = volume.dense_gradients / machine.link(span if shape.dense_replicas > 1 else 1)
    return dense + volume.expert_gradients / machine.link(span if shape.expert_data_parallel > 1 else 1)


def _optimizer(shape: RunShape, machine: Machine, stage: int) -> float:
    """Adam reads and writes its state, the gradient and the weight once; bound by memory."""
    replicas = (shape.dense_replicas, shape.expert_data_parallel) if shape.distributed_optimizer else (1, 1)
    parameters = shape.trained_of_stage(stage)
    numbers = parameters.dense / replicas[0] + parameters.expert / replicas[1]
    return numbers * (2 * 12 + 4 + 2 * shape.weight_bytes) / (machine.device_bandwidth * 1e9)
