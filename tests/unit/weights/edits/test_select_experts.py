"""Models made of parts of other models."""

import json

import pytest
import torch
from helpers.models import TINY, random_hf_directory, tensors_of

from megatron_mixtral.config import MixtralConfig
from megatron_mixtral.errors import ConfigError
from megatron_mixtral.weights.conversion import convert
from megatron_mixtral.weights.edits.select_experts import SelectedExperts, busiest, read_loads
from megatron_mixtral.weights.formats.hf_sink import HFSink
from megatron_mixtral.weights.formats.hf_source import HFSource


def test_the_busiest_experts_and_their_router_rows_are_kept(tmp_path):
    hf = random_hf_directory(tmp_path / "hf", MixtralConfig(**TINY), torch.bfloat16)
    (tmp_path / "load.json").write_text(json.dumps([[1, 5, 2, 9], [7, 7, 7, 7], [0.1, 0.2, 0.3, 0.4], [9, 1, 1, 8]]))
    experts = busiest(tmp_path / "load.json", 2, MixtralConfig(**TINY))
    assert experts == [[1, 3], [0, 1], [2, 3], [0, 3]]
    source = SelectedExperts(HFSource(hf), experts)
    convert(source, HFSink(tmp_path / "out"), verify=True)
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


def test_loads_of_a_run_are_added_up(tmp_path):
    """JSON lines: the steps' loads together, whatever else the lines hold."""
    steps = [{"iteration": 1, "expert_load": [[5, 1, 1, 1]] * 4}, {"iteration": 1, "lm_loss": 2.5},
             {"iteration": 2, "expert_load": [[0, 3, 0, 4]] * 4}]
    path = tmp_path / "loads.jsonl"
    path.write_text("".join(json.dumps(step) + "\n" for step in steps))
    assert read_loads(path) == [[5, 4, 1, 5]] * 4
    assert busiest(path, 2, MixtralConfig(**TINY)) == [[0, 3]] * 4
    with path.open("a") as file:  # killed, and gone on from a checkpoint before step 2
        file.writelines(json.dumps({"iteration": step, "expert_load": [[0, 3, 1, 4]] * 4}) + "\n" for step in (2, 3))
    assert read_loads(path) == [[5, 7, 3, 9]] * 4
    path.write_text('{"expert_load": [[1, 2]]}\n' * 2)  # without a step each line counts
    assert read_loads(path) == [[2, 4]]
    path.write_text(json.dumps(steps[0]))  # a single line
    assert read_loads(path) == [[5, 1, 1, 1]] * 4


@pytest.mark.parametrize(("text", "sentence"), [
    ("[[1, 2], 3]", "list of loads"), ("", "no line has 'expert_load'"), ("[]", "different shapes"),
    ('{"lm_loss": 1}\n{"lm_loss": 2}', "no line has 'expert_load'"), ("[[1, 2], [3", "list of loads"),
    ('{"expert_load": [[1, 2, 3, 4]]}\n{"expert_load": [[1, 2]]}', "2 different shapes"),
    ("[[1, 2, 3, 4]]", r"of \[4\] experts for 1 layers, the model has 4 experts in 4 layers"),
    ("[[1, 2], [1, 2], [1, 2], [1, 2]]", r"of \[2\] experts"),
    ("[[1, 2, 3, -4], [1, 2, 3, 4], [1, 2, 3, 4], [1, 2, 3, 4]]", "not negative"),
    ("[[1, 2, 3, NaN], [1, 2, 3, 4], [1, 2, 3, 4], [1, 2, 3, 4]]", "finite")])
def test_loads_that_cannot_be_are_refused(tmp_path, text, sentence):
    (tmp_path / "load.json").write_text(text)
    with pytest.raises(ConfigError, match=sentence) as error:
        busiest(tmp_path / "load.json", 2, MixtralConfig(**TINY))
    assert "load.json" in str(error.value)


def test_more_experts_than_there_are_cannot_be_kept(tmp_path):
    (tmp_path / "load.json").write_text(json.dumps([[1, 2, 3, 4]] * 4))
    for keep in (0, 5):
        with pytest.raises(ConfigError, match=f"--keep {keep}: expected 1 to 4"):
            busiest(tmp_path / "load.json", keep, MixtralConfig(**TINY))
