"""`MixtralConfig` against transformers: both spellings of config.json, sizes, and what is refused."""

import dataclasses
import json

import pytest
import torch
import transformers

from megatron_mixtral.config import CONFIG_FILE, MixtralConfig, preset
from megatron_mixtral.config.mixtral import PRESETS
from megatron_mixtral.errors import ConfigError

V4_8X7B = {  # as the published Mixtral-8x7B-v0.1 has it
    "architectures": ["MixtralForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 1, "eos_token_id": 2,
    "hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.02, "intermediate_size": 14336,
    "max_position_embeddings": 32768, "model_type": "mixtral", "num_attention_heads": 32, "num_experts_per_tok": 2,
    "num_hidden_layers": 32, "num_key_value_heads": 8, "num_local_experts": 8, "output_router_logits": False,
    "rms_norm_eps": 1e-05, "rope_theta": 1000000.0, "router_aux_loss_coef": 0.02, "sliding_window": None,
    "tie_word_embeddings": False, "torch_dtype": "bfloat16", "transformers_version": "4.36.0.dev0", "use_cache": True,
    "vocab_size": 32000,
}  # fmt: skip


def meta_model(config: MixtralConfig) -> torch.nn.Module:
    """A real MixtralForCausalLM of the sizes, without memory."""
    with torch.device("meta"):
        return transformers.MixtralForCausalLM(transformers.MixtralConfig(**config.to_hf_dict()))


def test_published_config_is_the_preset():
    assert MixtralConfig.from_hf_dict(V4_8X7B) == preset("mixtral-8x7b") == preset("8x7b") == MixtralConfig()


def test_spelling_of_transformers_5():
    v5 = {key: value for key, value in V4_8X7B.items() if key not in ("rope_theta", "torch_dtype")}
    v5 |= {"rope_parameters": {"rope_theta": 500000.0, "rope_type": "default"}, "dtype": "bfloat16"}
    assert MixtralConfig.from_hf_dict(v5) == dataclasses.replace(MixtralConfig(), rope_theta=5e5)


@pytest.mark.parametrize("name", PRESETS)
def test_what_transformers_saves_is_read_back(name, tmp_path):
    """Our dictionary through the installed transformers and back, for every preset."""
    config = dataclasses.replace(preset(name), rope_theta=123456.0)
    theirs = transformers.MixtralConfig(**config.to_hf_dict("float32"))
    assert theirs.rope_parameters["rope_theta"] == 123456.0
    assert theirs.dtype in (torch.float32, "float32")
    theirs.save_pretrained(tmp_path)
    assert MixtralConfig.from_hf_dir(tmp_path) == config


def test_absent_keys_are_transformers_defaults(tmp_path):
    transformers.MixtralConfig().save_pretrained(tmp_path)
    assert MixtralConfig.from_hf_dict({"model_type": "mixtral"}) == MixtralConfig.from_hf_dir(tmp_path)


@pytest.mark.parametrize("config", [
    *PRESETS.values(),
    MixtralConfig(hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4,
                  num_key_value_heads=2, head_dim=32, num_local_experts=6, num_experts_per_tok=3, vocab_size=101),
    MixtralConfig(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
                  num_key_value_heads=1, tie_word_embeddings=True, vocab_size=77),
], ids=[*PRESETS, "odd", "tied"])
def test_total_parameters_are_those_of_a_real_model(config):
    assert config.total_parameters == sum(p.numel() for p in meta_model(config).parameters())


def test_known_counts():
    assert preset("8x7b").total_parameters == 46_702_792_704
    assert preset("8x7b").active_parameters == 12_879_925_248
    assert 13e6 < preset("tiny").total_parameters < 15e6
    # With every expert active, nothing is inactive.
    dense = dataclasses.replace(preset("tiny"), num_experts_per_tok=8)
    assert dense.active_parameters == dense.total_parameters


def test_training_flops_are_counted_by_torch():
    """Forward FLOPs of the matrix products, from the tiny model's active half, as torch's own counter sees them."""
    from torch.utils.flop_counter import FlopCounterMode

    config = dataclasses.replace(preset("tiny"), num_local_experts=2, vocab_size=512)  # both experts active
    seq_length = 64
    model = transformers.MixtralForCausalLM(transformers.MixtralConfig(**config.to_hf_dict("float32"),
                                                                       attn_implementation="eager",
                                                                       experts_implementation="eager"))
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        model(torch.zeros(1, seq_length, dtype=torch.long))
    forward = config.training_flops_per_token(seq_length) * seq_length / 3
    # torch computes the full square of scores, of which half is masked; the rotary table's outer product is extra.
    masked = 2 * config.num_hidden_layers * 2 * config.num_attention_heads * config.head_dim * seq_length**2 / 2
    assert forward + masked == pytest.approx(counter.get_total_flops(), rel=2e-3)


def test_experts_that_a_token_does_not_meet_cost_no_flops():
    """But for their rows of the router."""
    two, eight = (dataclasses.replace(preset("tiny"), num_local_experts=experts) for experts in (2, 8))
    more = eight.training_flops_per_token(64) - two.training_flops_per_token(64)
    assert more == 6 * 6 * two.num_hidden_layers * two.hidden_size


@pytest.mark.parametrize("window", [None, 16, 64, 100])
def test_a_token_is_counted_with_the_keys_that_it_sees(window):
    config, seq_length = dataclasses.replace(preset("tiny"), sliding_window=window), 64
    keys = sum(min(position + 0.5, window or seq_length) for position in range(seq_length)) / seq_length
    without = config.training_flops_per_token(seq_length) - 6 * config.num_hidden_layers * 2 * (
        config.num_attention_heads * config.head_dim * keys)
    half = dataclasses.replace(config, sliding_window=None)
    assert without == half.training_flops_per_token(seq_length) - 6 * config.num_hidden_layers * (
        config.num_attention_heads * config.head_dim * seq_length)


def test_identity_file_round_trip(tmp_path):
    config = dataclasses.replace(preset("tiny"), sliding_window=128, rope_theta=1e4)
    (tmp_path / CONFIG_FILE).write_text(config.to_json())
    assert MixtralConfig.from_checkpoint(tmp_path) == config
    (tmp_path / CONFIG_FILE).write_text(json.dumps({"num_experts": 3}))
    with pytest.raises(ConfigError, match=r"unknown keys \['num_experts'\]"):
        MixtralConfig.from_checkpoint(tmp_path)
    (tmp_path / CONFIG_FILE).write_text(json.dumps({"sliding_window": 0}))
    with pytest.raises(ConfigError, match=f"{CONFIG_FILE}: sliding_window must be"):
        MixtralConfig.from_checkpoint(tmp_path)


def test_a_list_of_end_tokens_gives_the_first():
    assert MixtralConfig.from_hf_dict(V4_8X7B | {"eos_token_id": [7, 8]}).eos_token_id == 7


@pytest.mark.parametrize(("change", "sentence"), [
    ({"model_type": "qwen2"}, "a dense relative (mistral, llama, internlm2), found 'qwen2'"),
    ({"hidden_act": "gelu"}, "hidden_act = 'gelu' is not supported"),
    ({"rope_scaling": {"type": "linear", "factor": 2}}, "rope_scaling"),
    ({"quantization_config": {"bits": 4}}, "quantization_config"),
    ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e6}}, "rope_type = 'yarn' is not supported"),
    ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}, "two different RoPE bases"),
    ({"num_experts_per_tok": 9}, "num_experts_per_tok 9 exceeds num_local_experts 8"),
    ({"num_key_value_heads": 5}, "num_attention_heads 32 is not a multiple of num_key_value_heads 5"),
    ({"hidden_size": 4097}, "hidden_size 4097 is not a multiple of num_attention_heads 32"),
    ({"head_dim": 7}, "head_dim must be an even positive integer"),
    ({"vocab_size": 0}, "vocab_size must be a positive integer, found 0"),
    ({"num_hidden_layers": "32"}, "num_hidden_layers must be a positive integer, found '32'"),
    ({"rms_norm_eps": 0}, "rms_norm_eps must be a positive number"),
    ({"rms_norm_eps": float("inf")}, "rms_norm_eps must be a positive number, found inf"),
    ({"sliding_window": "4096"}, "sliding_window must be a positive integer or null, found '4096'"),
    ({"sliding_window": 0}, "sliding_window must be a positive integer or null, found 0"),
    ({"sliding_window": -1}, "sliding_window must be a positive integer or null, found -1"),
    ({"sliding_window": True}, "sliding_window must be a positive integer or null, found True"),
    ({"rope_theta": float("inf")}, "rope_theta must be a positive number, found inf"),
    ({"rope_theta": float("nan")}, "rope_theta must be a positive number, found nan"),
    ({"rope_theta": True}, "rope_theta must be a positive number, found True"),
    ({"rope_theta": "1e6"}, "rope_theta must be a positive number, found '1e6'"),
    ({"rope_theta": 1e6, "rope_parameters": {"rope_theta": [1e6]}}, "rope_theta must be a positive number"),
    ({"rope_parameters": "default"}, "rope_parameters must be an object or null, found 'default'"),
    ({"tie_word_embeddings": "false"}, "tie_word_embeddings must be true or false, found 'false'"),
    ({"tie_word_embeddings": 0}, "tie_word_embeddings must be true or false, found 0"),
    ({"head_dim": 128.0}, "head_dim must be an even positive integer"),
    ({"router_aux_loss_coef": "0.02"}, "router_aux_loss_coef must be a number of at least 0, found '0.02'"),
    ({"router_jitter_noise": -1}, "router_jitter_noise must be a number of at least 0, found -1"),
    ({"initializer_range": float("nan")}, "initializer_range must be a number of at least 0, found nan"),
    ({"rope_scaling": {"rope_type": "default", "factor": 2}}, "rope_scaling"),
    ({"rope_scaling": {"type": "default", "rope_type": "yarn"}}, "rope_scaling"),
])  # fmt: skip
def test_refused_with_a_sentence(change, sentence):
    with pytest.raises(ConfigError) as error:
        MixtralConfig.from_hf_dict(V4_8X7B | change, where="some/config.json")
    assert sentence in str(error.value)
    assert str(error.value).startswith("some/config.json")


@pytest.mark.parametrize("scaling", [{"rope_type": "default"}, {"type": "default"}, {}])
def test_rope_scaling_that_scales_nothing_is_accepted(scaling):
    assert MixtralConfig.from_hf_dict(V4_8X7B | {"rope_scaling": scaling}) == MixtralConfig()


def test_files_that_are_no_config(tmp_path):
    with pytest.raises(ConfigError, match=r"config\.json does not exist"):
        MixtralConfig.from_hf_dir(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ConfigError, match="cannot be read as JSON"):
        MixtralConfig.from_hf_dir(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ConfigError, match="expected a JSON object, found list"):
        MixtralConfig.from_hf_dir(tmp_path)


def test_unknown_preset():
    with pytest.raises(ConfigError, match="--model 9x9b: no such preset; expected one of tiny, mixtral-4x7b"):
        preset("9x9b")
