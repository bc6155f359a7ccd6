"""The three places at which generation enters the engine. A new release that changes one of them fails here first."""

import inspect
from pathlib import Path
from typing import Any

from helpers.models import tiny_hf_mixtral
from helpers.ranks import run_ranks

RENEW = "the engine has changed a seam of generation: read megatron_mixtral/inference/stage.py, and mend both"


def test_the_first_takes_and_gives_what_it_did() -> None:
    from megatron.core.transformer.attention import Attention, SelfAttention

    seam = SelfAttention._adjust_key_value_for_inference
    assert list(inspect.signature(seam).parameters) == [
        "self", "inference_context", "query", "key", "value", "rotary_pos_emb", "rotary_pos_cos", "rotary_pos_sin",
        "rotary_pos_cos_sin", "sequence_len_offset", "inference_params"], RENEW
    assert "return query, key, value, rotary_pos_emb, attn_mask_type, block_table" in inspect.getsource(seam), RENEW
    assert "query, key, value, rotary_pos_emb, attn_mask_type, block_table = (" in inspect.getsource(Attention.forward)


def test_the_second_is_called_with_queries_where_batching_is_static() -> None:
    from megatron.core.transformer.attention import Attention

    source = inspect.getsource(Attention.forward)
    assert "if inference_context is None or inference_context.is_static_batching():" in source, RENEW
    assert "core_attn_out = apply_module(self.core_attention)(" in source, RENEW


def test_the_third_is_handed_the_hidden_states_and_the_output_layer() -> None:
    from megatron.core.models.gpt import GPTModel

    assert "output_processor" in inspect.signature(GPTModel.forward).parameters, RENEW
    source = inspect.getsource(GPTModel._postprocess)
    for name in ("hidden_states=hidden_states", "output_layer=self.output_layer", "output_weight=output_weight"):
        assert name in source.split("return output_processor(")[1].split(")")[0], RENEW


def _count(rank: int, folder: str) -> dict[str, Any]:
    """How often each seam is called in one pass; what of the model is left changed after it; the engine's mode."""
    from megatron.core.inference.utils import InferenceMode

    from megatron_mixtral.inference import Generator, SamplingParams, stage

    calls = []

    def count(owner: Any, name: str) -> None:
        own = getattr(owner, name)
        setattr(owner, name, lambda *args, **kwargs: calls.append(name) or own(*args, **kwargs))

    count(stage._Adjust, "__call__")
    count(stage._CacheAttention, "forward")
    count(stage.Stage, "_logits")
    generator = Generator.from_pretrained(folder)
    generator.engine._stage._plain = None  # one CPU process would go past the engine's modules
    layers = generator.engine._stage.model.decoder.layers
    before = [layer.self_attention.core_attention for layer in layers]
    generator.generate([[1, 2, 3]], SamplingParams(max_tokens=1))
    return {"calls": calls, "same": all(layer.self_attention.core_attention is one
                                        for layer, one in zip(layers, before, strict=True)),
            "left": ["_adjust_key_value_for_inference" in vars(layer.self_attention) for layer in layers],
            "mode": InferenceMode.is_active(), "attention": [type(one).__name__ for one in before]}


def test_a_pass_goes_through_each_and_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    [found] = run_ranks(1, _count, str(tiny_hf_mixtral(tmp_path / "hf")))
    assert found["calls"] == ["__call__", "forward"] * 4 + ["_logits"], RENEW
    assert found["same"] and found["left"] == [False] * 4 and found["mode"] is False
    assert found["attention"] == ["CausalAttention"] * 4
