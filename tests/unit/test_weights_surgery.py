"""Models made of parts of other models."""

import json

import pytest
import torch
from helpers.models import TINY, random_hf_directory, tensors_of

from megatron_mixtral.config import MixtralConfig
from megatron_mixtral.errors import ConfigError
from megatron_mixtral.weights.convert import convert
from megatron_mixtral.weights.hf import HFSource
from megatron_mixtral.weights.hf_sink import HFSink
from megatron_mixtral.weights.surgery import SelectedExperts, busiest


def test_the_busiest_experts_and_their_router_rows_are_kept(tmp_path):
    hf = random_hf_directory(tmp_path / "hf", MixtralConfig(**TINY), torch.bfloat16)
    (tmp_path / "load.json").write_text(json.dumps([[1, 5, 2, 9], [7, 7, 7, 7], [0.1, 0.2, 0.3, 0.4], [9, 1, 1, 8]]))
    experts = busiest(tmp_path / "load.json", 2)
    assert experts == [[1, 3], [0, 1], [2, 3], [0, 3]]
    source = SelectedExperts(HFSource(hf), experts)
    convert(source, HFSink(tmp_path / "out", source.config), verify=True)
    assert MixtralConfig.from_hf_dir(tmp_path / "out").num_local_experts == 2
    old, new = tensors_of(hf), tensors_of(tmp_path / "out")
    for layer, kept in enumerate(experts):
        block = f"model.layers.{layer}.block_sparse_moe."
        assert torch.equal(new[block + "gate.weight"], old[block + "gate.weight"][kept])
        for number, expert in enumerate(kept):
            for part in ("w1", "w2", "w3"):
                assert torch.equal(new[f"{block}experts.{number}.{part}.weight"],
                                   old[f"{block}experts.{expert}.{part}.weight"])
    rest = [name for name in new if "block_sparse_moe" not in name]
    assert set(rest) == {name for name in old if "block_sparse_moe" not in name}
    assert all(torch.equal(new[name], old[name]) for name in rest)


def test_impossible_selections_are_refused(tmp_path):
    source = HFSource(random_hf_directory(tmp_path / "hf", MixtralConfig(**TINY)))
    for experts, sentence in (([0, 4], "0 to 3"), ([1, 1], "different"), ([2], "num_experts_per_tok 2 exceeds"),
                              ([[0, 1]], "for 1 layers"), ([[0, 1], [0, 1], [1, 2], [0, 1, 2]], "as many")):
        with pytest.raises(ConfigError, match=sentence):
            SelectedExperts(source, experts)
    (tmp_path / "load.json").write_text("[[1, 2], 3]")
    with pytest.raises(ConfigError, match="list of loads"):
        busiest(tmp_path / "load.json", 2)
