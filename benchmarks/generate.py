"""Generation on the CPU against `transformers`, in turns, in one process of one thread.

    python benchmarks/generate.py [--rounds 5] [--new 64]

Random models of the proportions of Mixtral-8x7B (feed-forward 3.5 times as wide, a fourth as many key-value heads, 8
experts, 2 a token, vocabulary 32,000), the same weights for both, greedy, in float32. Two sizes: 6 layers of 512, whose
weights (0.6 GB) no cache holds, as those of no useful Mixtral are held, so that a step is reading them; 12 layers of
256 (0.3 GB), where a step is half as much reading over twice as many layers. Each continues one prompt of 64 tokens,
and 8 prompts of 16 to 128 tokens, which transformers pads on the left to one length. Printed are the medians over the
rounds of the new tokens a second and of the seconds until every prompt has its first token, and the machine's load:
what else runs takes memory's bandwidth, and turns of the processor, of which one side may have more. The last ratio is
of the processor's own time, without such turns. All tokens have to be equal; the exit status is 1 where they are not.
"""

# ruff: noqa: T201
import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence

import _clone  # noqa: F401 - makes the clone importable
import torch
import transformers

from megatron_mixtral.inference import Generator, SamplingParams

SIZES = {"6 layers of 512": {"hidden_size": 512, "intermediate_size": 1792, "num_hidden_layers": 6,
                             "num_attention_heads": 8, "num_key_value_heads": 2},
         "12 layers of 256": {"hidden_size": 256, "intermediate_size": 896, "num_hidden_layers": 12,
                              "num_attention_heads": 4, "num_key_value_heads": 1}}
COMMON = {"vocab_size": 32000, "num_local_experts": 8, "num_experts_per_tok": 2, "max_position_embeddings": 512}
# New tokens of each prompt; seconds in all, until all prompts had their first, and of the processor's.
Result = tuple[list[list[int]], float, float, float]


def ours(generator: Generator, prompts: list[list[int]], new: int) -> Result:
    engine, params = generator.engine, SamplingParams(max_tokens=new, ignore_eos=True)
    found: list[list[int]] = [[] for _ in prompts]
    first, began, used = 0.0, time.perf_counter(), time.process_time()
    for place, prompt in enumerate(prompts):
        engine.add(str(place), prompt, params)
    while engine.has_work:
        for event in engine.step():
            found[int(event.request_id)] += event.token_ids
        if not first and all(found):
            first = time.perf_counter() - began
    return found, time.perf_counter() - began, first, time.process_time() - used


def theirs(model: transformers.MixtralForCausalLM, prompts: list[list[int]], new: int) -> Result:
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    times: list[float] = []

    def note(input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: object) -> torch.Tensor:
        times.append(time.perf_counter())
        return torch.zeros(len(prompts), dtype=torch.bool)

    began, used = time.perf_counter(), time.process_time()
    out = model.generate(ids, attention_mask=mask, max_new_tokens=new, do_sample=False, pad_token_id=0,
                         eos_token_id=None, stopping_criteria=transformers.StoppingCriteriaList([note]))
    tokens = out[:, longest:].tolist()
    return tokens, time.perf_counter() - began, times[0] - began, time.process_time() - used


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Compare generation with transformers, on the CPU.")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--new", type=int, default=64, help="tokens to generate for each prompt")
    flags = parser.parse_args(argv)
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    print(f"torch {torch.__version__}, transformers {transformers.__version__}, load {os.getloadavg()[0]:.1f}")
    equal = all([compare(name, SIZES[name] | COMMON, flags.rounds, flags.new) for name in SIZES])
    print("all tokens equal" if equal else "TOKENS DIFFER", f"(load {os.getloadavg()[0]:.1f})")
    return 0 if equal else 1


def compare(size: str, fields: dict[str, int], rounds: int, new: int) -> bool:
    """Print the figures of one size. Whether all tokens were equal."""
    torch.manual_seed(0)
    model = transformers.MixtralForCausalLM(transformers.MixtralConfig(**fields)).eval()
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        generator = Generator.from_pretrained(folder, max_slots=8, max_length=fields["max_position_embeddings"],
                                              prompt_chunk=1024)
    draw, equal = torch.Generator().manual_seed(1), True
    for name, lengths in {"1 prompt of 64": [64], "8 prompts of 16..128": range(16, 129, 16)}.items():
        prompts = [torch.randint(3, 32000, (length,), generator=draw).tolist() for length in lengths]
        found = [(ours(generator, prompts, new), theirs(model, prompts, new))
                 for _ in range(rounds + 1)][1:]  # the first warms both up
        equal &= all(first[0] == second[0] for first, second in found)
        seconds, firsts, used = ([statistics.median(one[side][figure] for one in found) for side in (0, 1)]
                                 for figure in (1, 2, 3))
        rates = [len(prompts) * new / one for one in seconds]
        print(f"{size}, {name}: {rates[0]:.1f} tokens/s, first after {firsts[0]:.2f} s; transformers {rates[1]:.1f} "
              f"tokens/s, first after {firsts[1]:.2f} s: {rates[0] / rates[1]:.2f}x "
              f"({used[1] / used[0]:.2f}x by the processor's time)", flush=True)
    return equal


if __name__ == "__main__":
    sys.exit(main())
