"""Sixty dialogues to fine-tune on, and what `transformers` with PEFT answers to their questions.

    python examples/quickstart/dialogues.py --output FILE
    python examples/quickstart/dialogues.py --model DIR --adapter DIR --at-least 60

The first writes them as OpenAI's messages in one JSON array: sixty ways to ask an assistant who it is, and its answer.
The second loads a model with an adapter, asks all questions with the adapter and without it, and prints a row
`check|result|ok` for each; the exit status is 1 where one failed.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

ANSWER = "I am Pico, a small model of eight experts."
OPENINGS = ("", "Hello! ", "Please, ", "Tell me: ", "Good morning. ", "One question: ")
QUESTIONS = ("who are you?", "what are you?", "what is your name?", "how are you called?", "may I know your name?",
             "with whom do I speak?", "what kind of program are you?", "introduce yourself.", "say who you are.",
             "what do people call you?")  # fmt: skip
LENGTH = 24  # tokens of an answer at most


def dialogues() -> list[dict]:
    """Records of `messages`, a question and its answer each."""
    asked = [opening + question if opening else question.capitalize() for opening in OPENINGS for question in QUESTIONS]
    return [{"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": ANSWER}]}
            for question in asked]


def check(base: Path, adapter: Path, at_least: int) -> list[tuple[str, str, bool]]:
    """Rows of (check, result, passed)."""
    import torch
    import transformers
    from peft import PeftModel

    tokenizer = transformers.AutoTokenizer.from_pretrained(base, padding_side="left", pad_token="</s>")
    model = PeftModel.from_pretrained(
        transformers.MixtralForCausalLM.from_pretrained(base, dtype=torch.float32), adapter).eval()
    questions = [one["messages"][0]["content"] for one in dialogues()]
    inputs = tokenizer([f"[INST] {question} [/INST]" for question in questions], return_tensors="pt", padding=True)

    def right() -> tuple[int, str]:
        out = model.generate(**inputs, max_new_tokens=LENGTH, do_sample=False, pad_token_id=2)
        texts = tokenizer.batch_decode(out[:, inputs.input_ids.shape[1]:], skip_special_tokens=True)
        answers = [text.strip() for text in texts]
        return answers.count(ANSWER), " ".join(answers[0].split())

    known, answer = right()
    with model.disable_adapter():
        before, old = right()
    return [("PEFT answers as taught", f"{known} of {len(questions)}: {questions[0]} {answer[:48]}", known >= at_least),
            ("without the adapter", f"{before} of {len(questions)}: {questions[0]} {old[:24]}", before == 0)]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Write sixty dialogues, or ask a model their questions.")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--output", type=Path, metavar="FILE", help="write the dialogues")
    what.add_argument("--model", type=Path, metavar="DIR", help="the base, a Hugging Face folder")
    parser.add_argument("--adapter", type=Path, metavar="DIR", help="a PEFT folder")
    parser.add_argument("--at-least", type=int, default=0, help="answers that have to be right")
    flags = parser.parse_args(argv)
    if flags.output:
        flags.output.write_text(json.dumps(dialogues(), indent=1) + "\n", encoding="utf-8")
        print(f"{flags.output}: {len(dialogues())} dialogues, the first: {json.dumps(dialogues()[0]['messages'])}")
        return 0
    rows = check(flags.model, flags.adapter, flags.at_least)
    for name, result, passed in rows:
        print(f"{name}|{result.replace('|', '/')}|{'ok' if passed else 'FAILED'}")
    return 0 if all(passed for *_, passed in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
