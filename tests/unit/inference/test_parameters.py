"""`SamplingParams`: what cannot be is refused with a sentence that says what is expected."""

import pytest

from megatron_mixtral.errors import ConfigError
from megatron_mixtral.inference import SamplingParams


@pytest.mark.parametrize(("field", "value", "said"), [
    ("max_tokens", 0, "max_tokens is 0, expected an integer of at least 1 or null"),
    ("max_tokens", 1.5, "an integer"), ("max_tokens", True, "an integer"),
    ("temperature", -0.1, "temperature is -0.1, expected a number of at least 0 (0: greedy)"),
    ("temperature", float("nan"), "a number"), ("temperature", "1", "a number"),
    ("top_k", -1, "top_k is -1, expected an integer of at least 0 (0: all tokens)"),
    ("top_p", 0, "top_p is 0, expected a number above 0 and at most 1"), ("top_p", 1.01, "at most 1"),
    ("repetition_penalty", 0, "expected a number above 0 (1: none)"),
    ("seed", -1, "seed is -1"), ("seed", 2**63, "below 2^63"), ("n", 0, "n is 0, expected an integer of at least 1"),
    ("stop", [""], "texts that are not empty"), ("stop", [3], "texts"),
    ("stop_token_ids", [-3], "stop_token_ids is -3"),
    ("logprobs", 21, "logprobs is 21, expected an integer of at least 0 and at most 20, or null"),
])
def test_what_cannot_be(field, value, said) -> None:
    with pytest.raises(ConfigError) as error:
        SamplingParams(**{field: value})
    assert said in str(error.value)


def test_lists_and_single_values_become_tuples() -> None:
    params = SamplingParams(stop=["a", "b"], stop_token_ids=[5])
    assert params.stop == ("a", "b") and params.stop_token_ids == (5,)
    assert SamplingParams(stop="end", stop_token_ids=7) == SamplingParams(stop=("end",), stop_token_ids=(7,))
    assert SamplingParams().greedy and SamplingParams(temperature=1e-300).greedy
    assert not SamplingParams(temperature=0.01).greedy
    assert hash(params) == hash(SamplingParams(stop=("a", "b"), stop_token_ids=(5,)))
