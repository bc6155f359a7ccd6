"""Adapters as files: PEFT on transformers 5 reads both forms, each becomes the other, and what is amiss is refused."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from helpers.adapters import ALL, write_adapter
from helpers.models import TINY, tensors_of, tiny_hf_mixtral
from safetensors.torch import load_file, save_file

from megatron_mixtral import __main__ as commands
from megatron_mixtral.config import AdapterConfig, MixtralConfig, ParallelLayout
from megatron_mixtral.errors import CheckpointError, ConfigError
from megatron_mixtral.weights import convert, open_sink, open_source
from megatron_mixtral.weights.adapters import FreshAdapters, fingerprint
from megatron_mixtral.weights.edits import MergedSource
from megatron_mixtral.weights.rules import hf_tensors


@pytest.fixture(scope="module")
def hf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_hf_mixtral(tmp_path_factory.mktemp("hf"))


@pytest.fixture(scope="module")
def adapter(hf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_adapter(tmp_path_factory.mktemp("adapter") / "all", hf)


@pytest.fixture(scope="module")
def forms(adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("forms")
    for form in ("per-expert", "v5"):
        convert(open_source(adapter), open_sink(root / form, "peft", adapter_format=form), verify=True)
    return {form: root / form for form in ("per-expert", "v5")}


def logits_of(model: Any) -> torch.Tensor:
    ids = torch.randint(3, 96, (2, 16), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        return model(ids).logits


def base_model(hf: Path) -> Any:
    from transformers import MixtralForCausalLM

    return MixtralForCausalLM.from_pretrained(hf, dtype=torch.float32, attn_implementation="eager").eval()


@pytest.fixture(scope="module")
def merged_by_hand(hf: Path, adapter: Path) -> torch.Tensor:
    """Logits with W + alpha / rank * B A computed here, on the tensors of the files."""
    tensors, matrices = tensors_of(hf), load_file(adapter / "adapter_model.safetensors")
    for name in [name for name in matrices if ".lora_A." in name]:
        own = name.removeprefix("base_model.model.").replace(".lora_A", "")
        tensors[own] = tensors[own] + 2.0 * matrices[name.replace("lora_A", "lora_B")] @ matrices[name]
    place = adapter.parent / "by-hand"
    place.mkdir()
    save_file(tensors, place / "model.safetensors", {"format": "pt"})
    shutil.copy(hf / "config.json", place)
    return logits_of(base_model(place))


@pytest.mark.parametrize("form", ["per-expert", "v5"])
def test_peft_reads_both_forms(form: str, forms: dict, hf: Path, merged_by_hand: torch.Tensor) -> None:
    from peft import PeftModel

    model = PeftModel.from_pretrained(base_model(hf), forms[form])
    result = model.load_adapter(forms[form], "again")
    assert not [name for name in result.missing_keys if "lora" in name] and not result.unexpected_keys
    found = logits_of(model)
    assert (found - merged_by_hand).abs().max() < 1e-5
    assert (found - logits_of(base_model(hf))).abs().max() > 0.1, "the adapters must change something"


def test_each_form_becomes_the_other_to_the_bit(forms: dict, adapter: Path, tmp_path: Path) -> None:
    expected = load_file(adapter / "adapter_model.safetensors")
    for name, source in forms.items():
        convert(open_source(source), open_sink(tmp_path / name, "peft"))
        found = load_file(tmp_path / name / "adapter_model.safetensors")
        assert found.keys() == expected.keys() and all(torch.equal(found[one], expected[one]) for one in expected)
    first, second = ((tmp_path / name / "adapter_model.safetensors").read_bytes() for name in forms)
    assert first == second


@pytest.mark.parametrize("targets", [("w1", "w3"), ("w2",), ("q_proj", "v_proj"), (*ALL, "gate")], ids="-".join)
def test_other_targets(targets: tuple, hf: Path, tmp_path: Path) -> None:
    from peft import PeftModel

    adapter = write_adapter(tmp_path / "adapter", hf, targets)
    found = []
    for form in ("per-expert", "v5"):
        convert(open_source(adapter), open_sink(tmp_path / form, "peft", adapter_format=form))
        assert open_source(tmp_path / form).config.targets == tuple(sorted(
            targets, key=[*ALL, "gate"].index))
        convert(open_source(tmp_path / form), open_sink(tmp_path / f"back-{form}", "peft"))
        found.append((tmp_path / f"back-{form}" / "adapter_model.safetensors").read_bytes())
    assert found[0] == found[1]
    if "gate" in targets:
        return  # PEFT 0.21 on transformers 5 has no adapter for a router that is no linear
    convert(MergedSource(open_source(hf), open_source(adapter)), open_sink(tmp_path / "merged"))
    expected = logits_of(base_model(tmp_path / "merged"))
    for form in ("per-expert", "v5"):
        if targets != ("w1", "w3") or form == "v5":
            assert (logits_of(PeftModel.from_pretrained(base_model(hf), tmp_path / form)) - expected).abs().max() < 1e-5


def test_a_torch_file_as_xtuner_writes_is_read(adapter: Path, hf: Path, tmp_path: Path) -> None:
    torch.save(load_file(adapter / "adapter_model.safetensors"), tmp_path / "adapter_model.bin")
    said = json.loads((adapter / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(said | {"base_model_name_or_path": "elsewhere",
                                                                     "lora_dropout": 0.1}))
    with pytest.raises(ConfigError, match="give the base, --base-dir"):
        open_source(tmp_path)
    out = tmp_path / "out"
    assert commands.run("convert", ["--loader", "peft", "--load-dir", str(tmp_path), "--save-model-type", "peft",
                                    "--save-dir", str(out), "--base-dir", str(hf)]) == 0
    found, expected = (load_file(one / "adapter_model.safetensors") for one in (out, adapter))
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_distributed_checkpoint_between(forms: dict, tmp_path: Path) -> None:
    convert(open_source(forms["v5"]), open_sink(tmp_path / "dist", "torch_dist"), verify=True)
    source = open_source(tmp_path / "dist")
    assert isinstance(source.config, AdapterConfig) and source.config.rank == 4 and source.config.alpha == 8
    convert(source, open_sink(tmp_path / "peft", "peft"), verify=True)
    assert (tmp_path / "peft" / "adapter_model.safetensors").read_bytes() == (
        forms["per-expert"] / "adapter_model.safetensors").read_bytes()
    for sink in (open_sink(tmp_path / "no"), open_sink(tmp_path / "no", "torch", ParallelLayout(tp=2))):
        with pytest.raises(ConfigError, match="holds adapters, which cannot be written"):
            convert(source, sink)


def test_inspection_says_what_it_is(forms: dict, capsys: pytest.CaptureFixture) -> None:
    for form in forms.values():
        assert commands.run("inspect", [str(form)]) == 0
        found = capsys.readouterr().out
        assert "adapters of rank 4 on q_proj, k_proj, v_proj, o_proj, w1, w2, w3, whole" in found
        assert "18,944 parameters" in found


def test_a_model_is_no_adapter(hf: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds a whole model, which cannot be written"):
        convert(open_source(hf), open_sink(tmp_path / "no", "peft"))


# -- What is amiss ---------------------------------------------------------------------------------------


def changed(adapter: Path, place: Path, tensors: Any = None, **said: Any) -> Path:
    """A copy of a folder with other tensors or configuration."""
    shutil.copytree(adapter, place)
    if tensors is not None:
        own = load_file(place / "adapter_model.safetensors")
        tensors(own)
        save_file(own, place / "adapter_model.safetensors")
    config = json.loads((place / "adapter_config.json").read_text())
    (place / "adapter_config.json").write_text(json.dumps(config | said))
    return place


def test_one_expert_is_missing(adapter: Path, tmp_path: Path) -> None:
    name = "base_model.model.model.layers.1.block_sparse_moe.experts.2.w1.lora_A.weight"
    source = open_source(changed(adapter, tmp_path / "a", lambda own: own.pop(name)))
    with pytest.raises(CheckpointError, match=r"experts\.2\.w1\.lora_A\.weight is missing"):
        source.check()


def test_a_tensor_too_many_and_another_rank(adapter: Path, tmp_path: Path) -> None:
    def add(own: dict) -> None:
        own["base_model.model.model.layers.9.self_attn.q_proj.lora_A.weight"] = torch.zeros(4, 32)

    with pytest.raises(CheckpointError, match="do not have, first .*layers.9"):
        open_source(changed(adapter, tmp_path / "a", add)).check()
    with pytest.raises(CheckpointError, match=r"has shape \(4, 32\), expected \(8, 32\) by rank 8"):
        open_source(changed(adapter, tmp_path / "b", r=8)).check()


@pytest.mark.parametrize(("said", "words"), [
    ({"use_dora": True}, "use_dora is True"), ({"bias": "all"}, "bias is 'all'"), ({"peft_type": "IA3"}, "'IA3'"),
    ({"rank_pattern": {"q_proj": 8}}, "rank_pattern gives q_proj 8"), ({"modules_to_save": ["lm_head"]}, "lm_head"),
    ({"use_rslora": True}, "use_rslora"), ({"r": None}, "r is None"),
])
def test_other_kinds_of_adapters_are_refused(said: dict, words: str, adapter: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=words):
        open_source(changed(adapter, tmp_path / "a", **said))


def test_a_fused_adapter_that_mixes_w1_and_w3_is_refused(forms: dict, tmp_path: Path) -> None:
    def mix(own: dict) -> None:
        own["base_model.model.model.layers.0.mlp.experts.base_layer.lora_B.weight"][0, -1] = 1.0

    with pytest.raises(CheckpointError, match="mixes w1 and w3 of expert 3"):
        open_source(changed(forms["v5"], tmp_path / "a", mix)).check()


# -- Merging ---------------------------------------------------------------------------------------------


def test_the_merged_model_is_pefts(hf: Path, forms: dict, tmp_path: Path) -> None:
    from peft import PeftModel

    theirs = PeftModel.from_pretrained(base_model(hf), forms["per-expert"]).merge_and_unload()
    convert(MergedSource(open_source(hf), open_source(forms["v5"])), open_sink(tmp_path / "merged", template=hf))
    assert (logits_of(base_model(tmp_path / "merged")) - logits_of(theirs)).abs().max() < 1e-6


def test_every_form_and_layout_of_base_and_result(hf: Path, adapter: Path, tmp_path: Path) -> None:
    convert(MergedSource(open_source(hf), open_source(adapter)), open_sink(tmp_path / "whole"))
    convert(open_source(hf), open_sink(tmp_path / "base", "torch", ParallelLayout(tp=2, pp=2, ep=2, etp=1)))
    assert commands.run("merge-lora", [
        "--load-dir", str(tmp_path / "base"), "--adapter", str(adapter), "--save-dir", str(tmp_path / "ranks"),
        "--save-model-type", "torch", "--target-tensor-parallel-size", "2", "--target-expert-parallel-size", "2"]) == 0
    convert(open_source(tmp_path / "ranks"), open_sink(tmp_path / "back"))
    found, expected = tensors_of(tmp_path / "back"), tensors_of(tmp_path / "whole")
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_base_of_4_bits_can_be_merged_into(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Into what the run computed with, which is bitsandbytes' rounding, and how far that is from the base as stored."""
    from bitsandbytes import functional

    hf = tiny_hf_mixtral(tmp_path / "hf", hidden_size=64, intermediate_size=128, num_hidden_layers=1)
    adapter = write_adapter(tmp_path / "adapter", hf)
    (adapter / "mixtral_adapter.json").write_text('{"base": null, "quantized": true}')
    common = ["--load-dir", str(hf), "--adapter", str(adapter), "--compare-logits", "16"]
    gaps = []
    for into in ("rounded", "original"):
        assert commands.run("merge-lora", [*common, "--save-dir", str(tmp_path / into), "--into", into]) == 0
        gaps.append(float(capsys.readouterr().out.split("trained, by ")[1].split()[0]))
    assert gaps[0] < 1e-5 < 0.01 < gaps[1]
    found, base = tensors_of(tmp_path / "rounded"), tensors_of(hf)
    matrices = load_file(adapter / "adapter_model.safetensors")
    name = "model.layers.0.block_sparse_moe.experts.2.w2"
    packed, state = functional.quantize_4bit(base[f"{name}.weight"], blocksize=64, quant_type="nf4")
    a, b = (matrices[f"base_model.model.{name}.lora_{letter}.weight"] for letter in "AB")
    expected = functional.dequantize_4bit(packed, state) + 2.0 * b @ a
    assert (found[f"{name}.weight"] - expected).abs().max() < 1e-6
    assert torch.equal(found["lm_head.weight"], base["lm_head.weight"])


def test_another_base_is_refused(hf: Path, adapter: Path, tmp_path: Path) -> None:
    source = open_source(adapter)
    object.__setattr__(source.config, "base", fingerprint(open_source(hf)))
    MergedSource(open_source(hf), source).check()
    other = tiny_hf_mixtral(tmp_path / "other", seed=1)
    with pytest.raises(CheckpointError, match="on another base they mean nothing"):
        MergedSource(open_source(other), source).check()
    with pytest.raises(ConfigError, match="num_hidden_layers 4, .* has 2"):
        MergedSource(open_source(tiny_hf_mixtral(tmp_path / "small", num_hidden_layers=2)), source)


# -- Identity and new adapters ---------------------------------------------------------------------------


def test_the_fingerprint_is_of_the_weights_not_of_the_form(hf: Path, tmp_path: Path) -> None:
    expected = fingerprint(open_source(hf))
    for form, layout in (("torch", ParallelLayout(tp=2, ep=2)), ("torch_dist", None)):
        convert(open_source(hf), open_sink(tmp_path / form, form, layout))
        assert fingerprint(open_source(tmp_path / form)) == expected
    convert(open_source(hf), open_sink(tmp_path / "half"), dtype="bfloat16")
    assert fingerprint(open_source(tmp_path / "half")) != expected


def test_new_adapters_are_pefts_and_the_same_in_every_layout() -> None:
    config = AdapterConfig.of(MixtralConfig(**TINY), rank=4)
    fresh, again = FreshAdapters(config, 7), FreshAdapters(config, 7)
    a = b = 0
    for tensor in hf_tensors(config).values():
        values = fresh.fragments(tensor)[0].data.view("<f4")
        assert numpy.array_equal(values, again.fragments(tensor)[0].data.view("<f4"))
        if tensor.rule.name.endswith("_A"):
            bound = tensor.shape[1] ** -0.5
            assert 0.8 * bound < numpy.abs(values).max() <= bound
            a += 1
        else:
            assert not values.any()
            b += 1
    assert a == b == 4 * (4 + 4 * 3)
    one, other = (next(iter(hf_tensors(config).values())) for _ in range(2))
    assert not numpy.array_equal(FreshAdapters(config, 8).fragments(one)[0].data, fresh.fragments(other)[0].data)


def test_the_closed_form_of_trained_parameters() -> None:
    config = AdapterConfig.of(MixtralConfig(), rank=64)
    assert config.trained_parameters == 960_495_616
    for targets in (("q_proj",), ("k_proj", "v_proj"), ("w1", "w3", "gate"), ("o_proj", "w2")):
        some = AdapterConfig.of(MixtralConfig(), rank=8, targets=targets)
        assert some.trained_parameters == sum(numpy.prod(one.shape) for one in hf_tensors(some).values())


@pytest.mark.parametrize(("values", "words"), [
    ({"rank": 0}, "--lora-rank 0"), ({"rank": 4, "targets": ("w1",)}, "name both, or none"),
    ({"rank": 4, "targets": ("lm_head",)}, "found 'lm_head'"), ({"rank": 4, "dropout": 1.0}, "--lora-dropout 1.0"),
    ({"rank": 4, "targets": ()}, "expected some of"), ({"rank": 4, "targets": ("w2", "w2")}, "each once"),
])
def test_adapters_that_cannot_be(values: dict, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        AdapterConfig.of(MixtralConfig(), **values)
