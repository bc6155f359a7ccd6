#!/usr/bin/env python3
"""Time conversions against `cp -r` of the same model, in turns, and watch the memory of all their processes.

    python benchmarks/conversion.py --layers 8 --repeats 5 --folder SCRATCH

Makes a Hugging Face Mixtral (bfloat16, hidden 2048, ffn 7168, 8 experts; 8 layers are 6 GB), then runs each command
once a round, as a program of its own, start-up included. Conversions flush to the disk before they end and `cp` does
not, so `cp -r` is shown both ways. Prints medians, throughput relative to `cp -r`, and the largest sum of the
processes' memory: their own (anonymous), and with the mapped pages of files, which are page cache.
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
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from megatron_mixtral.config import MixtralConfig  # noqa: E402
from megatron_mixtral.weights.rules import hf_tensors  # noqa: E402

UTIL = [sys.executable, str(ROOT / "tools" / "checkpoint" / "util.py"), "--saver", "mixtral"]


def make_model(folder: Path, layers: int) -> int:
    """Write the model, tensor by tensor; its size in bytes. The numbers are random bits with small exponents."""
    config = MixtralConfig(hidden_size=2048, intermediate_size=7168, num_hidden_layers=layers, num_attention_heads=16,
                           num_key_value_heads=8, num_local_experts=8)
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


def commands(folder: Path) -> dict[str, tuple[list[str], Path]]:
    """What is timed: name -> (command, its output). Later ones read what `HF -> tp2-pp2-ep2` left."""
    hf, ranks, out = folder / "hf", folder / "ranks", folder / "out"
    tp2 = ["--target-tensor-parallel-size", "2", "--target-pipeline-parallel-size", "2",
           "--target-expert-parallel-size", "2"]
    pp4 = ["--target-tensor-parallel-size", "1", "--target-pipeline-parallel-size", "4",
           "--target-expert-parallel-size", "1"]
    from_hf = [*UTIL, "--loader", "mixtral_hf", "--load-dir", str(hf), "--save-dir"]
    from_ranks = [*UTIL, "--loader", "mixtral_mg", "--load-dir", str(ranks), "--save-dir", str(out)]
    return {
        "cp -r": (["cp", "-r", str(hf), str(out)], out),
        "HF -> tp2-pp2-ep2": ([*from_hf, str(ranks), *tp2], ranks),
        "tp2-pp2-ep2 -> tp1-pp4-ep1": ([*from_ranks, *pp4], out),
        "tp2-pp2-ep2 -> HF": ([*from_ranks, "--save-model-type", "huggingface"], out),
        "HF -> torch_dist": ([*from_hf, str(out), "--target-ckpt-format", "torch_dist"], out),
    }


def main(argv: list[str] | None = None) -> int:
    """Run the rounds and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, required=True, help="scratch space of four times the model's size")
    parser.add_argument("--layers", type=int, default=8, help="a multiple of 4: 4 are 3.2 GB, 8 are 6.0 GB")
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args(argv)
    size = make_model(args.folder / "hf", args.layers)
    results: dict[str, list[tuple[float, int, int]]] = {}
    for _ in range(args.repeats):
        for name, (command, output) in commands(args.folder).items():
            shutil.rmtree(output, ignore_errors=True)
            os.sync()
            found = timed(command, args.folder / "log")
            results.setdefault(name, []).append(found)
            print(f"{name}: {found[0]:.1f} s", file=sys.stderr, flush=True)
            if name == "cp -r":
                started = time.monotonic()
                os.sync()
                results.setdefault("cp -r, flushed", []).append((found[0] + time.monotonic() - started, *found[1:]))
    shutil.rmtree(args.folder)
    base = statistics.median(seconds for seconds, _, _ in results["cp -r"])
    print(f"\n{size / 1e9:.2f} GB, {os.cpu_count()} cores, Python {platform.python_version()}, "
          f"median of {args.repeats}\n")
    print("| what | seconds (least to most) | throughput against `cp -r` | own memory | with mapped pages |")
    print("|---|---|---|---|---|")
    for name, runs in results.items():
        times = [seconds for seconds, _, _ in runs]
        middle = statistics.median(times)
        print(f"| {name} | {middle:.1f} ({min(times):.1f}-{max(times):.1f}) | {base / middle:.2f}x | "
              f"{max(own for _, own, _ in runs) / 1e6:.0f} MB | {max(whole for *_, whole in runs) / 1e6:.0f} MB |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
