"""What the harness asks of a generator: which tokens, cut on which side, each only once."""

from types import SimpleNamespace
from typing import Any

from megatron_mixtral.evaluation import Harness
from megatron_mixtral.inference import Completion, TokenLogprobs
from megatron_mixtral.tokenizer import load_tokenizer, mixtral_tokenizer_path

LENGTH = 16
LONG = "one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen"


class Recorder:
    """A generator that keeps what it is asked; every token has the log-probability -1."""

    def __init__(self) -> None:
        self.tokenizer = load_tokenizer("HuggingFaceTokenizer", mixtral_tokenizer_path())
        self.engine = SimpleNamespace(max_length=LENGTH, tokens_read=0, tokens_kept=0)
        self.asked: list[tuple[list[int], Any]] = []

    def completions(self, prompts: list[list[int]], params: list[Any]) -> Any:
        for place, (ids, one) in enumerate(zip(prompts, params, strict=True)):
            self.asked.append((ids, one))
            scores = [TokenLogprobs(token_id, -1.0, ((token_id, -1.0),))
                      for targets in getattr(one, "targets", ()) for token_id in targets]
            yield place, Completion(tuple(ids), 0, (), "", tuple(scores), "scored")


def ask(name: str, *arguments: Any) -> tuple[Harness, Recorder, list[Any]]:
    recorder = Recorder()
    harness = Harness(recorder)
    return harness, recorder, getattr(harness, name)([SimpleNamespace(args=one) for one in arguments])


def test_a_context_that_is_too_long_loses_its_beginning() -> None:
    harness, recorder, [(logprob, is_greedy)] = ask("loglikelihood", (LONG, " the end"))
    whole = harness.tok_encode(LONG + " the end")
    [(ids, params)] = recorder.asked
    assert ids == whole[-LENGTH - 1:-1] and params.targets == tuple((one,) for one in whole[-2:])
    assert (logprob, is_greedy, harness.counts["truncated"]) == (-2.0, True, 1)
    harness, recorder, _ = ask("generate_until", (LONG, {"until": ["\n"], "max_gen_toks": 5}))
    assert recorder.asked[0][0] == harness.tok_encode(LONG)[5 - LENGTH:] and recorder.asked[0][1].max_tokens == 5


def test_a_short_context_begins_with_bos_once() -> None:
    harness, recorder, _ = ask("loglikelihood", ("one", " two"), ("", "one"))
    assert [ids for ids, _ in recorder.asked] == [[1], harness.tok_encode("one")]
    assert harness.tok_encode("one").count(1) == 1 == harness.tok_encode("one")[0]


def test_choices_that_differ_in_their_last_token_are_one_scoring() -> None:
    harness, recorder, found = ask("loglikelihood", ("one", " A"), ("one", " B"), ("one", " C"), ("one", " A"))
    [(ids, params)] = recorder.asked
    assert ids == harness.tok_encode("one") and len(params.targets[-1]) == 3 and len(found) == 4
    assert harness.counts["requested"] == 4 * harness.counts["distinct"]


def test_every_token_of_a_text_is_scored_once_in_windows() -> None:
    harness, recorder, [logprob] = ask("loglikelihood_rolling", (LONG,))
    assert logprob == -len(harness.tok_encode(LONG)) and len(recorder.asked) > 1
