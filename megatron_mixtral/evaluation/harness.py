"""lm-eval's language model over a `Generator`: its requests become scorings and continuations of the lockstep engine.

    with cli.leading(generator) as is_first:      # the other ranks follow, step by step
        if is_first:
            lm_eval.simple_evaluate(model=Harness(generator), tasks=[...])

Tokens, truncation and scores are those of lm-eval's own backend for transformers (`HFLM`), so the two may be compared.
Requests that differ in their last token alone are one scoring; those that begin alike share what a slot holds.
"""

from collections import Counter
from collections.abc import Sequence
from typing import Any

from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from megatron_mixtral.errors import ConfigError, DataError
from megatron_mixtral.inference import Completion, Generator, SamplingParams, ScoringParams

_GENERATION = {"temperature", "top_k", "top_p", "repetition_penalty"}  # of lm-eval's settings, those handed on
_NEW_TOKENS = 256  # where a task does not say: lm-eval's own default


class Harness(TemplateLM):
    """Made on rank 0, or on every rank, if every rank then asks the same.

    `counts` has, since it was made: `requests`; `requested`, the tokens of all of them; `distinct`, those of requests
    that differ in more than their last token, which is what HFLM forwards, padding apart; `read`, those that the model
    read; `kept`, those that were found in a slot; `truncated`, requests whose context was cut on the left.
    """

    def __init__(self, generator: Generator, max_length: int | None = None) -> None:
        """`max_length` is the longest context, where it is not the engine's. `ConfigError` for a generator without a
        tokenizer, or one without an end of text.
        """
        super().__init__()
        if generator.tokenizer is None or generator.tokenizer.eos_id is None:
            raise ConfigError("evaluation asks in text, and there is no tokenizer with an end of text in the model's "
                              "directory: give one (--tokenizer-model)")
        self._generator, self._tokenizer = generator, generator.tokenizer
        self.max_length = min(generator.engine.max_length, max_length or generator.engine.max_length)
        self.counts: Counter[str] = Counter()

    @property
    def eot_token_id(self) -> int:
        return self._tokenizer.eos_id

    @property
    def prefix_token_id(self) -> int:
        return self.eot_token_id if self._tokenizer.bos_id is None else self._tokenizer.bos_id

    @property
    def tokenizer_name(self) -> str:
        return str(self._tokenizer.path)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Ids of a text, one BOS in front where the tokenizer has one, unless `add_special_tokens` is False."""
        begin = [] if self._tokenizer.bos_id is None or add_special_tokens is False else [self._tokenizer.bos_id]
        return begin + self._tokenizer.encode(string)

    def _loglikelihood_tokens(self, requests: Sequence[tuple[Any, list[int], list[int]]],
                              **kwargs: Any) -> list[tuple[float, bool]]:
        """(sum of the continuation's log-probabilities, whether each of its tokens is the most probable one)."""
        keys, endings = [], {}
        for _, context, continuation in requests:
            if not continuation or len(continuation) > self.max_length:
                raise DataError(f"a continuation of {len(continuation)} tokens cannot be scored in a context of "
                                f"{self.max_length}; raise max_length (--max-length)")
            read = tuple((context + continuation)[-self.max_length - 1:-1])  # the end of a context is what counts
            key = read, len(continuation)
            keys.append(key)
            endings.setdefault(key, {})[continuation[-1]] = None  # a set that keeps its order
            self.counts.update(requests=1, requested=len(read),
                               truncated=len(context) + len(continuation) > self.max_length + 1)
        order = sorted(endings)  # neighbours share their beginnings
        self.counts["distinct"] += sum(len(read) for read, _ in order)
        asked = [ScoringParams(targets=(*((one,) for one in _inner(read, length)), tuple(endings[read, length])))
                 for read, length in order]
        found = dict(zip(order, self._ask([list(read) for read, _ in order], asked), strict=True))
        return [_result(found[key], key[1], continuation[-1])
                for key, (_, _, continuation) in zip(keys, requests, strict=True)]

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Sum of the log-probabilities of every token of each text, in windows that do not overlap."""
        windows, owners = [], []
        for owner, request in enumerate(requests):
            for pair in get_rolling_token_windows(self.tok_encode(request.args[0]), self.prefix_token_id,
                                                  max_seq_len=self.max_length, context_len=1):
                windows.append((None, *make_disjoint_window(pair)))
                owners.append(owner)
        sums = [0.0] * len(requests)
        for owner, (logprob, _) in zip(owners, self._loglikelihood_tokens(windows), strict=True):
            sums[owner] += logprob
        return sums

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """The text of each continuation, up to the first of its stop texts."""
        prompts, params, stops = [], [], []
        for seed, request in enumerate(requests):
            context, given = request.args
            settings = dict(normalize_gen_kwargs(given, _NEW_TOKENS))
            stop = [one for one in handle_stop_sequences(settings.pop("until"), eos=None) if one]
            new, sampled = settings.pop("max_gen_toks"), settings.pop("do_sample", False)
            if unknown := settings.keys() - _GENERATION:
                raise ConfigError(f"generation settings {sorted(unknown)} of a task are not known here: expected "
                                  f"until, max_gen_toks, do_sample, {', '.join(sorted(_GENERATION))}")
            if new >= self.max_length:
                raise ConfigError(f"a task asks for {new} new tokens in a context of {self.max_length}: raise "
                                  "max_length (--max-length)")
            ids = self.tok_encode(context)
            prompts.append(ids[new - self.max_length:])
            self.counts.update(requests=1, requested=len(prompts[-1]), distinct=len(prompts[-1]),
                               truncated=len(ids) > len(prompts[-1]))
            if not sampled:
                settings["temperature"] = 0.0
            params.append(SamplingParams(max_tokens=new, seed=seed, stop=tuple(stop), **settings))
            stops.append(stop)
        return [postprocess_generated_text(self._text(one), stop, None)
                for one, stop in zip(self._ask(prompts, params), stops, strict=True)]

    def _text(self, one: Completion) -> str:
        """Of the new tokens by themselves, as HFLM decodes them: without the space before the first word."""
        ids = one.token_ids[:-1] if isinstance(one.stop_reason, int) else one.token_ids
        return self._tokenizer.decode(list(ids))

    def _ask(self, prompts: list[list[int]], params: Sequence[SamplingParams | ScoringParams]) -> list[Completion]:
        """`DataError` where the model's logits are no numbers: a score of them would be one too."""
        engine = self._generator.engine
        before = engine.tokens_read, engine.tokens_kept
        found = [one for _, one in self._generator.completions(prompts, params)] if prompts else []
        self.counts.update(read=engine.tokens_read - before[0], kept=engine.tokens_kept - before[1])
        broken = next((one for one in found if one.finish_reason == "error"), None)
        if broken is not None:
            raise DataError(broken.message)
        return found


def _inner(read: Sequence[int], length: int) -> Sequence[int]:
    """The tokens of a continuation of `length` but its last: they are read as well as scored."""
    return read[len(read) - length + 1:]


def _result(one: Completion, length: int, last: int) -> tuple[float, bool]:
    """Of the continuation that ends with the token `last`, among others that differ from it in that one alone."""
    scores = [*one.logprobs[:length - 1],
              next(score for score in one.logprobs[length - 1:] if score.token_id == last)]
    return sum(score.logprob for score in scores), all(score.token_id == score.top[0][0] for score in scores)
