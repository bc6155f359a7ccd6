"""A training step at Mixtral-8x7B's width on a GPU that is not there: what it holds, computes, sends and waits for.

    python -m helpers.rehearsal '{"sizes": {"ep": 8}}' '{"sizes": {"pp": 2}, "rank": 1}'     one JSON object each

The keys are the parameters of `rehearse`. Tests and benchmarks read what it prints; it is a process of its own because
`fake_gpu` replaces parts of torch for good.
"""

import dataclasses
import json
import sys
import warnings
from typing import Any

from helpers import fake_gpu

SEQUENCE = 4096
AS_TRAINED = {"gradient_accumulation_fusion": True, "bias_activation_fusion": True}  # what a run's flags default to


def rehearse(sizes: dict[str, int], rank: int = 0, world: int | None = None, layers: int = 2, micro_batches: int = 2,
             window: int | None = None, capability: tuple[int, int] = (9, 0), preset: str = "mixtral-8x7b",
             **engine: Any) -> dict[str, Any]:
    """One step on one rank of a layout: the figures of `footprint.measure`, FLOPs by operation, waits by place, places
    of attention that no flash kernel serves, bytes to other pipeline stages, and the order of its passes.
    """
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from helpers.footprint import measure
    from megatron_mixtral import config as configs

    layout = configs.ParallelLayout(**sizes)
    model = dataclasses.replace(configs.preset(preset), num_hidden_layers=layers, max_position_embeddings=SEQUENCE,
                                sliding_window=window)
    world, moved = world or layout.min_world, []
    fake_gpu.capability = tuple(capability)
    with fake_gpu.ranks(rank, world), FlopCounterMode(display=False, custom_mapping=products()) as flops:
        fake_gpu.connect(lambda tensor, group: moved.append(tensor.nbytes))
        found = measure(rank, model, sizes, torch.bfloat16, micro_batches, SEQUENCE, {**AS_TRAINED, **engine},
                        ready=fake_gpu.forget)
    found["sent"] = [[operation, len(group), size] for (operation, group), size in found["sent"].items()]
    return {**found, "to_other_stages": sum(moved), "waits": dict(fake_gpu.waits), "masked": dict(fake_gpu.masked),
            "order": "".join(fake_gpu.order), "flops": {str(name).removeprefix("aten."): count for name, count in
                      flops.get_flop_counts()["Global"].items()}}


def products() -> dict[Any, Any]:
    """FLOPs, by shapes, that torch does not know, or counts over the whole square of causal attention."""
    import torch
    from torch.utils.flop_counter import sdpa_flop_count

    def grouped(x: Any, weight: Any, *rest: Any, **more: Any) -> int:
        return 2 * x[0] * weight[1] * weight[2]

    def added(into: Any, a: Any, b: Any, *rest: Any, **more: Any) -> int:
        return 2 * a[0] * a[1] * b[1]

    def forward(query: Any, *rest: Any, **more: Any) -> int:
        return sdpa_flop_count(query, query, query) // 2

    def backward(grad: Any, query: Any, *rest: Any, **more: Any) -> int:
        return 5 * sdpa_flop_count(query, query, query) // 4  # scores again, and four products

    aten = torch.ops.aten
    return {aten._grouped_mm: grouped, aten.addmm: added, aten._scaled_dot_product_flash_attention: forward,
            aten._scaled_dot_product_flash_attention_backward: backward}


def start() -> None:
    """Once in a process, before anything of the engine is imported."""
    warnings.simplefilter("ignore")
    fake_gpu.enable()
    from megatron_mixtral import runtime

    assert runtime.ready().device == "cuda"
    import megatron.core.models.gpt  # noqa: F401

    fake_gpu.Routing.install()


def main(wanted: list[str]) -> int:
    start()
    for words in wanted:
        print(json.dumps(rehearse(**json.loads(words))), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
