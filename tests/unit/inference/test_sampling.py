"""The filters are those of transformers, a draw follows the probabilities, and a seed is a request's own."""

import pytest
import torch

from megatron_mixtral.inference import SamplingParams
from megatron_mixtral.inference.sampling import choose, generator_of, logprobs_of, penalized, probabilities

SEEN = [3, 3, 7, 200]


def by_transformers(logits: torch.Tensor, params: SamplingParams, seen: list[int]) -> torch.Tensor:
    from transformers import generation

    steps = [generation.RepetitionPenaltyLogitsProcessor(params.repetition_penalty),
             generation.TemperatureLogitsWarper(float(params.temperature))]
    steps += [generation.TopKLogitsWarper(params.top_k)] if params.top_k else []
    steps += [generation.TopPLogitsWarper(params.top_p)] if params.top_p < 1 else []
    scores = logits[None].clone()
    for step in steps:
        scores = step(torch.tensor([seen]), scores)
    return scores.softmax(-1)[0]


@pytest.mark.parametrize("params", [
    SamplingParams(temperature=1), SamplingParams(temperature=0.3), SamplingParams(temperature=2.5, top_k=1),
    SamplingParams(temperature=1, top_k=50), SamplingParams(temperature=0.7, top_p=0.9),
    SamplingParams(temperature=0.8, top_k=50, top_p=0.95), SamplingParams(temperature=1, top_k=40, top_p=0.75),
    SamplingParams(temperature=1.3, top_k=400, top_p=1e-9), SamplingParams(temperature=1, repetition_penalty=1.3),
    SamplingParams(temperature=0.9, top_k=20, top_p=0.8, repetition_penalty=0.5),
    SamplingParams(temperature=1, top_k=9999),
], ids=repr)
def test_filtered_probabilities_are_those_of_transformers(params) -> None:
    for seed in range(5):
        logits = 3 * torch.randn(301, generator=torch.Generator().manual_seed(seed))
        found = probabilities(penalized(logits, params.repetition_penalty, SEEN), params)
        expected = by_transformers(logits, params, SEEN)
        assert (found - expected).abs().max() < 1e-6
        assert torch.equal(found > 0, expected > 0)


def test_the_penalty_also_moves_a_greedy_choice() -> None:
    logits = torch.tensor([2.0, 1.9, -1.0])
    assert choose(logits, SamplingParams(), [0], None) == 0
    assert choose(logits, SamplingParams(repetition_penalty=1.2), [0], None) == 1
    assert logits.tolist() == pytest.approx([2.0, 1.9, -1.0])  # the caller's are left alone


def test_draws_follow_the_probabilities() -> None:
    params = SamplingParams(temperature=1, top_k=3, seed=1)
    logits = torch.tensor([0.5, 0.3, 0.1, 0.1]).log() + torch.tensor([0, 0, 0, -1e-3])
    generator = generator_of(params, 0)
    counts = torch.bincount(torch.tensor([choose(logits, params, [], generator) for _ in range(20_000)]), minlength=4)
    assert counts[3] == 0
    share = counts[:3] / 20_000
    assert (share - torch.tensor([5, 3, 1]) / 9).abs().max() < 0.015  # four standard deviations


def test_a_seed_gives_its_draws_again_and_each_continuation_has_its_own() -> None:
    logits = torch.randn(50, generator=torch.Generator().manual_seed(0))

    def draws(seed: int, index: int) -> list[int]:
        params = SamplingParams(temperature=1, seed=seed)
        generator = generator_of(params, index)
        return [choose(logits, params, [], generator) for _ in range(20)]

    assert draws(7, 0) == draws(7, 0) and draws(7, 1) == draws(7, 1)
    assert len({tuple(draws(seed, index)) for seed in (7, 8, 2**63 - 1) for index in range(3)}) == 9
    assert generator_of(SamplingParams(seed=7), 0) is None  # greedy draws nothing


def test_logprobs_are_of_the_model_itself() -> None:
    logits = torch.tensor([1.0, 3.0, 2.0])
    found = logprobs_of(logits, 2, 5)
    expected = logits.log_softmax(0).tolist()
    assert found.token_id == 2 and found.logprob == pytest.approx(expected[2])
    assert [one for one, _ in found.top] == [1, 2, 0]
    assert logprobs_of(logits, 0, 0).top == ()
