"""A built model: weights drawn as wide as the configuration says, and logits of one whose every setting is unusual."""

from pathlib import Path

import torch
from helpers import engine
from helpers.damage import payload
from helpers.models import tiny_hf_mixtral
from helpers.ranks import run_ranks

from megatron_mixtral.weights import convert, open_sink, open_source

UNUSUAL = {"rms_norm_eps": 1e-2, "rope_parameters": {"rope_theta": 50.0, "rope_type": "default"}, "sliding_window": 5,
           "head_dim": 16, "num_local_experts": 5, "num_experts_per_tok": 3}


def _spreads(rank: int) -> tuple[dict[str, float], str]:
    """The standard deviation of each kind of weight of a model that is not filled, and the router's own type."""
    from megatron_mixtral.config import MixtralConfig, ParallelLayout
    from megatron_mixtral.model import build, transformer_config

    engine.set_up({})
    config = MixtralConfig(vocab_size=512, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
                           num_attention_heads=4, num_key_value_heads=2, num_local_experts=4, initializer_range=0.5,
                           max_position_embeddings=32)
    model = build(config, transformer_config(config, ParallelLayout()), max_sequence_length=32, padded_vocab_size=512)
    kinds = ("word_embeddings", "linear_qkv", "linear_fc1.weight2", "router", "output_layer")
    return {kind: float(torch.cat([parameter.flatten() for name, parameter in model.named_parameters()
                                   if kind in name]).std()) for kind in kinds}, model.config.moe_router_dtype


def test_weights_are_drawn_as_wide_as_the_configuration_says() -> None:
    [(spreads, router)] = run_ranks(1, _spreads)
    assert all(0.45 < spread < 0.55 for spread in spreads.values()), spreads
    assert router == "fp32"


def _loaded(rank: int, directory: str) -> str:
    from megatron_mixtral.errors import CheckpointError
    from megatron_mixtral.model import from_pretrained

    try:
        from_pretrained(directory)
    except CheckpointError as error:
        return str(error)
    return ""


def test_a_weight_that_a_disk_has_changed_is_not_loaded(tmp_path: Path) -> None:
    convert(open_source(tiny_hf_mixtral(tmp_path / "hf")), open_sink(tmp_path / "dist", "torch_dist"))
    assert run_ranks(1, _loaded, str(tmp_path / "dist")) == [""]
    file = tmp_path / "dist" / "release" / "__0_0.distcp"
    data, places = bytearray(file.read_bytes()), payload(file)
    data[places[len(places) // 2]] ^= 1
    file.write_bytes(data)
    [said] = run_ranks(1, _loaded, str(tmp_path / "dist"))
    assert "is not what was saved" in said and str(file) in said


def _logits(rank: int, directory: str, ids: torch.Tensor) -> tuple[torch.Tensor, bool]:
    from megatron_mixtral.model import from_pretrained

    model = from_pretrained(directory)
    with torch.no_grad():
        return model(ids, torch.arange(ids.shape[1])[None], None), model.training


def test_unusual_settings_reach_the_network(tmp_path: Path) -> None:
    from transformers import MixtralForCausalLM

    ids = torch.randint(96, (2, 24), generator=torch.Generator().manual_seed(0))
    for number, more in enumerate(({}, {"tie_word_embeddings": True, "sliding_window": None})):
        hf = tiny_hf_mixtral(tmp_path / str(number), **(UNUSUAL | more))
        reference = MixtralForCausalLM.from_pretrained(hf, dtype=torch.float32, attn_implementation="eager").eval()
        [(found, training)] = run_ranks(1, _logits, str(hf), ids)
        with torch.no_grad():
            expected = reference(ids).logits
        assert expected.abs().max() > 0.1 and (found - expected).abs().max() < 1e-5 and not training
