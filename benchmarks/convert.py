#!/usr/bin/env python3
"""Time conversions against `cp -r` of what they read, in turns, and watch the memory of all their processes.

    python benchmarks/convert.py --layers 8 --repeats 5 --folder SCRATCH
    python benchmarks/convert.py --layers 4 --repeats 5 --folder /dev/shm/SCRATCH --only torch_dist
    python benchmarks/convert.py --layers 4 --repeats 1 --folder SCRATCH --only transformers
    python benchmarks/convert.py --layers 4 --hidden 768 --folder SCRATCH --against OTHER_CLONE

Makes a Hugging Face Mixtral (bfloat16, hidden 2048, ffn 7168, 8 experts; 4 layers are 3.2 GB, 8 are 6 GB), then runs
each command that reads it once a round, as a program of its own, start-up included; with `--against` in turns with the
same of another clone. Then the same with what it was converted to, rank directories and a distributed checkpoint.
Before each of them its old output is removed, the disk is synchronised, and its input is read once, so that all find it
in the page cache, if it fits there. Conversions flush to the disk before they end; `cp -r` is followed by the same, and
that is what they are compared with. `transformers` is its own loading and saving of the model, which needs three times
the model's size as memory; it is run only if `--only` names it.

Prints medians, throughput relative to the copy, processor time, and the largest sum of the processes' memory: their own
(anonymous), and with the mapped pages of files, which are page cache.
"""

# ruff: noqa: T201
import argparse
import json
import os
import platform
import resource
import shutil
import statistics
import struct
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

from _clone import ROOT

from megatron_mixtral.config import MixtralConfig  # noqa: E402
from megatron_mixtral.disk import sync_tree  # noqa: E402
from megatron_mixtral.weights import hf_tensors  # noqa: E402

TRANSFORMERS = ("import sys, torch; from transformers import MixtralForCausalLM as M; "
                "M.from_pretrained(sys.argv[1], dtype=torch.bfloat16).save_pretrained(sys.argv[2])")


def make_model(folder: Path, layers: int, hidden: int) -> int:
    """Write the model, tensor by tensor; its size in bytes. The numbers are random bits with small exponents."""
    config = MixtralConfig(hidden_size=hidden, intermediate_size=hidden * 7 // 2, num_hidden_layers=layers,
                           num_attention_heads=16, num_key_value_heads=8, num_local_experts=8)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config.to_hf_dict()))
    noise = bytearray(os.urandom(1 << 24))
    noise[1::2] = bytes(0x3C | byte & 0x81 for byte in noise[1::2])
    header, at, sizes = {"__metadata__": {"format": "pt"}}, 0, []
    for name, tensor in hf_tensors(config).items():
        size = 2
        for dim in tensor.shape:
            size *= dim
        header[name] = {"dtype": "BF16", "shape": list(tensor.shape), "data_offsets": [at, at + size]}
        at += size
        sizes.append(size)
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    with open(folder / "model.safetensors", "wb") as file:
        file.write(struct.pack("<Q", len(encoded)) + encoded)
        for number, size in enumerate(sizes):
            shift = 2 * (number * 7919 % 1000)
            for start in range(0, size, len(noise) - 2000):
                file.write(noise[shift:shift + min(size - start, len(noise) - 2000)])
    return at


def memory(pid: int) -> tuple[int, int]:
    """(own, with mapped files) of a process and its children, in bytes; shared pages are divided among sharers."""
    own = whole = 0
    try:
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            key, _, rest = line.partition(":")
            if key in ("Pss", "Pss_Anon", "Pss_Shmem"):
                count = int(rest.split()[0]) * 1024
                whole += count if key == "Pss" else 0
                own += count if key != "Pss" else 0
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except (OSError, ValueError):  # it has just ended
        return own, whole
    for child in children:
        more = memory(int(child))
        own, whole = own + more[0], whole + more[1]
    return own, whole


class Run(NamedTuple):
    """What a command took: seconds of the clock and of processors, and the peaks of `memory`."""

    seconds: float
    processor: float
    own: int
    whole: int


def timed(command: list[str], log: Path) -> Run:
    """Run a command; its memory is sampled every 20 ms."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    with open(log, "wb") as output:
        started = time.monotonic()
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
        own = whole = 0
        while process.poll() is None:
            found = memory(process.pid)
            own, whole = max(own, found[0]), max(whole, found[1])
            time.sleep(0.02)
        seconds = time.monotonic() - started
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} failed: {log.read_text()[-1000:]}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return Run(seconds, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, own, whole)


def util(clone: Path, source: Path, target: Path, *more: str) -> list[str]:
    """The converting command of a clone."""
    path = f"{clone}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    return ["env", "-u", "PYTHONDONTWRITEBYTECODE", f"PYTHONPATH={path}", sys.executable,
            str(clone / "tools" / "checkpoint" / "util.py"), "--saver", "mixtral", "--loader",
            "mixtral_hf" if source.name == "hf" else "mixtral_mg", "--load-dir", str(source), "--save-dir",
            str(target), *more]


def sizes(tp: int, pp: int, ep: int) -> list[str]:
    """The flags of a layout."""
    return ["--target-tensor-parallel-size", str(tp), "--target-pipeline-parallel-size", str(pp),
            "--target-expert-parallel-size", str(ep)]


TO_HF, TO_DIST = ["--save-model-type", "huggingface"], ["--target-ckpt-format", "torch_dist"]
LAYOUT = sizes(2, 2, 2)
# What is timed, by what is read; each is made of the one before, by the flags that stand with it.
SOURCES: dict[str, tuple[list[str], dict[str, list[str]]]] = {
    "hf": ([], {
        "HF -> tp2-pp2-ep2": LAYOUT, "HF -> tp1-pp4-ep1": sizes(1, 4, 1), "HF -> torch_dist": TO_DIST,
        "HF --check-finite -> tp2-pp2-ep2": [*LAYOUT, "--check-finite"],
        "HF --verify -> tp2-pp2-ep2": [*LAYOUT, "--verify"]}),
    "ranks": (LAYOUT, {"tp2-pp2-ep2 -> tp1-pp4-ep1": sizes(1, 4, 1), "tp2-pp2-ep2 -> HF": TO_HF}),
    "dist": (TO_DIST, {"torch_dist -> HF": TO_HF, "torch_dist -> tp2-pp2-ep2": LAYOUT}),
}


def commands(source: Path, out: Path, only: list[str], against: Path | None) -> dict[str, list[str]]:
    """The commands that read a source and whose names contain one of `only` (none given: all but transformers).

    With `against`, each conversion is followed by that of the other clone. In front of them stands `cp -r`.
    """
    found = {}
    for name, flags in SOURCES[source.name][1].items():
        if not only or any(part in name for part in only):
            found[name] = util(ROOT, source, out, *flags)
            if against is not None:
                found[f"{name} ({against.name})"] = util(against, source, out, *flags)
    if source.name == "hf" and "transformers" in only:
        found["transformers"] = [sys.executable, "-c", TRANSFORMERS, str(source), str(out)]
    return {f"cp -r ({source.name})": ["cp", "-r", str(source), str(out)]} | found if found else {}


def prepare(source: Path, out: Path) -> None:
    """Remove the old output, let the disk come to rest, and read the input."""
    shutil.rmtree(out, ignore_errors=True)
    os.sync()
    for path in source.rglob("*"):
        if path.is_file():
            with open(path, "rb", buffering=0) as file:
                while file.read(1 << 24):
                    pass


def main(argv: list[str] | None = None) -> int:
    """Run the rounds and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, required=True, help="scratch space of twice the model's size")
    parser.add_argument("--layers", type=int, default=8, help="a multiple of 4: 4 are 3.2 GB, 8 are 6.1 GB")
    parser.add_argument("--hidden", type=int, default=2048, help="768 with 4 layers are 0.5 GB")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--against", type=Path, help="another clone, whose conversions are timed in turns with these")
    parser.add_argument("--only", nargs="+", default=[], help="parts of the names of what to time")
    args = parser.parse_args(argv)
    before, out = args.folder / "hf", args.folder / "out"
    size = make_model(before, args.layers, args.hidden)
    title = (f"{size / 1e9:.2f} GB, {os.cpu_count()} cores, Python {platform.python_version()}, numpy "
             f"{version('numpy')}, median of {args.repeats}")
    print(f"\n{title}\n")
    print("| what | seconds (least to most) | against the copy | processor | own memory | with mapped pages |")
    print("|---|---|---|---|---|---|", flush=True)
    for name, (flags, _) in SOURCES.items():
        source, results = args.folder / name, dict[str, list[Run]]()
        if source != before:
            shutil.rmtree(out, ignore_errors=True)
            timed(util(ROOT, before, source, *flags), args.folder / "log")
            shutil.rmtree(before)
            before = source
        for _ in range(args.repeats):
            for what, command in commands(source, out, args.only, args.against).items():
                prepare(source, out)
                run = timed(command, args.folder / "log")
                if what.startswith("cp"):
                    started = time.monotonic()
                    sync_tree(out)
                    run = run._replace(seconds=run.seconds + time.monotonic() - started)
                results.setdefault(what, []).append(run)
                print(f"{what}: {run.seconds:.2f} s, processor {run.processor:.2f} s", file=sys.stderr, flush=True)
        report(results)
    shutil.rmtree(args.folder)
    return 0


def report(results: dict[str, list[Run]]) -> None:
    """Print a source's rows of the table; the first is the copy."""
    base: float | None = None
    for what, runs in results.items():
        times = [run.seconds for run in runs]
        middle = statistics.median(times)
        base = base or middle
        print(f"| {what} | {middle:.2f} ({min(times):.2f}-{max(times):.2f}) | {base / middle:.2f}x | "
              f"{statistics.median(run.processor for run in runs):.2f} s | {max(run.own for run in runs) / 1e6:.0f} MB "
              f"| {max(run.whole for run in runs) / 1e6:.0f} MB |", flush=True)


if __name__ == "__main__":
    sys.exit(main())
