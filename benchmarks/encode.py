#!/usr/bin/env python3
"""Time the encoders of preprocessing on the same text, in turns, by themselves: no reading, no writing, no processes.

    python benchmarks/encode.py --megabytes 40 --repeats 5 --output encode.json

The text is Python sources of this environment, one document a file, with the Mixtral tokenizer. Rates are megabytes of
UTF-8 per second: of processor time for one thread, and of wall time for all cores, each library with its own threads
and ours with a thread and an engine for each core. `cold` is a new engine with an empty cache each time, `warm` is the
same one once more. The encoders below 10 MB/s get every fourth document only, to keep the run short. All must give the
same number of ids; that the ids are equal is for the tests.
"""

# ruff: noqa: T201
import argparse
import json
import os
import platform
import statistics
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path

import _clone  # noqa: F401 - makes the imports below work

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import sentencepiece  # noqa: E402
import tokenizers  # noqa: E402

from examples.quickstart.hf_tokenizer import write_hf_tokenizer  # noqa: E402
from megatron_mixtral.data.text import BATCH_CHARACTERS  # noqa: E402
from megatron_mixtral.tokenizer import Tokenizer, open_tokenizer  # noqa: E402
from megatron_mixtral.tokenizer.engines import Engine, SpecialTokens, make_engine  # noqa: E402

BARE = SpecialTokens(None, None)
SLOW = ("sentencepiece", "tokenizers")
Encoder = Callable[[list[str]], int]  # texts to the number of their ids


def python_sources(megabytes: float) -> list[str]:
    """Different files of installed packages, then of the standard library, in a fixed order."""
    texts: dict[str, None] = {}
    size = 0
    for root in (sysconfig.get_path("purelib"), sysconfig.get_path("stdlib")):
        for path in sorted(Path(root).rglob("*.py")):
            text = path.read_text("utf-8", errors="ignore")
            if text and text not in texts:
                texts[text] = None
                size += len(text.encode())
                if size >= megabytes * 1e6:
                    return list(texts)
    raise SystemExit(f"only {size / 1e6:.0f} MB of Python sources found; give --megabytes")


def batches(texts: list[str]) -> Iterator[list[str]]:
    batch, characters = [], 0
    for text in texts:
        batch.append(text)
        characters += len(text)
        if characters >= BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def by_engine(engine: Engine) -> Encoder:
    return lambda texts: sum(engine.encode(batch, BARE)[0].size for batch in batches(texts))


def libraries(folder: Path) -> dict[str, Encoder]:
    """The published tokenizers, called as directly as they can be."""
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    as_json = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    as_json.encode_special_tokens = True

    def batch(texts: list[str]) -> int:
        found = (as_json.encode_batch_fast(part, add_special_tokens=False) for part in batches(texts))
        return sum(len(encoding.ids) for part in found for encoding in part)

    return {
        "sentencepiece": lambda texts: sum(len(pieces.encode(text)) for text in texts),
        "tokenizers, one by one": lambda texts: sum(
            len(as_json.encode(text, add_special_tokens=False).ids) for text in texts
        ),
        "tokenizers, batches": batch,
    }


def with_all_cores(folder: Path, tokenizer: Tokenizer) -> dict[str, Encoder]:
    """The libraries with their own threads; ours in threads, since it runs without Python's lock."""
    cores = len(os.sched_getaffinity(0))
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    as_json = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    as_json.encode_special_tokens = True
    engines = [make_engine("native", tokenizer) for _ in range(cores)]
    fast = make_engine("fastokens", tokenizer)._model  # the library's tokenizer, for its own threads

    def batch(texts: list[str]) -> int:
        return sum(len(encoding.ids) for encoding in as_json.encode_batch_fast(texts, add_special_tokens=False))

    def native(texts: list[str]) -> int:
        with ThreadPoolExecutor(cores) as pool:
            return sum(pool.map(lambda n: by_engine(engines[n])(texts[n::cores]), range(cores)))

    return {
        "sentencepiece, all cores": lambda texts: sum(map(len, pieces.encode(texts, num_threads=cores))),
        "tokenizers, all cores": batch,
        "fastokens, all cores": lambda texts: len(fast.encode_batch_flat(texts, False, True)[0]) // 4,
        "native, all cores": native,
    }


def measure(encode: Encoder, texts: list[str], clock: Callable[[], float] = time.process_time) -> tuple[float, int]:
    """(MB per second, number of ids)."""
    size = sum(len(text.encode()) for text in texts)
    start = clock()
    count = encode(texts)
    return size / 1e6 / (clock() - start), count


def one_round(
    slow: dict[str, Encoder], threaded: dict[str, Encoder], tokenizer: Tokenizer, texts: list[str]
) -> dict[str, tuple[float, int]]:
    results = {name: measure(encode, texts[::4]) for name, encode in slow.items()}
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    for name, encode in threaded.items():
        results[name] = measure(encode, texts[::4] if name.startswith(SLOW) else texts, time.perf_counter)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    for name in ("fastokens", "native"):
        engine = make_engine(name, tokenizer)
        results[f"{name}, cold"] = measure(by_engine(engine), texts)
        results[f"{name}, warm"] = measure(by_engine(engine), texts)
    return results


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--megabytes", type=float, default=40, help="of text (default 40)")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path, help="also write the figures here, as JSON")
    flags = parser.parse_args()
    texts = python_sources(flags.megabytes)
    size = sum(len(text.encode()) for text in texts)
    with tempfile.TemporaryDirectory() as name:
        write_hf_tokenizer(Path(name))
        tokenizer = open_tokenizer(Path(name) / "tokenizer.json")
        slow = libraries(Path(name))
        threaded = with_all_cores(Path(name), tokenizer)
        rounds = [one_round(slow, threaded, tokenizer, texts) for _ in range(flags.repeats)]
    counts = [{row[key][1] for row in rounds for key in row if key.startswith(SLOW) == is_slow}
              for is_slow in (True, False)]  # fmt: skip
    if any(len(count) != 1 for count in counts):
        raise SystemExit(f"the encoders disagree on the number of ids: {counts}")
    rates = {key: [row[key][0] for row in rounds] for key in rounds[0]}
    base = statistics.median(rates["tokenizers, one by one"])
    rates = {key: [round(value, 2) for value in values] for key, values in rates.items()}
    packages = ("sentencepiece", "tokenizers", "fastokens", "numpy")
    versions = {"python": platform.python_version(), **{name: version(name) for name in packages}}
    print(f"{len(texts)} documents, {size / 1e6:.1f} MB, {counts[1].pop() / 1e6:.2f} M ids; median of {flags.repeats}")
    print(f"{'encoder':<24} {'MB/s':>7} {'range':>15} {'ratio':>7}")
    for key, values in rates.items():
        middle = statistics.median(values)
        print(f"{key:<24} {middle:7.1f} {min(values):7.1f}-{max(values):<7.1f} {middle / base:6.1f}x")
    print(json.dumps(versions))
    if flags.output:
        content = {"bytes": size, "documents": len(texts), "mb_per_cpu_second": rates, "versions": versions}
        flags.output.write_text(json.dumps(content) + "\n", "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
