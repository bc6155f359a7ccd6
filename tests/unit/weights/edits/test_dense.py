"""A dense model becomes a Mixtral of one expert and comes back as it was: names, bits, config.json, tokenizer."""

import json
from pathlib import Path

import pytest
import torch
from helpers.dense import CODE, KINDS, reference, tiny_dense
from helpers.models import assert_same_weights, tensors_of, tiny_hf_mixtral
from reference import internlm2
from safetensors.torch import save_file

from megatron_mixtral.config import CONFIG_FILE, MixtralConfig, ParallelLayout
from megatron_mixtral.errors import CheckpointError, ConfigError
from megatron_mixtral.weights import convert, hf_tensors, open_sink, open_source

LAYOUTS = {"tp1": {}, "tp2": {"tp": 2}, "pp2": {"pp": 2}, "tp2-pp2": {"tp": 2, "pp": 2}}


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("dense")
    return {kind: tiny_dense(root / kind.replace(" ", "-"), kind) for kind in KINDS}


def there_and_back(hf: Path, root: Path, sizes: dict, form: str = "torch") -> Path:
    convert(open_source(hf), open_sink(root / "mg", form, ParallelLayout(**sizes)), verify=True)
    convert(open_source(root / "mg"), open_sink(root / "back"), verify=True)
    return root / "back"


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", KINDS)
def test_what_it_was_byte_for_byte(models, tmp_path, kind, layout):
    back = there_and_back(models[kind], tmp_path, LAYOUTS[layout])
    assert_same_weights(back, models[kind])
    same = ["config.json", "generation_config.json", CODE if kind == "internlm2" else "tokenizer_config.json"]
    for name in same:
        assert (back / name).read_bytes() == (models[kind] / name).read_bytes(), name
    identity = json.loads((tmp_path / "mg" / CONFIG_FILE).read_text())
    assert json.loads(identity["dense_config"])["model_type"] == kind.split()[-1]
    card = (back / "README.md").read_text()
    assert "moe" not in card and "experts" not in card and f"tags: [{kind.split()[-1]}]" in card


def test_by_way_of_a_distributed_checkpoint_in_parts_and_cast(models, tmp_path):
    assert_same_weights(there_and_back(models["internlm2"], tmp_path, {"tp": 2}, "torch_dist"), models["internlm2"])
    convert(open_source(tmp_path / "mg"), open_sink(tmp_path / "cast", max_shard_size="20KB"), dtype="bfloat16",
            verify=True)
    found = json.loads((tmp_path / "cast" / "config.json").read_text())
    assert found["torch_dtype"] == "bfloat16" and found["model_type"] == "internlm2"
    assert len(list((tmp_path / "cast").glob("*.safetensors"))) > 2
    cast, old = tensors_of(tmp_path / "cast"), tensors_of(models["internlm2"])
    assert cast.keys() == old.keys() and all(torch.equal(cast[name], old[name].bfloat16()) for name in old)


def test_the_renamed_llama_is_an_internlm2(models):
    """Its own forward pass, from its own names, gives the logits of the Llama that stands for it in the tests."""
    ids = torch.arange(40).reshape(2, 20) * 7 % 96
    said = json.loads((models["internlm2"] / "config.json").read_text())
    with torch.no_grad():
        ours, theirs = (internlm2.forward(tensors_of(models["internlm2"]), ids, said),
                        reference("internlm2")(ids).logits)
    assert theirs.abs().max() > 0.1 and (ours - theirs).abs().max() < 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_counted_as_what_it_is(models, kind):
    config = MixtralConfig.from_hf_dir(models[kind])
    assert (config.num_local_experts, config.num_experts_per_tok, config.router_aux_loss_coef) == (1, 1, 0.0)
    numbers = sum(p.numel() for p in reference(kind).parameters())
    assert config.total_parameters == config.active_parameters == numbers
    source = open_source(models[kind])
    routers = [tensor for tensor in hf_tensors(config).values() if tensor.rule.name == "router"]
    assert len(routers) == 4 and not any(source.fragments(one)[0].data.any() for one in routers)


@pytest.mark.parametrize(("change", "words"), [
    ({"bias": True}, "bias is true"), ({"bias": None}, None), ({"model_type": "internlm"}, "found 'internlm'"),
    ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_type = 'linear' changes the positions"),
    ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0, "original_max_position_embeddings": 32}}, "'dynamic'"),
    ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "within the trained length"),
    ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
    ({"quantization_config": {"bits": 4}}, "quantization_config"), ({"hidden_act": "gelu"}, "hidden_act")])
def test_what_no_mixtral_computes_is_refused(models, tmp_path, change, words):
    said = json.loads((models["internlm2"] / "config.json").read_text())
    if words is None:  # the model's own code takes an absent key for biases
        del said["bias"]
        change, words = {}, "which is what an absent key means"
    (tmp_path / "config.json").write_text(json.dumps(said | change))
    with pytest.raises(ConfigError, match=words) as error:
        MixtralConfig.from_hf_dir(tmp_path)
    assert str(tmp_path / "config.json") in str(error.value)


def test_files_that_do_not_fit_are_refused(models, tmp_path):
    hf = tiny_dense(tmp_path / "hf", "internlm2")
    tensors = tensors_of(hf)
    name = "model.layers.1.attention.wqkv.weight"
    for change, words in (({name: tensors[name][:-1].contiguous()}, "wqkv.weight has shape"),
                          ({"model.layers.0.attention.wqkv.bias": torch.zeros(64)}, "no internlm2 of this")):
        save_file(tensors | change, hf / "model.safetensors", {"format": "pt"})
        with pytest.raises(CheckpointError, match=words):
            open_source(hf).check()
    # Neither may be written in the other's names: the folder given as a template is of another model.
    convert(open_source(models["llama"]), open_sink(tmp_path / "mg", "torch"))
    with pytest.raises(ConfigError, match="model_type is internlm2, but the checkpoint's is llama"):
        convert(open_source(tmp_path / "mg"), open_sink(tmp_path / "back", template=models["internlm2"]))
    # A Mixtral of one expert is no dense model.
    one = tiny_hf_mixtral(tmp_path / "one", num_local_experts=1, num_experts_per_tok=1)
    assert_same_weights(there_and_back(one, tmp_path / "of-one", {}), one)
    (tmp_path / CONFIG_FILE).write_text(MixtralConfig.from_hf_dir(models["llama"]).to_json().replace(
        '"num_local_experts": 1', '"num_local_experts": 2'))
    with pytest.raises(ConfigError, match="num_local_experts is 2, and dense_config says that this is a llama"):
        MixtralConfig.from_checkpoint(tmp_path)
