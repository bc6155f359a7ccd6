#!/usr/bin/env python3
"""Time preprocessing from JSON lines to `.bin/.idx`, whole programs in turns, and watch the memory of their processes.

    python benchmarks/preprocess.py --megabytes 200 --workers 2 --repeats 5 --folder SCRATCH --output preprocess.json

Runs `tools/preprocess_data.py` with each `--tokenizer-engine`, the naive pool that Megatron-LM's tool is (below: a pool
of processes, json.loads and the tokenizer for each line, lists of ids by pickle, the engine's builder for each
document), and the encoder alone: the same texts already in memory, in as many processes as there are workers, nothing
written.

The text is Python sources of this environment, one document a file; where there are fewer than asked for, they are
repeated, each time with another rotation of their lines, so that no document occurs twice. Slow programs get a part of
the corpus (--slow-share). Rates are megabytes of JSON lines per second of wall time, start-up included.
"""

# ruff: noqa: T201
import argparse
import json
import multiprocessing
import os
import platform
import shutil
import statistics
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from megatron_mixtral.data.engines.base import SpecialTokens  # noqa: E402
from megatron_mixtral.data.engines.choose import make_engine  # noqa: E402
from megatron_mixtral.data.hf_tokenizer import write_hf_tokenizer  # noqa: E402
from megatron_mixtral.data.tokenizer import open_tokenizer  # noqa: E402

ENGINES = ("native", "gigatoken", "tokenizers", "sentencepiece")
SLOW = ("naive pool", "tokenizers", "sentencepiece")
EOS = 2


# -- the corpus -------------------------------------------------------------------------------------------


def documents() -> Iterator[str]:
    """Sources of installed packages and the standard library, in a fixed order; then again with their lines rotated."""
    roots = (sysconfig.get_path("purelib"), sysconfig.get_path("stdlib"))
    files = [path for root in roots for path in sorted(Path(root).rglob("*.py"))]
    seen = set()
    texts = []
    for path in files:
        text = path.read_text("utf-8", errors="ignore")
        if text and hash(text) not in seen:
            seen.add(hash(text))
            texts.append(path)
            yield text
    for turn in range(1, 1000):
        for path in texts:
            lines = path.read_text("utf-8", errors="ignore").splitlines(keepends=True)
            cut = turn * 7 % max(len(lines), 1)
            yield "".join(lines[cut:] + lines[:cut])


def write_corpus(path: Path, size: int) -> tuple[int, int]:
    """At least `size` bytes of JSON lines: (documents, bytes)."""
    count = written = 0
    with open(path, "w", encoding="utf-8") as stream:
        for text in documents():
            written += stream.write(json.dumps({"text": text}) + "\n")
            count += 1
            if written >= size:
                return count, written
    raise AssertionError("the sources repeat without end")


# -- the naive pool: what Megatron-LM's tool does ---------------------------------------------------------


def naive_start(tokenizer_path: str) -> None:
    import tokenizers

    global naive_tokenizer
    naive_tokenizer = tokenizers.Tokenizer.from_file(tokenizer_path)


def naive_encode(line: str) -> tuple[list[int], list[int], int]:
    ids = naive_tokenizer.encode(json.loads(line)["text"], add_special_tokens=False).ids
    ids.append(EOS)
    return ids, [len(ids)], len(line)


def naive_pool(source: str, prefix: str, tokenizer_path: str, workers: int) -> None:
    import torch
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=DType.optimal_dtype(32000))
    with open(source, encoding="utf-8") as lines, \
            multiprocessing.Pool(workers, initializer=naive_start, initargs=(tokenizer_path,)) as pool:
        for ids, lengths, _ in pool.imap(naive_encode, lines, 32):
            builder.add_document(torch.IntTensor(ids), lengths)
    builder.finalize(f"{prefix}.idx")


# -- the encoder alone ------------------------------------------------------------------------------------


def encode_in_memory(source: str, tokenizer_path: str, engine_name: str, workers: int) -> float:
    """Seconds in which `workers` processes encode their share of texts that are already in memory."""
    context = multiprocessing.get_context("fork")
    barrier, times = context.Barrier(workers + 1), context.Queue()

    def work(number: int) -> None:
        with open(source, "rb") as stream:
            texts = [json.loads(line)["text"] for index, line in enumerate(stream) if index % workers == number]
        engine = make_engine(engine_name, open_tokenizer(Path(tokenizer_path)))
        barrier.wait()
        batch, size = [], 0
        for text in texts:
            batch.append(text)
            size += len(text)
            if size >= 1 << 20:
                engine.encode(batch, SpecialTokens(None, EOS))
                batch, size = [], 0
        engine.encode(batch, SpecialTokens(None, EOS))
        times.put(time.monotonic())

    processes = [context.Process(target=work, args=(number,)) for number in range(workers)]
    for process in processes:
        process.start()
    barrier.wait()
    started = time.monotonic()
    ended = max(times.get() for _ in processes)
    for process in processes:
        process.join()
    return ended - started


# -- measuring --------------------------------------------------------------------------------------------


def memory(pid: int) -> int:
    """Proportional set size of a process and its children, in bytes."""
    total = 0
    try:
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                total = int(line.split()[1]) * 1024
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except (OSError, ValueError):  # it has just ended
        return total
    return total + sum(memory(int(child)) for child in children)


def timed(command: list[str], log: Path, watch: bool) -> tuple[float, int]:
    """Run a program: seconds, and the peak of `memory` where it is watched, which costs time itself."""
    with open(log, "wb") as output:
        started = time.monotonic()
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
        peak = 0
        while watch and process.poll() is None:
            peak = max(peak, memory(process.pid))
            time.sleep(0.02)
        process.wait()
        seconds = time.monotonic() - started
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} failed: {log.read_text()[-1500:]}")
    return seconds, peak


def tool_command(source: Path, prefix: Path, model: Path, engine: str, workers: int) -> list[str]:
    return [sys.executable, str(ROOT / "tools" / "preprocess_data.py"), "--input", str(source), "--output-prefix",
            str(prefix), "--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", str(model), "--append-eod",
            "--workers", str(workers), "--tokenizer-engine", engine]  # fmt: skip


def programs(folder: Path, engines: list[str], workers: int) -> dict[str, tuple[list[str], Path]]:
    """name -> (command, its input)."""
    hf, whole, part = folder / "hf", folder / "corpus.jsonl", folder / "part.jsonl"
    this = [sys.executable, str(Path(__file__).resolve())]
    found = {"naive pool": ([*this, "--naive", str(part), str(folder / "naive"), str(hf / "tokenizer.json"),
                             str(workers)], part)}  # fmt: skip
    for engine in engines:
        model = hf / ("tokenizer.model" if engine == "sentencepiece" else "tokenizer.json")
        source = part if engine in SLOW else whole
        found[engine] = tool_command(source, folder / engine, model, engine, workers), source
    return found


def check_equal(folder: Path, engines: list[str]) -> None:
    """The programs that had the same input must have written the same bytes."""
    for slow in (True, False):
        names = [f"{engine}_text_document" for engine in engines if (engine in SLOW) == slow] + ["naive"] * slow
        for end in (".bin", ".idx"):
            if len({(folder / (name + end)).read_bytes() for name in names}) > 1:
                raise SystemExit(f"the outputs differ: {names}")


def main() -> int:
    """Run the rounds and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--naive", nargs=4, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, default=Path("preprocess_benchmark"), help="scratch space")
    parser.add_argument("--megabytes", type=float, default=40)
    parser.add_argument("--slow-share", type=float, default=0.2, help="of the corpus, for the slow programs")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--engines", nargs="*", choices=ENGINES, default=list(ENGINES))
    parser.add_argument("--memory-megabytes", type=float, nargs="*", default=[], help="sizes at which to watch native")
    parser.add_argument("--output", type=Path, help="also write the figures here, as JSON")
    args = parser.parse_args()
    if args.naive:
        naive_pool(*args.naive[:3], int(args.naive[3]))
        return 0
    write_hf_tokenizer(args.folder / "hf")
    count, size = write_corpus(args.folder / "corpus.jsonl", int(args.megabytes * 1e6))
    write_corpus(args.folder / "part.jsonl", int(args.megabytes * 1e6 * args.slow_share))
    rates, peaks = measure(args, args.folder)
    flat = {}
    for megabytes in args.memory_megabytes:
        write_corpus(args.folder / "memory.jsonl", int(megabytes * 1e6))
        command = tool_command(args.folder / "memory.jsonl", args.folder / "memory", args.folder / "hf", "native",
                               args.workers)  # fmt: skip
        flat[megabytes] = timed(command, args.folder / "log", watch=True)[1] / 1e6
    shutil.rmtree(args.folder)
    print_table(args, count, size, rates, peaks, flat)
    return 0


def measure(args: argparse.Namespace, folder: Path) -> tuple[dict[str, list[float]], dict[str, float]]:
    """MB/s of every program in every round, and the peak memory of each in MB."""
    rates: dict[str, list[float]] = {}
    peaks: dict[str, float] = {}
    todo = programs(folder, args.engines, args.workers) if args.repeats else {}
    for _ in range(args.repeats):
        for name, (command, source) in todo.items():
            seconds, _ = timed(command, folder / "log", watch=False)
            rates.setdefault(name, []).append(source.stat().st_size / 1e6 / seconds)
            print(f"{name}: {seconds:.1f} s", file=sys.stderr, flush=True)
        for engine in set(args.engines) - set(SLOW):
            source = folder / "corpus.jsonl"
            seconds = encode_in_memory(str(source), str(folder / "hf" / "tokenizer.json"), engine, args.workers)
            rates.setdefault(f"{engine}, encoder alone", []).append(source.stat().st_size / 1e6 / seconds)
        check_equal(folder, args.engines)
    for name, (command, _) in todo.items():
        peaks[name] = timed(command, folder / "log", watch=True)[1] / 1e6
    return rates, peaks


def print_table(
    args: argparse.Namespace, count: int, size: int, rates: dict[str, list[float]], peaks: dict[str, float],
    flat: dict[float, float],
) -> None:  # fmt: skip
    packages = ("tokenizers", "sentencepiece", "gigatoken", "orjson", "numpy", "torch")
    versions = {"python": platform.python_version(), **{name: version(name) for name in packages}}
    print(f"{count} documents, {size / 1e6:.0f} MB of JSON lines, {args.workers} workers, {os.cpu_count()} cores, "
          f"median of {args.repeats}\n")  # fmt: skip
    print("| program | MB/s (least to most) | against the naive pool | peak memory, all processes |")
    print("|---|---|---|---|")
    for name, values in rates.items():
        middle, base = statistics.median(values), statistics.median(rates["naive pool"])
        peak = f"{peaks[name]:.0f} MB" if name in peaks else "-"
        print(f"| {name} | {middle:.1f} ({min(values):.1f}-{max(values):.1f}) | {middle / base:.1f}x | {peak} |")
    for engine in [name for name in rates if f"{name}, encoder alone" in rates]:
        ratios = [ours / alone for ours, alone in zip(rates[engine], rates[f"{engine}, encoder alone"], strict=True)]
        print(f"\n{engine}, end to end against the encoder alone: {statistics.median(ratios):.2f}")
    for megabytes, peak in flat.items():
        print(f"peak memory of native at {megabytes:.0f} MB: {peak:.0f} MB")
    print(json.dumps(versions))
    if args.output:
        content = {"documents": count, "bytes": size, "workers": args.workers, "mb_per_second": rates,
                   "peak_mb": peaks, "peak_mb_of_native_by_corpus_mb": flat, "versions": versions}  # fmt: skip
        args.output.write_text(json.dumps(content) + "\n", "utf-8")


if __name__ == "__main__":
    sys.exit(main())
