"""What the guard of a run with adapters takes for a fault, and what it does not."""

import pytest
import torch

from megatron_mixtral.config import AdapterConfig, MixtralConfig
from megatron_mixtral.errors import ConfigError
from megatron_mixtral.lora.guards import Guard

CONFIG = AdapterConfig.of(MixtralConfig(num_hidden_layers=2, num_local_experts=2), rank=4)
NAME = "base_model.model.model.layers.{}.block_sparse_moe.experts.{}.w1.lora_B.weight"
TOKENS = torch.ones(2, 2, dtype=torch.int64)


def look(dead: str, masked: bool, tokens: torch.Tensor = TOKENS) -> Guard:
    """A guard after a step in which the adapter `dead` had no gradient."""
    sizes = {NAME.format(layer, expert): (1.0, 1.0) for layer in range(2) for expert in range(2)}
    sizes["base_model.model.model.layers.1.self_attn.q_proj.lora_B.weight"] = (1.0, 1.0)
    assert dead in sizes
    guard = Guard(CONFIG, masked)
    guard._sizes = lambda: sizes | {dead: (0.0, 0.0)}
    guard.look(tokens)
    return guard


@pytest.fixture(autouse=True)
def one_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 0)


@pytest.mark.parametrize(("dead", "masked"), [
    (NAME.format(0, 1), False), (NAME.format(1, 1), False), (NAME.format(0, 1), True),
    ("base_model.model.model.layers.1.self_attn.q_proj.lora_B.weight", True)])
def test_an_adapter_that_is_not_trained_is_a_fault(dead: str, masked: bool) -> None:
    with pytest.raises(ConfigError, match="1 of 5 adapters have no gradient after the first step"):
        look(dead, masked)


def test_an_expert_without_a_token_to_train_is_none() -> None:
    """No token at all; or, of dialogues, only those of questions in the last layer, to which no answer attends."""
    assert look(NAME.format(0, 1), False, torch.tensor([[5, 0], [3, 3]]))._done
    assert look(NAME.format(1, 1), True)._done
