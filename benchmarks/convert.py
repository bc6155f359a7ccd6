#!/usr/bin/env python3
"""Time conversions against `cp -r` of the same model, in turns, and watch the memory of all their processes.

    python benchmarks/convert.py --layers 8 --repeats 5 --folder SCRATCH
    python benchmarks/convert.py --layers 8 --repeats 5 --folder SCRATCH --only torch_dist verify
    python benchmarks/convert.py --layers 4 --repeats 1 --folder SCRATCH --only transformers
    python benchmarks/convert.py --layers 4 --hidden 768 --folder SCRATCH --against OTHER_CLONE

Makes a Hugging Face Mixtral (bfloat16, hidden 2048, ffn 7168, 8 experts; 8 layers are 6 GB), then runs each command
once a round, as a program of its own, start-up included; with `--against` in turns with the same of another clone.
Before each of them its old output is removed, the disk is synchronised, and its input is read once, so that all find it
in the page cache, if it fits there. Conversions flush to the disk before they end and `cp` does not, so `cp -r` is
shown both ways. `transformers` is its own loading and saving of the model, which needs three times the model's size as
memory; it is run only if `--only` names it.

Prints medians, throughput relative to `cp -r`, and the largest sum of the processes' memory: their own (anonymous),
and with the mapped pages of files, which are page cache.
"""

# ruff: noqa: T201
import argparse
import json
import os
import platform
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


def timed(command: list[str], log: Path) -> tuple[float, int, int]:
    """Run a command: seconds, and the peaks of `memory`, sampled every 20 ms."""
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
    return seconds, own, whole


class Work(NamedTuple):
    """A command to time, the directory it reads and the one it writes."""

    command: list[str]
    source: Path
    output: Path


def commands(folder: Path, clone: Path) -> dict[str, Work]:
    """What can be timed of a clone. Later ones read what `HF -> tp2-pp2-ep2` leaves."""
    hf, ranks, out = folder / "hf", folder / "ranks", folder / "out"
    util = ["env", f"PYTHONPATH={clone}", sys.executable, str(clone / "tools" / "checkpoint" / "util.py"),
            "--saver", "mixtral"]

    def sizes(tp: int, pp: int, ep: int) -> list[str]:
        return ["--target-tensor-parallel-size", str(tp), "--target-pipeline-parallel-size", str(pp),
                "--target-expert-parallel-size", str(ep)]

    def from_hf(target: Path, *more: str) -> Work:
        return Work([*util, "--loader", "mixtral_hf", "--load-dir", str(hf), "--save-dir", str(target), *more], hf,
                    target)

    def from_ranks(*more: str) -> Work:
        return Work([*util, "--loader", "mixtral_mg", "--load-dir", str(ranks), "--save-dir", str(out), *more], ranks,
                    out)

    return {
        "cp -r": Work(["cp", "-r", str(hf), str(out)], hf, out),
        "HF -> tp2-pp2-ep2": from_hf(ranks, *sizes(2, 2, 2)),
        "tp2-pp2-ep2 -> tp1-pp4-ep1": from_ranks(*sizes(1, 4, 1)),
        "tp2-pp2-ep2 -> HF": from_ranks("--save-model-type", "huggingface"),
        "HF -> torch_dist": from_hf(out, "--target-ckpt-format", "torch_dist"),
        "HF -> tp2-pp2-ep2 --check-finite": from_hf(out, *sizes(2, 2, 2), "--check-finite"),
        "HF -> tp2-pp2-ep2 --verify": from_hf(out, *sizes(2, 2, 2), "--verify"),
        "transformers": Work([sys.executable, "-c", TRANSFORMERS, str(hf), str(out)], hf, out),
    }


def chosen(folder: Path, only: list[str], against: Path | None) -> dict[str, Work]:
    """The commands whose names contain one of `only` (none given: all but transformers), and always `cp -r`.

    With `against`, each conversion is followed by that of the other clone.
    """
    work = commands(folder, ROOT)
    names = {name for name in work for part in only if part in name} if only else set(work) - {"transformers"}
    names.add("cp -r")
    if any(work[name].source == folder / "ranks" for name in names):
        names.add("HF -> tp2-pp2-ep2")
    found = {}
    for name in work:
        if name in names:
            found[name] = work[name]
            if against is not None and "->" in name:
                found[f"{name} ({against.name})"] = commands(folder, against)[name]
    return found


def prepare(work: Work) -> None:
    """Remove the old output, let the disk come to rest, and read the input."""
    shutil.rmtree(work.output, ignore_errors=True)
    os.sync()
    for path in work.source.rglob("*"):
        if path.is_file():
            with open(path, "rb", buffering=0) as file:
                while file.read(1 << 24):
                    pass


def main(argv: list[str] | None = None) -> int:
    """Run the rounds and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, required=True, help="scratch space of four times the model's size")
    parser.add_argument("--layers", type=int, default=8, help="a multiple of 4: 4 are 3.2 GB, 8 are 6.1 GB")
    parser.add_argument("--hidden", type=int, default=2048, help="768 with 4 layers are 0.5 GB")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--against", type=Path, help="another clone, whose conversions are timed in turns with these")
    parser.add_argument("--only", nargs="+", default=[], help="parts of the names of what to time")
    args = parser.parse_args(argv)
    size = make_model(args.folder / "hf", args.layers, args.hidden)
    results: dict[str, list[tuple[float, int, int]]] = {}
    for _ in range(args.repeats):
        for name, work in chosen(args.folder, args.only, args.against).items():
            prepare(work)
            found = timed(work.command, args.folder / "log")
            results.setdefault(name, []).append(found)
            print(f"{name}: {found[0]:.1f} s", file=sys.stderr, flush=True)
            if name == "cp -r":
                started = time.monotonic()
                os.sync()
                results.setdefault("cp -r, flushed", []).append((found[0] + time.monotonic() - started, *found[1:]))
    shutil.rmtree(args.folder)
    report(results, f"{size / 1e9:.2f} GB, {os.cpu_count()} cores, Python {platform.python_version()}, numpy "
                    f"{version('numpy')}, median of {args.repeats}")
    return 0


def report(results: dict[str, list[tuple[float, int, int]]], title: str) -> None:
    """Print the table."""
    base = statistics.median(seconds for seconds, _, _ in results["cp -r"])
    print(f"\n{title}\n")
    print("| what | seconds (least to most) | throughput against `cp -r` | own memory | with mapped pages |")
    print("|---|---|---|---|---|")
    for name, runs in results.items():
        times = [seconds for seconds, _, _ in runs]
        middle = statistics.median(times)
        print(f"| {name} | {middle:.1f} ({min(times):.1f}-{max(times):.1f}) | {base / middle:.2f}x | "
              f"{max(own for _, own, _ in runs) / 1e6:.0f} MB | {max(whole for *_, whole in runs) / 1e6:.0f} MB |")


if __name__ == "__main__":
    sys.exit(main())
