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
from megatron_mixtral.weights import cli, convert, hf_tensors, open_sink, open_source
from megatron_mixtral.weights.edits import SelectedExperts, UpcycledSource
from megatron_mixtral.weights.inspection import inspect

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


def test_an_internlm2_becomes_a_mixtral_of_several_experts(models, tmp_path):
    from transformers import MixtralForCausalLM

    convert(UpcycledSource(models["internlm2"], 3, 2, router_std=1.0), open_sink(tmp_path / "out"), verify=True)
    ids = torch.arange(40).reshape(2, 20) * 7 % 96
    with torch.no_grad():
        ours, theirs = (model(ids).logits for model in (
            MixtralForCausalLM.from_pretrained(tmp_path / "out").eval(), reference("internlm2")))
    assert (ours - theirs).abs().max() < 1e-5


@pytest.mark.parametrize("kind", ["tied llama", "internlm2"])
def test_inspection_and_the_command_say_what_it_is(models, tmp_path, capsys, caplog, kind):
    caplog.set_level("INFO")
    name, size = kind.split()[-1], sum(tensor.numel() for tensor in tensors_of(models[kind]).values())
    found = inspect(models[kind])
    assert found.problem is None and f"Hugging Face, {name} (here a Mixtral of one expert)" in str(found)
    assert (found.parameters, found.bytes, found.tensors) == (size, 4 * size, len(tensors_of(models[kind])))
    assert cli.convert(["--loader", "mixtral_hf", "--load-dir", str(models[kind]), "--save-dir", str(tmp_path / "mg"),
                        "--target-tensor-parallel-size", "2"]) == 0
    assert f"is a dense {name}: converted as a Mixtral of one expert" in caplog.text
    found = inspect(tmp_path / "mg", deep=True)
    assert found.problem is None and f", {name} (here" in found.format
    assert cli.megatron_to_hf(["--megatron-checkpoint-path", str(tmp_path / "mg"), "--huggingface-checkpoint-path",
                               str(tmp_path / "back"), "--huggingface-config-path", str(models[kind])]) == 0
    assert_same_weights(tmp_path / "back", models[kind])
    assert (tmp_path / "back" / "config.json").read_bytes() == (models[kind] / "config.json").read_bytes()
    assert "tensors" in capsys.readouterr().out


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
    with pytest.raises(ConfigError, match="is a llama, whose layers have one MLP and no experts to select"):
        SelectedExperts(open_source(models["llama"]), [0])
    # A Mixtral of one expert is no dense model.
    one = tiny_hf_mixtral(tmp_path / "one", num_local_experts=1, num_experts_per_tok=1)
    assert_same_weights(there_and_back(one, tmp_path / "of-one", {}), one)
    (tmp_path / CONFIG_FILE).write_text(MixtralConfig.from_hf_dir(models["llama"]).to_json().replace(
        '"num_local_experts": 1', '"num_local_experts": 2'))
    with pytest.raises(ConfigError, match="num_local_experts is 2, and dense_config says that this is a llama"):
        MixtralConfig.from_checkpoint(tmp_path)
    for wrong, words in (({}, "must be the text of a dense model's config.json"), ("[]", "found model_type None")):
        (tmp_path / CONFIG_FILE).write_text(json.dumps({"dense_config": wrong}))
        with pytest.raises(ConfigError, match=words):
            MixtralConfig.from_checkpoint(tmp_path)


def test_an_identity_that_contradicts_itself_is_not_exported(models, tmp_path):
    convert(open_source(models["llama"]), open_sink(tmp_path / "mg", "torch_dist"))
    identity = json.loads((tmp_path / "mg" / CONFIG_FILE).read_text())
    identity["dense_config"] = identity["dense_config"].replace('"rope_theta": 500000.0', '"rope_theta": 10000.0')
    (tmp_path / "mg" / CONFIG_FILE).write_text(json.dumps(identity))
    with pytest.raises(ConfigError, match="dense_config of .* rope_theta is 10000.0, but the checkpoint's is 500000.0"):
        convert(open_source(tmp_path / "mg"), open_sink(tmp_path / "back"))
