"""From the logits of one place to a token. Called on one rank of each replica; the others are told what it chose.

The rules and their order are those of transformers: repetition penalty, temperature, top-k, top-p, then a draw. Each
continuation draws from a generator of its own on the CPU, so its text depends neither on the requests beside it nor on
the layout, but for logits that differ in their last bits.
"""

from collections.abc import Sequence

import torch

from megatron_mixtral.inference.parameters import SamplingParams, TokenLogprobs

_INDEX_STEP = 0x9E3779B97F4A7C15  # keeps the seeds of a request's continuations apart: the golden ratio in 64 bits


def generator_of(params: SamplingParams, index: int) -> torch.Generator | None:
    """The random numbers of a request's continuation `index`; None where it is greedy. `params.seed` is a number."""
    if params.greedy:
        return None
    return torch.Generator().manual_seed((params.seed + index * _INDEX_STEP) % 2**63)


def penalized(logits_v: torch.Tensor, penalty: float, seen_ids: Sequence[int]) -> torch.Tensor:
    """[v]: logits of ids seen before are divided by the penalty, negative ones multiplied (CTRL, arXiv 1909.05858)."""
    if penalty == 1.0:
        return logits_v
    seen = torch.tensor(sorted(set(seen_ids)), dtype=torch.int64, device=logits_v.device)
    values = logits_v[seen]
    return logits_v.index_copy(0, seen, torch.where(values < 0, values * penalty, values / penalty))


def probabilities(logits_v: torch.Tensor, params: SamplingParams) -> torch.Tensor:
    """[v] float32 probabilities from which a token is drawn; `params` are not greedy."""
    logits = logits_v.float() / params.temperature
    if 0 < params.top_k < logits.numel():
        least = logits.topk(params.top_k).values[-1]
        logits = logits.masked_fill(logits < least, -torch.inf)
    if params.top_p < 1.0:
        ascending, order = logits.sort()
        # A token goes where it and all less probable ones hold at most 1 - top_p together; the last always stays.
        drop = ascending.softmax(0).cumsum(0) <= 1.0 - params.top_p
        drop[-1] = False
        logits = logits.masked_fill(drop.new_empty(drop.shape).index_copy(0, order, drop), -torch.inf)
    return logits.softmax(0)


def choose(logits_v: torch.Tensor, params: SamplingParams, seen_ids: Sequence[int],
           generator: torch.Generator | None) -> int:
    """The next token. `seen_ids` are the prompt and what was written so far.

    A draw takes the largest of probability / exponential random number, which is distributed as the probabilities are;
    unlike a walk along their sum it hardly ever changes with the last bits of the logits.
    """
    logits = penalized(logits_v.float(), params.repetition_penalty, seen_ids)
    if generator is None:
        return int(logits.argmax())
    found = probabilities(logits, params)
    noise = torch.empty(found.numel()).exponential_(generator=generator)
    return int((found / noise.to(found.device)).argmax())


def logprobs_of(logits_v: torch.Tensor, token_id: int, count: int) -> TokenLogprobs:
    """Of the token and of the `count` most probable ones, by the logits as the model gave them."""
    found = logits_v.float().log_softmax(0)
    values, ids = found.topk(min(count, found.numel()))
    return TokenLogprobs(token_id, float(found[token_id]), tuple(zip(ids.tolist(), values.tolist(), strict=True)))


def scores_of(logits_wv: torch.Tensor, targets: Sequence[Sequence[int]]) -> list[TokenLogprobs]:
    """Of the targets of each of the w places, by the logits as the model gave them; `top` is the place's best token."""
    found = logits_wv.float().log_softmax(-1)
    values, ids = found.max(-1)
    best = list(zip(ids.tolist(), values.tolist(), strict=True))
    return [TokenLogprobs(token_id, logprob, (top,)) for row, wanted, top in zip(found, targets, best, strict=True)
            for token_id, logprob in zip(wanted, row[list(wanted)].tolist(), strict=True)]
