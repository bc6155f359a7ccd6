"""The first lines of a run, on rank 0: what is trained, on what, with how much memory, on which data."""

from collections.abc import Iterator, Mapping

from megatron_mixtral.data.datasets import InstructionFiles, blend_of, instruction_blend
from megatron_mixtral.disk import human_size
from megatron_mixtral.planning import RunShape, fullest_stage, stage_memory
from megatron_mixtral.training import preflight
from megatron_mixtral.training.arguments import Run


def summary(run: Run, shape: RunShape | None, where: str, memory: int, identities: Mapping[str, str],
            steps: int | None) -> Iterator[str]:
    """Lines of a kind and its figures. `where` names device and collectives, `memory` is what the fullest
    device has in bytes, and `identities` has each data set's tokens.
    """
    layout = run.layout
    yield f"model   {run.model}"
    yield f"start   {run.start}"
    yield f"layout  {layout}, {layout.world} device(s), data parallel {layout.data_parallel}; {where}"
    if shape is not None:
        planned = stage_memory(shape, fullest_stage(shape))
        yield (f"memory  {human_size(planned.total)} planned of {human_size(memory)}: weights "
               f"{human_size(planned.weights)}, optimizer {human_size(planned.gradients + planned.optimizer)}, "
               f"activations {human_size(planned.activations + planned.logits + planned.temporaries)}"
               + (f", cache of evaluations {human_size(planned.evaluation_cache)}" if planned.evaluation_cache else ""))
    yield from _data(run, shape, identities, steps)
    if run.engine.save and run.flags.log_level != "debug":
        yield f"logs    {run.engine.save}/logs/latest/rank_N.log: all that the ranks print"


def _data(run: Run, shape: RunShape | None, identities: Mapping[str, str], steps: int | None) -> Iterator[str]:
    instruction = run.flags.is_instruction_dataset
    words = run.engine.data_path or run.engine.train_data_path
    blend = (instruction_blend if instruction else blend_of)(words)
    if blend is None or shape is None:
        return
    prefixes, weights = blend
    counts = [int(identities[prefix].split()[0]) for prefix in prefixes]
    rows = [len(InstructionFiles(prefix)) for prefix in prefixes] if instruction else [
        count / shape.seq_length for count in counts]
    shares = [weight / sum(weights) for weight in weights] if weights else [row / sum(rows) for row in rows]
    part = preflight.training_share(run.engine.named.get("--split")) if run.engine.data_path else 1.0
    for prefix, count, row, share in zip(prefixes, counts, rows, shares, strict=True):
        epochs = "" if steps is None or not row * part else (
            f", {steps * shape.global_batch_size * share / (row * part):.3g} epochs in {steps} steps")
        yield f"data    {prefix}: {count:,} tokens{epochs}"
