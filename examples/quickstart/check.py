"""Checks an exported Mixtral with transformers alone, as its next user would.

    python examples/quickstart/check.py --model DIR --log TRAINING_LOG --data-path 0.6 A 0.4 B --split 95,5,0 \
        --seq-length 256 --samples 16 --tokenizer DIR

1. It loads, and no weight is missing or left over.
2. Its loss on the validation samples equals what the training program logged for them after its last step.
3. It continues a line of text.

    python examples/quickstart/check.py --model DIR --tokenizer DIR --written FILE

4. `tools/generate_mixtral.py` wrote the same continuation into FILE.

Prints one row `check|result` for each; the exit status is 1 when one failed.
"""

import argparse
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import torch
import transformers

from megatron_mixtral.data.datasets import blend_of, build_pretraining

LOGGED = re.compile(r"evaluation after step (\d+) \| loss ([0-9.]+)")


def load(directory: Path) -> tuple[torch.nn.Module, str]:
    """The model in fp32, and what its loading left open ('' if nothing)."""
    model, info = transformers.MixtralForCausalLM.from_pretrained(
        directory, dtype=torch.float32, output_loading_info=True)
    problems = {name: sorted(map(str, keys)) for name, keys in info.items() if keys}
    return model.eval(), "; ".join(f"{name}: {', '.join(keys)}" for name, keys in problems.items())


def validation_samples(flags: argparse.Namespace) -> list[torch.Tensor]:
    """The samples that the engine takes from the blend's validation split: ids [sequence + 1] each."""
    tokenizer = SimpleNamespace(vocab_size=flags.vocab_size, eod=flags.eod, unique_identifiers={})
    _, dataset, _ = build_pretraining(
        (0, flags.samples, 0), tokenizer=tokenizer, seq_length=flags.seq_length, seed=flags.seed,
        blend=blend_of(flags.data_path), blend_per_split=None, split=flags.split, cache=None,
        is_built_on_rank=lambda: True, reset_position_ids=False, reset_attention_mask=False, eod_mask_loss=False)
    samples = [dataset[index] for index in range(flags.samples)]
    return [torch.cat((sample["tokens"], sample["labels"][-1:])).long() for sample in samples]


@torch.no_grad()
def loss_of(model: torch.nn.Module, samples: list[torch.Tensor]) -> float:
    """Mean cross entropy in nats over all predictions."""
    losses = [model(ids[None, :-1]).logits[0].log_softmax(-1).gather(1, ids[1:, None]).neg().mean() for ids in samples]
    return torch.stack(losses).mean().item()


def logged_loss(log: Path) -> tuple[int, float]:
    """(step, loss) of the last validation in the training program's output."""
    found = LOGGED.findall(log.read_text(encoding="utf-8", errors="replace"))
    if not found:
        sys.exit(f"error: no validation loss in {log}")
    return int(found[-1][0]), float(found[-1][1])


def continuation(model: torch.nn.Module, tokenizer: Path, prompt: str, length: int) -> tuple[str, list[int]]:
    """(text on one line, token ids) of `length` greedy tokens after the prompt."""
    words = transformers.AutoTokenizer.from_pretrained(tokenizer)
    ids = words(prompt, return_tensors="pt").input_ids
    out = model.generate(ids, max_new_tokens=length, do_sample=False, repetition_penalty=1.3, pad_token_id=2)
    new = out[0, ids.shape[1]:]
    return " ".join(words.decode(new, skip_special_tokens=True).split()), new.tolist()


def compared(written: Path, expected: list[int]) -> tuple[str, str, bool]:
    """The row of what our generator wrote, which may go on where transformers stopped at the end-of-sequence id."""
    found = json.loads(written.read_text(encoding="utf-8"))["token_ids"][:len(expected)]
    same = found == expected
    result = f"{len(expected)} of {len(expected)} tokens equal transformers'" if same else f"{found} is not {expected}"
    return "it writes the same text", result, same


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Check an exported Mixtral with transformers.")
    parser.add_argument("--model", type=Path, required=True, metavar="DIR")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--log", type=Path, help="output of the training program: checks 1 to 3")
    what.add_argument("--written", type=Path, help="output of tools/generate_mixtral.py: check 4")
    parser.add_argument("--data-path", nargs="+")
    parser.add_argument("--split")
    parser.add_argument("--seq-length", type=int)
    parser.add_argument("--samples", type=int, help="eval iterations x global batch size")
    parser.add_argument("--seed", type=int, default=1234, help="the training program's --seed")
    parser.add_argument("--tokenizer", type=Path, required=True, metavar="DIR")
    parser.add_argument("--prompt", default="import os\n\ndef ")
    parser.add_argument("--tolerance", type=float, default=1e-3, help="of the loss, in nats")
    flags = parser.parse_args(argv)
    flags.vocab_size, flags.eod = 32000, 2
    return flags


def main(argv: Sequence[str] | None = None) -> int:
    flags = parse(argv)
    transformers.logging.disable_progress_bar()
    model, problems = load(flags.model)
    text, ids = continuation(model, flags.tokenizer, flags.prompt, 24)
    rows = checks(flags, model, problems, text) if flags.log else [compared(flags.written, ids)]
    for check, result, passed in rows:
        print(f"{check}|{result.replace('|', '/')}|{'ok' if passed else 'FAILED'}")
    return 0 if all(passed for *_, passed in rows) else 1


def checks(flags: argparse.Namespace, model: torch.nn.Module, problems: str,
           text: str) -> list[tuple[str, str, bool]]:
    """The rows of checks 1 to 3; `text` is the model's continuation of the prompt."""
    rows = [("transformers loads it", problems or "nothing missing, nothing unexpected", not problems)]
    step, logged = logged_loss(flags.log)
    found = loss_of(model, validation_samples(flags))
    close = abs(found - logged) <= flags.tolerance
    rows.append((f"validation loss at step {step}",
                 f"transformers {found:.4f}, Megatron {logged:.4f}" + ("" if close else ": DIFFERENT"), close))
    rows.append(("it writes text", f"{' '.join(flags.prompt.split())} {text}"[:72], bool(text)))
    return rows


if __name__ == "__main__":
    sys.exit(main())
