"""Hugging Face directories: what is read, what is written, what is refused."""

import json
import shutil
import struct
from pathlib import Path

import pytest
import torch
import yaml
from helpers.models import assert_same_weights, random_hf_directory, tensors_of, tiny_hf_mixtral
from safetensors.torch import save_file

from megatron_mixtral.config import MixtralConfig
from megatron_mixtral.errors import CheckpointError, ConfigError, MixtralError
from megatron_mixtral.weights import conversion
from megatron_mixtral.weights.conversion import convert
from megatron_mixtral.weights.formats.hf_sink import HFSink, parse_size
from megatron_mixtral.weights.formats.hf_source import HFSource
from megatron_mixtral.weights.opening import open_source

NORM = "model.layers.2.input_layernorm.weight"


@pytest.fixture(scope="module")
def original(tmp_path_factory) -> Path:
    return tiny_hf_mixtral(tmp_path_factory.mktemp("hf"), torch.bfloat16)


@pytest.fixture
def hf(original, tmp_path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "hf"))


def rewrite(directory: Path, change) -> None:
    tensors = tensors_of(directory)
    change(tensors)
    save_file({name: t.contiguous() for name, t in tensors.items()}, directory / "model.safetensors", {"format": "pt"})


def copy(source: Path, target: Path, **options) -> None:
    found = HFSource(source)
    convert(found, HFSink(target, **options))


def test_shards_index_config_and_companions(hf, tmp_path):
    (hf / "tokenizer.json").write_text("{}")
    copy(hf, tmp_path / "out", template=hf, max_shard_size="50KB")
    assert_same_weights(hf, tmp_path / "out")
    shards = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert len(shards) > 2 and shards[0] == f"model-00001-of-{len(shards):05d}.safetensors"
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors_of(hf).values())
    assert set(index["weight_map"].values()) == set(shards)
    assert (tmp_path / "out" / "tokenizer.json").exists()
    copy(tmp_path / "out", tmp_path / "again")  # the shards are read, too
    assert_same_weights(hf, tmp_path / "again")


def test_a_companion_that_cannot_be_read_is_refused(hf, tmp_path):
    (hf / "generation_config.json").write_text("{damaged")
    with pytest.raises(MixtralError, match="generation_config.json cannot be read as JSON"):
        copy(hf, tmp_path / "out")
    assert list(tmp_path.glob("*out*")) == []


@pytest.mark.parametrize("shards", ["5GB", "50KB"])
def test_transformers_loads_the_result_whole(hf, tmp_path, shards):
    from transformers import MixtralForCausalLM

    copy(hf, tmp_path / "out", max_shard_size=shards)
    model, info = MixtralForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    theirs = MixtralForCausalLM.from_pretrained(hf).state_dict()
    assert model.dtype == torch.bfloat16
    assert all(torch.equal(value, theirs[name]) for name, value in model.state_dict().items())


def test_cast_changes_config_too(hf, tmp_path):
    source = HFSource(hf)
    convert(source, HFSink(tmp_path / "out", template=hf), dtype=torch.float32)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config.get("dtype", config.get("torch_dtype")) == "float32"
    wide = tensors_of(tmp_path / "out")
    assert all(torch.equal(wide[name], t.float()) for name, t in tensors_of(hf).items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_cast_rounds_as_torch_does(tmp_path, dtype):
    wide = tiny_hf_mixtral(tmp_path / "wide")
    convert(HFSource(wide), HFSink(tmp_path / "out"), dtype=dtype)
    narrow = tensors_of(tmp_path / "out")
    assert all(torch.equal(narrow[name], tensor.to(dtype)) for name, tensor in tensors_of(wide).items())


def test_fused_names_are_read(hf, tmp_path):
    def fuse(tensors):
        for layer in range(4):
            old, new = f"model.layers.{layer}.block_sparse_moe.", f"model.layers.{layer}.mlp."
            parts = [[tensors.pop(f"{old}experts.{e}.{w}.weight") for e in range(4)] for w in ("w1", "w3", "w2")]
            tensors[new + "experts.gate_up_proj"] = torch.cat([torch.stack(parts[0]), torch.stack(parts[1])], 1)
            tensors[new + "experts.down_proj"] = torch.stack(parts[2])
            tensors[new + "gate.weight"] = tensors.pop(old + "gate.weight")

    shutil.copytree(hf, tmp_path / "fused")
    rewrite(tmp_path / "fused", fuse)
    copy(tmp_path / "fused", tmp_path / "out")
    assert_same_weights(hf, tmp_path / "out")


def test_ignorable_and_tied_extras(tmp_path):
    tied = tiny_hf_mixtral(tmp_path / "tied", tie_word_embeddings=True)
    rewrite(tied, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone(),
                                      "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}))
    copy(tied, tmp_path / "out")
    assert "lm_head.weight" not in tensors_of(tmp_path / "out")
    rewrite(tied, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"] + 1}))
    with pytest.raises(CheckpointError, match="lm_head.weight differs"):
        copy(tied, tmp_path / "out2")


CORRUPTIONS = {
    "missing": (lambda t: t.pop(NORM), NORM),
    "extra": (lambda t: t.update(surplus=torch.ones(2)), "surplus"),
    "shape": (lambda t: t.update({NORM: torch.ones(31)}), NORM),
    "transposed": (lambda t: t.update({"model.layers.0.self_attn.k_proj.weight":
                                       t["model.layers.0.self_attn.k_proj.weight"].T}), "k_proj"),
    "quantized": (lambda t: t.update({NORM: torch.ones(32, dtype=torch.int8)}), NORM),
    "twice": (lambda t: t.update({"model.layers.1.mlp.gate.weight": torch.ones(4, 32)}), "layers.1"),
}


@pytest.mark.parametrize("kind", CORRUPTIONS)
def test_corrupted_tensors_are_refused_by_name(hf, tmp_path, kind):
    change, named = CORRUPTIONS[kind]
    rewrite(hf, change)
    with pytest.raises(CheckpointError, match=named) as error:
        copy(hf, tmp_path / "out")
    assert "model.safetensors" in str(error.value) or str(hf) in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_truncated_and_garbled_files_are_refused(hf, tmp_path):
    path = hf / "model.safetensors"
    data = path.read_bytes()
    for broken in (data[:-100], data[:4], b"", struct.pack("<Q", 2**60) + data[8:], data[:8] + b"\xff" + data[9:]):
        path.write_bytes(broken)
        with pytest.raises(CheckpointError, match=r"model\.safetensors"):
            copy(hf, tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["hf"]


def test_bad_indexes_are_refused(hf, tmp_path):
    copy(hf, tmp_path / "many", max_shard_size="50KB")
    path = tmp_path / "many" / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    outside = tmp_path / "outside.safetensors"
    shutil.copyfile(hf / "model.safetensors", outside)
    for file, sentence in (("model-00099-of-00099.safetensors", "does not exist"),
                           ("../outside.safetensors", "same folder"), (str(outside), "same folder"),
                           (7, "same folder")):
        path.write_text(json.dumps(index | {"weight_map": index["weight_map"] | {NORM: file}}))
        with pytest.raises(CheckpointError, match=sentence) as error:
            HFSource(tmp_path / "many")
        assert NORM in str(error.value)
    other = next(f for f in index["weight_map"].values() if f != index["weight_map"][NORM])
    path.write_text(json.dumps(index | {"weight_map": index["weight_map"] | {NORM: other}}))
    with pytest.raises(CheckpointError, match=NORM):
        HFSource(tmp_path / "many")
    path.write_text("{}")
    with pytest.raises(CheckpointError, match="weight_map"):
        HFSource(tmp_path / "many")
    path.write_text("not json")
    with pytest.raises(MixtralError, match="index"):
        HFSource(tmp_path / "many")


@pytest.mark.parametrize(("key", "value"), [
    ("rms_norm_eps", 1e-3), ("sliding_window", 7), ("num_experts_per_tok", 1), ("num_key_value_heads", 4),
    ("rope_parameters", {"rope_theta": 77.0, "rope_type": "default"})])
def test_a_template_of_another_network_is_refused(hf, tmp_path, key, value):
    """Also where every tensor has the same shape."""
    shutil.copytree(hf, tmp_path / "other")
    said = json.loads((hf / "config.json").read_text()) | {key: value}
    (tmp_path / "other" / "config.json").write_text(json.dumps(said))
    with pytest.raises(ConfigError, match="the folder given is of another model"):
        copy(hf, tmp_path / "out", template=tmp_path / "other")


def test_targets_and_templates(hf, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "precious").write_text("x")
    with pytest.raises(CheckpointError, match="not empty"):
        copy(hf, tmp_path / "full")
    copy(hf, tmp_path / "full", replace=True)
    assert not (tmp_path / "full" / "precious").exists()
    with pytest.raises(CheckpointError, match="holds the source"):
        copy(tmp_path / "full", tmp_path / "full", replace=True)
    other = json.loads((hf / "config.json").read_text()) | {"num_hidden_layers": 8}
    (tmp_path / "full" / "config.json").write_text(json.dumps(other))
    with pytest.raises(ConfigError, match="num_hidden_layers is 8, but the checkpoint's is 4"):
        copy(hf, tmp_path / "out", template=tmp_path / "full")


def test_a_failure_while_writing_leaves_the_old_result(hf, tmp_path, monkeypatch):
    copy(hf, tmp_path / "out")
    full = OSError("No space left on device")
    monkeypatch.setattr(conversion, "write_beside", lambda *_: (_ for _ in ()).throw(full))
    with pytest.raises(CheckpointError, match="No space left"):
        copy(hf, tmp_path / "out", replace=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "out"]
    assert_same_weights(hf, tmp_path / "out")


def test_leftovers_of_a_killed_run_do_not_stop_the_next(hf, tmp_path):
    (tmp_path / ".out.partial").mkdir()
    (tmp_path / ".out.partial" / "model.safetensors").write_bytes(b"half")
    copy(hf, tmp_path / "out")
    (tmp_path / "out").rename(tmp_path / ".out.replaced")  # killed between the two renames of a replacement
    copy(hf, tmp_path / "out", replace=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "out"]


def test_sizes_and_detection(tmp_path):
    assert parse_size("5GB") == 5 * 10**9 and parse_size("1.5 MiB") == 3 * 2**19
    for text in ("", "GB", "-5GB", "5 parsec", "0GB"):
        with pytest.raises(ConfigError, match="max-shard-size"):
            parse_size(text)
    with pytest.raises(CheckpointError, match="not a Megatron checkpoint"):
        open_source(tmp_path)
    hf = random_hf_directory(tmp_path / "hf", MixtralConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1,
                                                            num_attention_heads=2, num_key_value_heads=1, vocab_size=9))
    assert isinstance(open_source(hf), HFSource)


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 4892809584\n"


@pytest.mark.parametrize(("contents", "words"), [
    (POINTER, ("git-lfs pointer", "git lfs pull")),
    (b"<!DOCTYPE html>\n<html><head>", ("web page", "download")), (b"\n  <html lang='en'>", ("web page", "download")),
])
@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "model-1.safetensors", "config.json",
                                  "model.safetensors.index.json", "pytorch_model.bin.index.json"])
def test_what_is_saved_in_the_place_of_weights_is_named_with_its_cure(hf, contents, words, name):
    if name not in ("model.safetensors", "config.json"):
        (hf / "model.safetensors").unlink()
    if name == "model-1.safetensors":
        (hf / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {NORM: name}}))
    (hf / name).write_bytes(contents)
    with pytest.raises(MixtralError) as error:
        open_source(hf)
    assert all(word in str(error.value) for word in (str(hf / name), *words))
    assert str(error.value).count(str(hf)) == 1


def test_a_folder_saved_by_automodel_is_named_with_its_cure(hf, tmp_path):
    from transformers import AutoModel

    AutoModel.from_pretrained(hf).save_pretrained(tmp_path / "bare")
    with pytest.raises(CheckpointError, match="AutoModelForCausalLM") as error:
        copy(tmp_path / "bare", tmp_path / "out")
    assert str(tmp_path / "bare") in str(error.value) and "embed_tokens.weight" in str(error.value)


def test_an_export_has_a_card_and_the_settings_of_generation(hf: Path, tmp_path: Path, monkeypatch) -> None:
    """Of weights that were never trained here it claims no training; the hub reads its head as YAML."""
    (hf / "generation_config.json").unlink(missing_ok=True)
    copy(hf, tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    head = yaml.safe_load(card.split("---")[1])
    assert head["library_name"] == "transformers" and head["pipeline_tag"] == "text-generation"
    assert f"| made from | {tmp_path.name}/hf |" in card and "| versions | megatron_mixtral " in card
    assert "steps" not in card and str(tmp_path) not in card
    monkeypatch.chdir(tmp_path)
    copy(Path("hf"), tmp_path / "beside")
    assert "| made from | hf |" in (tmp_path / "beside" / "README.md").read_text()
    settings = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert settings["eos_token_id"] == json.loads((hf / "config.json").read_text())["eos_token_id"]
    (hf / "generation_config.json").write_text('{"temperature": 0.5}')
    copy(hf, tmp_path / "again")
    assert json.loads((tmp_path / "again" / "generation_config.json").read_text()) == {"temperature": 0.5}
