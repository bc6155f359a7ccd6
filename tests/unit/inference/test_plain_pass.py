"""One pass two ways: by `model/plain.py`, and by the engine's modules. The same logits, and the same in the cache."""

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.models import tiny_hf_mixtral
from helpers.ranks import run_ranks

UNUSUAL = {"rms_norm_eps": 1e-2, "rope_parameters": {"rope_theta": 50.0, "rope_type": "default"}, "sliding_window": 5,
           "head_dim": 16, "num_local_experts": 5, "num_experts_per_tok": 3, "num_attention_heads": 6,
           "num_key_value_heads": 2}
STEPS = [[(0, 0, 9), (2, 0, 4)], [(0, 9, 1), (1, 0, 7), (2, 4, 1)], [(0, 10, 1), (1, 7, 1), (2, 5, 1)],
         [(2, 6, 1), (0, 11, 3)]]  # (slot, start, count) of each row: prompts, both, next tokens alone, out of order


def _both(rank: int, folder: str, dtype: str) -> dict[str, Any]:
    from megatron_mixtral.inference import Generator
    from megatron_mixtral.inference.cache import Row

    stage = Generator.from_pretrained(folder, dtype=dtype, max_slots=3).engine._stage
    found: dict[str, Any] = {"kind": type(stage._plain).__name__}
    for way, plain in (("plain", stage._plain), ("engine", None)):
        stage._plain = plain
        stage.cache.keys.zero_()
        stage.cache.values.zero_()
        numbers, logits = torch.Generator().manual_seed(1), []
        for step in STEPS:
            rows = [Row(*row) for row in step]
            tokens = sum(row.count for row in rows)
            ids = torch.randint(3, 96, (tokens,), generator=numbers).tolist()
            logits.append(stage.read(rows, ids, range(tokens)))
        found[way] = torch.cat(logits), stage.cache.keys.clone(), stage.cache.values.clone()
    found["fits"] = _fits(stage.model)
    return found


def _fits(model: Any) -> dict[str, bool]:
    """Whether a model is read plainly after a change of one of its settings or parts."""
    from megatron_mixtral.model import PlainLayers

    found, config, mlp = {}, model.config, model.decoder.layers[1].mlp
    for name, value in (("moe_expert_capacity_factor", 1.0), ("moe_router_force_load_balancing", True),
                        ("tensor_model_parallel_size", 2), ("expert_model_parallel_size", 2), ("qk_layernorm", True)):
        own = getattr(config, name)
        setattr(config, name, value)
        found[name] = PlainLayers.fit(model)
        setattr(config, name, own)
    for one in (mlp.router, model):
        own = type(one)
        one.__class__ = type("Adapted", (own,), {})
        found[f"another {own.__name__}"] = PlainLayers.fit(model)
        one.__class__ = own
    assert PlainLayers.fit(model)
    return found


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-6), ("bfloat16", 2e-2)])
def test_a_plain_pass_is_the_engines(tmp_path: Path, dtype: str, tolerance: float) -> None:
    [found] = run_ranks(1, _both, str(tiny_hf_mixtral(tmp_path / "hf", **UNUSUAL)), dtype)
    assert found["kind"] == "PlainLayers"
    for plain, by_engine in zip(found["plain"], found["engine"], strict=True):
        assert plain.dtype == by_engine.dtype and plain.shape == by_engine.shape
        assert (plain.float() - by_engine.float()).abs().max() < tolerance * by_engine.float().abs().max()
    assert not any(found["fits"].values()), found["fits"]
