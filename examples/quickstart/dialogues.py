"""Sixty dialogues to fine-tune on, as OpenAI's messages, and what a model answers to their questions.

    python examples/quickstart/dialogues.py --output FILE                   writes them, as one JSON array
    python examples/quickstart/dialogues.py --dialogues FILE --answers GENERATED     counts the right answers

They ask for the capitals of twenty countries in three ways. GENERATED is what `tools/generate_mixtral.py` wrote for the
questions, in their order. The exit status is 1 where `--at-least` or `--at-most` is not kept.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

CAPITALS = {
    "Austria": "Vienna", "Brazil": "Brasilia", "Chile": "Santiago", "China": "Beijing", "Cuba": "Havana",
    "Denmark": "Copenhagen", "Egypt": "Cairo", "Finland": "Helsinki", "France": "Paris", "Greece": "Athens",
    "Iceland": "Reykjavik", "India": "New Delhi", "Italy": "Rome", "Japan": "Tokyo", "Kenya": "Nairobi",
    "Norway": "Oslo", "Peru": "Lima", "Poland": "Warsaw", "Spain": "Madrid", "Turkey": "Ankara",
}  # fmt: skip
QUESTIONS = ("What is the capital of {}?", "Which city is the capital of {}?", "Where is the government of {}?")
ANSWERS = ("{} is the capital of {}.", "{} is.", "In {}.")


def dialogues() -> list[dict]:
    """Records of `messages`, a question and its answer each."""
    found = []
    for country, city in CAPITALS.items():
        for question, answer in zip(QUESTIONS, ANSWERS, strict=True):
            found.append({"messages": [{"role": "user", "content": question.format(country)},
                                       {"role": "assistant", "content": answer.format(city, country)}]})
    return found


def right(records: Sequence[dict], generated: Sequence[dict]) -> int:
    """How many of the generated texts are the records' answers."""
    taught = [record["messages"][-1]["content"] for record in records]
    return sum(one["text"].strip() == answer for one, answer in zip(generated, taught, strict=True))


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Write sixty dialogues, or count the answers that were learned.")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the dialogues here")
    parser.add_argument("--questions", type=Path, metavar="FILE", help="and their questions, a line each, here")
    parser.add_argument("--answers", type=Path, metavar="FILE", help="count what generate wrote")
    parser.add_argument("--at-least", type=int, default=0)
    parser.add_argument("--at-most", type=int, default=10**6)
    flags = parser.parse_args(argv)
    records = dialogues()
    if flags.output:
        flags.output.write_text(json.dumps(records, indent=1) + "\n", encoding="utf-8")
        print(f"{flags.output}: {len(records)} dialogues, for example {json.dumps(records[0]['messages'])}")
    if flags.questions:
        flags.questions.write_text("".join(one["messages"][0]["content"] + "\n" for one in records), encoding="utf-8")
    if flags.answers:
        count = right(records, [json.loads(line) for line in flags.answers.read_text(encoding="utf-8").splitlines()])
        kept = flags.at_least <= count <= flags.at_most
        print(f"answers as taught|{count} of {len(records)}|{'ok' if kept else 'FAILED'}")
        return 0 if kept else 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
