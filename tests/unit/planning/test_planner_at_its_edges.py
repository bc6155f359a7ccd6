"""The planner asked for what is odd, small, unknown or impossible: each answer against plain arithmetic."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_mixtral.config import hardware, preset
from megatron_mixtral.errors import ConfigError
from megatron_mixtral.planning import cli
from megatron_mixtral.planning.search import Question, layouts, plan
from megatron_mixtral.planning.step_time import Machine

ROOT = Path(__file__).resolve().parents[3]
ASKED = ["--model", "mixtral-8x7b", "--devices", "16", "--global-batch-size", "256"]


@pytest.mark.parametrize(("more", "sentence"), [
    (["--seq-length", "0"], "--seq-length must be positive, found 0"),
    (["--seq-length", "-4096"], "--seq-length must be positive, found -4096"),
    (["--seq-length", str(10**12)], "--seq-length 1000000000000 is longer than .* 32768"),
    (["--global-batch-size", "0"], "--global-batch-size must be positive, found 0"),
    (["--micro-batch-size", "2", "-1"], "--micro-batch-size must be positive, found -1"),
    (["--top", "0"], "--top must be positive, found 0"),
    (["--device-memory", "nan"], "--device-memory must be positive, found nan"),
    (["--device-tflops", "inf"], "--device-tflops must be positive, found inf"),
    (["--lora-rank", "0"], "--lora-rank 0 .* must be positive"),
    (["--lora-rank", "-8", "--qlora"], "--lora-rank -8 .* must be positive"),
    (["--device", "h100"], "no such device; is it h100-pcie or h100-nvl or h100-sxm[?]"),
    (["--device", "a100-80gb"], "is it a100-80g[?]"),
    (["--device", "mi300x"], "no such device[.] Known are gb200, .*; of another give --device-memory"),
    (["--device", ""], "no such device[.] Known are"),
])
def test_a_sentence_names_the_flag(more: list[str], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        list(cli.lines([*ASKED, *more]))


def test_a_device_may_be_called_as_it_is_spoken_of() -> None:
    for name in ("RTX 4090", "NVIDIA GeForce RTX 4090", "rtx_4090"):
        assert hardware.named(name) is hardware.DEVICES["rtx-4090"]


@pytest.mark.parametrize("devices", [1, 3, 7, 12, 1000])
def test_odd_numbers_of_devices(devices: int) -> None:
    """All of them are used, and a batch that they do not divide is answered with one that they do."""
    asked = ["--model", "tiny", "--seq-length", "128", "--top", "1", "--json", "--devices", str(devices)]
    with pytest.raises(ConfigError, match=f"no layout divides {devices} devices") as refused:
        list(cli.lines([*asked, "--global-batch-size", "11", "--micro-batch-size", "4"]))
    step, *near = map(int, re.search(r"here of (\d+) at least; give (.*), or", str(refused.value)).expand(
        r"\1 \2").replace("or", "").split())
    assert step % 4 == 0 and all(one % step == 0 and abs(one - 11) <= step for one in near)
    for batch in near:
        [best] = json.loads("".join(cli.lines([*asked, "--global-batch-size", str(batch), "--micro-batch-size", "4"])))
        layout = best["layout"]
        replicas = devices // (layout["tp"] * layout["pp"] * layout["cp"])
        assert layout["world"] == devices == replicas * layout["tp"] * layout["pp"] * layout["cp"]
        assert batch % (4 * replicas) == 0


def test_what_does_not_fit_is_answered_with_what_would() -> None:
    """8x22B on eight cards of 24 GB. Weights, gradients and optimizer alone are 18 bytes of 140.6 billion parameters,
    2,531 GB; 18.1 GB of a card are to be had, so 140 are too few. In 4 bits the weights are 75 GB, on eight cards 9.
    """
    asked = ["--model", "mixtral-8x22b", "--device", "rtx-4090", "--global-batch-size", "256"]
    with pytest.raises(ConfigError, match="nothing fits 8 devices of 24 GB: .*; 256 such devices are enough, or "
                                          r"adapters on these \(--lora-rank 16 --qlora\)"):
        list(cli.lines([*asked, "--devices", "8"]))
    assert 18 * preset("mixtral-8x22b").total_parameters / (0.92 * 24e9 - 4e9) > 128
    assert "layouts fit" in next(cli.lines([*asked, "--devices", "256", "--micro-batch-size", "1"]))
    assert "layouts fit 8 devices" in next(cli.lines([*asked, "--devices", "8", "--lora-rank", "16", "--qlora"]))
    with pytest.raises(ConfigError, match=r"; 32 such devices are enough, or adapters on these .*16 --qlora\)"):
        list(cli.lines([*asked, "--devices", "8", "--lora-rank", "16"]))
    # 1,000 is 8 x 125: eight ways to cut the experts, of which 17.6 billion parameters with gradients are 105 GB.
    with pytest.raises(ConfigError, match="needs 122 GB a device; 512 of them are enough: 1000 allow few layouts$"):
        list(cli.lines(["--model", "8x22b", "--devices", "1000", "--global-batch-size", "1000"]))
    assert "layouts fit 512" in next(cli.lines(["--model", "8x22b", "--devices", "512", "--global-batch-size", "1000"]))
    with pytest.raises(ConfigError, match="needs .* GB a device; 4096 such devices are not enough either$"):
        list(cli.lines([*asked, "--devices", "8", "--device-memory", "4"]))


def test_sizes_that_some_layouts_do_not_divide_leave_the_others(tmp_path: Path) -> None:
    model = preset("tiny").to_hf_dict() | {"intermediate_size": 449}
    (tmp_path / "config.json").write_text(json.dumps(model))
    asked = ["--hf-checkpoint", str(tmp_path), "--devices", "8", "--global-batch-size", "8", "--seq-length", "128"]
    found = json.loads("".join(cli.lines([*asked, "--json", "--top", "99"])))
    assert {one["layout"]["etp"] for one in found} == {1} and {one["layout"]["tp"] for one in found} > {1, 2}
    with pytest.raises(ConfigError, match="--qlora packs blocks of 64 .* intermediate_size 449 / 1"):
        list(cli.lines([*asked, "--lora-rank", "8", "--qlora"]))


def test_a_group_that_lies_in_two_nodes_has_the_link_between_them() -> None:
    """Nodes of six: of groups of four the second is ranks 4 to 7. Alone in a node any group is inside."""
    six, alone = Machine(12, devices_per_node=6), Machine(6, devices_per_node=8)
    assert six.link(4) == six.link(12) == six.inter_node_gbps / six.intra_node_gbps * six.link(3)
    assert alone.link(6) == alone.link(4) == alone.link(1)
    assert {layout.tp for layout in layouts(preset("mixtral-8x7b"), six)} == {1, 2}
    assert {layout.tp for layout in layouts(preset("mixtral-8x7b"), Machine(16))} == {1, 2, 4, 8}


@pytest.mark.parametrize("quantized", [False, True])
def test_adapters_and_cut_sequences_together(quantized: bool) -> None:
    """Every layout holds at least its share of the frozen weights, and at full length sequences are cut."""
    flags = ["--lora-rank", "16", *["--qlora"] * quantized, "--seq-length", "32768", "--global-batch-size", "16"]
    found = json.loads("".join(cli.lines([*ASKED[:2], "--devices", "8", *flags, "--json", "--top", "999"])))
    assert {one["layout"]["cp"] for one in found} > {1, 2}
    for one in found:
        ways = one["layout"]["pp"] * one["layout"]["ep"] * one["layout"]["etp"]
        experts = 32 * 8 * 3 * 4096 * 14336 / ways * (0.5 if quantized else 2.0)
        assert experts < one["memory_bytes"]["weights"] and one["needs_bytes"] <= 80e9
        assert ("--qlora" in one["flags"]) is quantized
        assert one["layout"]["world"] == 8 and one["step_seconds"] > 0


def test_the_memory_of_a_device_is_never_passed() -> None:
    fitting, too_large = plan(Question(preset("mixtral-8x7b"), Machine(32, 40), 4096, 32, (1,)))
    assert all(one.needs <= 40e9 for one in fitting) and all(one.needs > 40e9 for one in too_large)
    assert fitting == sorted(fitting, key=lambda one: one.step.total) and too_large


# SMs, boost clock in GHz, FLOPs of bf16 an SM and clock, bits of the memory's bus, Gb/s a pin.
CLOCKS = {
    "rtx-3090": (82, 1.695, 512, 384, 19.5), "rtx-4090": (128, 2.52, 512, 384, 21),
    "rtx-5090": (170, 2.407, 512, 512, 28), "rtx-a6000": (84, 1.8, 1024, 384, 16),
    "rtx-6000-ada": (142, 2.505, 1024, 384, 20), "l40s": (142, 2.52, 1024, 384, 18),
    "rtx-pro-6000": (188, 2.617, 1024, 512, 28), "a100-40g": (108, 1.41, 2048, 5120, 2.43),
    "a100-80g": (108, 1.41, 2048, 5120, 3.186), "h100-sxm": (132, 1.83, 4096, 5120, 5.235),
    "h100-pcie": (114, 1.62, 4096, 5120, 3.19)}


@pytest.mark.parametrize("name", CLOCKS)
def test_figures_of_a_device_are_those_of_its_clocks(name: str) -> None:
    units, clock, flops, bits, rate = CLOCKS[name]
    assert hardware.DEVICES[name].tflops == pytest.approx(units * clock * flops / 1e3, rel=0.015)
    assert hardware.DEVICES[name].bandwidth == pytest.approx(bits * rate / 8, rel=0.025)  # sheets round


def test_the_pages_tables_are_the_planners() -> None:
    done = subprocess.run([sys.executable, "benchmarks/published_runs.py"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    page = (ROOT / "docs/parallelism.md").read_text("utf-8")
    for table in done.stdout.strip().split("\n\n"):
        assert table in page, f"put what benchmarks/published_runs.py prints into docs/parallelism.md:\n{table}"
