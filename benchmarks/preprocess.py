#!/usr/bin/env python3
"""Time preprocessing from JSON lines to `.bin/.idx`, whole programs in turns, and watch the memory of their processes.

    python benchmarks/preprocess.py --megabytes 200 --workers 2 --repeats 5 --folder SCRATCH --output preprocess.json

Runs `tools/preprocess_data.py` with each `--tokenizer-engine`, the naive pool that Megatron-LM's tool is
(`naive_pool.py`), and the encoder alone: the same texts already in memory, in as many processes as there are workers,
nothing written.

The text is Python sources of this environment, one document a file; where there are fewer than asked for, they are
repeated, each time with another rotation of their lines, so that no document occurs twice. Slow programs get a part of
the corpus (--slow-share; with 0 they are left out). The naive pool needs several seconds to start, which weigh more on
a part than on the whole: it is run on a single line as well, and what that takes is left out of the time that all
others are compared with, though theirs includes their own start. Rates are megabytes of JSON lines per second of wall
time, and per second of processor time of all processes, which other users of the machine disturb less.
"""

# ruff: noqa: T201
import argparse
import json
import multiprocessing
import os
import platform
import resource
import shutil
import statistics
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

from _clone import ROOT

from examples.quickstart.hf_tokenizer import write_hf_tokenizer  # noqa: E402
from megatron_mixtral.data.text import BATCH_CHARACTERS  # noqa: E402
from megatron_mixtral.tokenizer import open_tokenizer  # noqa: E402
from megatron_mixtral.tokenizer.engines import SpecialTokens, make_engine  # noqa: E402

ENGINES = ("native", "fastokens", "tokenizers", "sentencepiece")
SLOW = ("naive pool", "tokenizers", "sentencepiece")
STARTED = "naive pool without its start"
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


# -- the encoder alone ------------------------------------------------------------------------------------


def encode_in_memory(source: str, tokenizer_path: str, engine_name: str, workers: int) -> tuple[float, float]:
    """Seconds, and seconds of processor time, in which processes encode their share of texts already in memory."""
    context = multiprocessing.get_context("fork")
    barrier, times = context.Barrier(workers + 1), context.Queue()

    def work(number: int) -> None:
        with open(source, "rb") as stream:
            texts = [json.loads(line)["text"] for index, line in enumerate(stream) if index % workers == number]
        engine = make_engine(engine_name, open_tokenizer(Path(tokenizer_path)))
        barrier.wait()
        processor = time.process_time()
        batch, size = [], 0
        for text in texts:
            batch.append(text)
            size += len(text)
            if size >= BATCH_CHARACTERS:
                engine.encode(batch, SpecialTokens(None, EOS))
                batch, size = [], 0
        engine.encode(batch, SpecialTokens(None, EOS))
        times.put((time.monotonic(), time.process_time() - processor))

    processes = [context.Process(target=work, args=(number,)) for number in range(workers)]
    for process in processes:
        process.start()
    barrier.wait()
    started = time.monotonic()
    ended, processor = zip(*(times.get() for _ in processes), strict=True)
    for process in processes:
        process.join()
    return max(ended) - started, sum(processor)


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


def processor_time() -> float:
    """Of all children that have ended, and theirs."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def timed(command: list[str], log: Path, watch: bool) -> tuple[float, float, int]:
    """Run a program: seconds, those of processor time, and the peak of `memory` where watched, which costs time."""
    before = processor_time()
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
    return seconds, processor_time() - before, peak


def tool_command(source: Path, prefix: Path, model: Path, engine: str, workers: int) -> list[str]:
    return [sys.executable, str(ROOT / "tools" / "preprocess_data.py"), "--input", str(source), "--output-prefix",
            str(prefix), "--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", str(model), "--append-eod",
            "--workers", str(workers), "--tokenizer-engine", engine]  # fmt: skip


def programs(folder: Path, engines: list[str], workers: int) -> dict[str, tuple[list[str], Path]]:
    """name -> (command, its input)."""
    hf, whole, part = folder / "hf", folder / "corpus.jsonl", folder / "part.jsonl"
    found = {}
    if part.exists():
        arguments = (ROOT / "benchmarks" / "naive_pool.py", part, folder / "naive", hf / "tokenizer.json", workers)
        found["naive pool"] = [sys.executable, *map(str, arguments)], part
    for engine in engines:
        model = hf / ("tokenizer.model" if engine == "sentencepiece" else "tokenizer.json")
        source = part if engine in SLOW else whole
        found[engine] = tool_command(source, folder / engine, model, engine, workers), source
    return found


def check_equal(folder: Path, engines: list[str]) -> None:
    """The programs that had the same input must have written the same bytes."""
    for slow in (True, False):
        names = [f"{engine}_text_document" for engine in engines if (engine in SLOW) == slow]
        names += ["naive"] if slow and (folder / "naive.bin").exists() else []
        for end in (".bin", ".idx"):
            if len({(folder / (name + end)).read_bytes() for name in names}) > 1:
                raise SystemExit(f"the outputs differ: {names}")


def main() -> int:
    """Run the rounds and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=Path("preprocess_benchmark"), help="scratch space")
    parser.add_argument("--megabytes", type=float, default=40)
    parser.add_argument("--slow-share", type=float, default=0.2, help="of the corpus, for the slow programs")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--engines", nargs="*", choices=ENGINES, default=list(ENGINES))
    parser.add_argument("--memory-megabytes", type=float, nargs="*", default=[], help="sizes at which to watch native")
    parser.add_argument("--output", type=Path, help="also write the figures here, as JSON")
    args = parser.parse_args()
    write_hf_tokenizer(args.folder / "hf")
    count, size = write_corpus(args.folder / "corpus.jsonl", int(args.megabytes * 1e6))
    if args.slow_share:
        write_corpus(args.folder / "part.jsonl", int(args.megabytes * 1e6 * args.slow_share))
        write_corpus(args.folder / "line.jsonl", 1)
    else:
        args.engines = [engine for engine in args.engines if engine not in SLOW]
    rates, peaks = measure(args, args.folder)  # of (wall, processor)
    flat = {}
    for megabytes in args.memory_megabytes:
        write_corpus(args.folder / "memory.jsonl", int(megabytes * 1e6))
        command = tool_command(args.folder / "memory.jsonl", args.folder / "memory", args.folder / "hf", "native",
                               args.workers)  # fmt: skip
        flat[megabytes] = timed(command, args.folder / "log", watch=True)[2] / 1e6
    shutil.rmtree(args.folder)
    print_table(args, count, size, rates, peaks, flat)
    return 0


Rates = dict[str, list[tuple[float, float]]]  # MB per second of wall and of processor time, for each round


def measure(args: argparse.Namespace, folder: Path) -> tuple[Rates, dict[str, float]]:
    """The rates of every program, and the peak memory of each in MB."""
    rates: Rates = {}
    peaks: dict[str, float] = {}
    todo = programs(folder, args.engines, args.workers) if args.repeats else {}
    for _ in range(args.repeats):
        for name, (command, source) in todo.items():
            seconds, processor, _ = timed(command, folder / "log", watch=False)
            if name == "naive pool":
                on_a_line = [str(folder / "line.jsonl") if part == str(source) else part for part in command]
                on_a_line = [str(folder / "line") if part == str(folder / "naive") else part for part in on_a_line]
                start, processor_of_start, _ = timed(on_a_line, folder / "log", watch=False)
                add(rates, STARTED, source, seconds - start, processor - processor_of_start)
            add(rates, name, source, seconds, processor)
        for engine in set(args.engines) - set(SLOW):
            source = folder / "corpus.jsonl"
            found = encode_in_memory(str(source), str(folder / "hf" / "tokenizer.json"), engine, args.workers)
            add(rates, f"{engine}, encoder alone", source, *found)
        check_equal(folder, args.engines)
    for name, (command, _) in todo.items():
        peaks[name] = timed(command, folder / "log", watch=True)[2] / 1e6
    return rates, peaks


def add(rates: Rates, name: str, source: Path, seconds: float, processor: float) -> None:
    print(f"{name}: {seconds:.1f} s, {processor:.1f} s of processor time", file=sys.stderr, flush=True)
    size = source.stat().st_size / 1e6
    rates.setdefault(name, []).append((size / seconds, size / processor))


def print_table(
    args: argparse.Namespace, count: int, size: int, rates: Rates, peaks: dict[str, float], flat: dict[float, float]
) -> None:
    packages = ("tokenizers", "sentencepiece", "fastokens", "msgspec", "numpy", "torch")
    versions = {"python": platform.python_version(), **{name: version(name) for name in packages}}
    print(f"{count} documents, {size / 1e6:.0f} MB of JSON lines, {args.workers} workers, {os.cpu_count()} cores, "
          f"median of {args.repeats}\n")  # fmt: skip
    print("| program | MB/s (least to most) | against the first | MB per CPU-s | against the first | peak memory |")
    print("|---|---|---|---|---|---|")
    for name, rounds in rates.items():
        walls = [wall for wall, _ in rounds]
        wall, cpu = (statistics.median(column) for column in zip(*rounds, strict=True))
        # Round by round, since what else the machine does differs from round to round.
        pairs = list(zip(rounds, rates.get(STARTED, []), strict=False))
        against = [f"{statistics.median(ours[n] / naive[n] for ours, naive in pairs):.1f}x" if pairs else "-"
                   for n in (0, 1)]  # fmt: skip
        peak = f"{peaks[name]:.0f} MB" if name in peaks else "-"
        print(f"| {name} | {wall:.1f} ({min(walls):.1f}-{max(walls):.1f}) | {against[0]} | {cpu:.1f} | {against[1]} | "
              f"{peak} |")  # fmt: skip
    for engine in [name for name in rates if f"{name}, encoder alone" in rates]:
        pairs = list(zip(rates[engine], rates[f"{engine}, encoder alone"], strict=True))
        wall, cpu = (statistics.median(ours[n] / alone[n] for ours, alone in pairs) for n in (0, 1))
        print(f"\n{engine}, end to end against the encoder alone: {wall:.2f}, by processor time {cpu:.2f}")
    for megabytes, peak in flat.items():
        print(f"peak memory of native at {megabytes:.0f} MB: {peak:.0f} MB")
    print(json.dumps(versions))
    if args.output:
        content = {"documents": count, "bytes": size, "workers": args.workers, "mb_per_wall_and_cpu_second": rates,
                   "peak_mb": peaks, "peak_mb_of_native_by_corpus_mb": flat, "versions": versions}  # fmt: skip
        args.output.write_text(json.dumps(content) + "\n", "utf-8")


if __name__ == "__main__":
    sys.exit(main())
