"""The planner's arithmetic against numbers known from elsewhere, and its refusals."""

import dataclasses
import json
import re
import time
from pathlib import Path

import pytest

from megatron_mixtral.config import AdapterConfig, MixtralConfig, ParallelLayout, hardware, preset
from megatron_mixtral.errors import ConfigError
from megatron_mixtral.planning import RunShape, cli
from megatron_mixtral.planning.memory import stage_memory
from megatron_mixtral.planning.search import Question, plan
from megatron_mixtral.planning.step_time import Machine, model_flops_rate, predicted_step

MIXTRAL = preset("mixtral-8x7b")


def shape(world: int, batch: int = 256, model: MixtralConfig = MIXTRAL, micro: int = 1, **sizes: int) -> RunShape:
    return RunShape(model, ParallelLayout(**sizes, world=world), 4096, micro, batch)


@pytest.mark.parametrize("sizes", [{}, {"tp": 4, "pp": 4}, {"ep": 2, "pp": 8}, {"tp": 2, "ep": 8, "etp": 1, "pp": 4},
                                   {"pp": 4, "vpp": 8, "ep": 8}, {"pp": 4, "first": 7, "last": 7}])
@pytest.mark.parametrize("tied", [False, True])
def test_parameters_of_all_shards_are_the_model(sizes: dict[str, int], tied: bool) -> None:
    """Every weight once; what is on several devices by design is taken off again."""
    model = MixtralConfig(tie_word_embeddings=tied)
    layout = ParallelLayout(**sizes, world=64)
    run = RunShape(model, layout, 4096, 1, 256)
    whole = 0
    for stage in range(layout.pp):
        found = run.parameters_of_stage(stage)
        replicated = run.layers_of_stage(stage) * model.hidden_size * (model.num_local_experts + 2)
        replicated += model.hidden_size * (stage == layout.pp - 1)
        whole += found.dense * layout.tp - replicated * (layout.tp - 1) + found.expert * layout.ep * layout.etp
    shared_twice = model.vocab_size * model.hidden_size if tied and layout.pp > 1 else 0
    assert whole - shared_twice == model.total_parameters


MISTRAL_7B = {"model_type": "mistral", "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 14336,
              "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
              "max_position_embeddings": 32768, "sliding_window": 4096, "rms_norm_eps": 1e-5}


def test_a_dense_model_is_counted_as_it_is() -> None:
    """Mistral-7B-v0.1 has 7,241,732,096 parameters; in a run each layer has the row of a router besides."""
    from megatron_mixtral.weights import ShardPlan

    config = MixtralConfig.from_hf_dict(MISTRAL_7B)
    assert config.total_parameters == config.active_parameters == 7_241_732_096
    for sizes in ({}, {"tp": 2}, {"pp": 2}, {"tp": 2, "pp": 2}):
        run = shape(4, model=config, **sizes)
        held = {coord.pp: sum(tensor.elements for tensor in ShardPlan(config, run.layout, coord).tensors())
                for coord in run.layout.coords()}
        assert held == {stage: run.parameters_of_stage(stage).total for stage in range(run.layout.pp)}
    fitting, _ = plan(Question(config, Machine(8), 4096, 256))
    assert fitting and {candidate.shape.layout.ep for candidate in fitting} == {1}
    # Nothing can be uneven where one expert gets everything.
    one, two = (predicted_step(shape(8, model=MixtralConfig(num_local_experts=experts, num_experts_per_tok=1)),
                               Machine(8)).experts for experts in (1, 2))
    assert 1.1 < two / one < 1.3


def test_bubble_and_chunks_in_flight_are_those_of_the_schedules() -> None:
    plain, interleaved = shape(16, 128, ep=2, pp=8), shape(64, ep=8, pp=4, vpp=8)
    assert plain.micro_batches == 64 and plain.bubble == 7 / 64
    assert [plain.chunks_in_flight(stage) for stage in range(8)] == [8, 7, 6, 5, 4, 3, 2, 1]
    assert interleaved.micro_batches == 16 and interleaved.bubble == 3 / (8 * 16)
    assert [interleaved.chunks_in_flight(stage) for stage in range(4)] == [35, 33, 31, 29]
    few = RunShape(MIXTRAL, ParallelLayout(pp=8, ep=2, world=16), 4096, 1, 4)
    assert few.chunks_in_flight(0) == 2  # no more than there are


def test_memory_by_kind_of_a_bf16_run() -> None:
    """18 bytes a parameter without sharding: 2 + 4 + 12 (Rajbhandari et al. 2020, section 3.1, with fp32 gradients)."""
    run = RunShape(MIXTRAL, ParallelLayout(world=1), 4096, 1, 1, distributed_optimizer=False)
    memory, parameters = stage_memory(run, 0), MIXTRAL.total_parameters
    assert (memory.weights, memory.gradients, memory.optimizer) == (2 * parameters, 4 * parameters, 12 * parameters)
    sharded = RunShape(MIXTRAL, ParallelLayout(ep=8, world=64), 4096, 1, 64)
    found = sharded.parameters_of_stage(0)
    assert stage_memory(sharded, 0).optimizer == 12 * (found.dense / 64 + found.expert / 8)


def test_recompute_keeps_less() -> None:
    by_kind = [stage_memory(RunShape(MIXTRAL, ParallelLayout(ep=8, pp=4, world=64), 4096, 1, 256, recompute), 0)
               for recompute in ("none", "selective", "full")]
    none, selective, full = (memory.activations for memory in by_kind)
    assert none > selective > full


@pytest.mark.parametrize(("build", "sentence"), [
    (lambda: shape(64, 100, ep=8), r"--global-batch-size 100 is not a multiple of .* = 1 x 64 = 64"),
    (lambda: shape(64, 160, ep=8, pp=4, vpp=8, micro=1), r"multiple of pp 4, found 10 = 160 / 16"),
    (lambda: RunShape(MIXTRAL, ParallelLayout(tp=8, world=8), 4092, 1, 8),
     r"--seq-length 4092 is not divisible by tp = 8, .*4092 = 511 x 8 \+ 4; give 4088 or 4096"),
    (lambda: RunShape(MIXTRAL, ParallelLayout(cp=4, world=8), 4092, 1, 8),
     r"4092 is not divisible by 2 x cp = 2 x 4 = 8, .*4092 = 511 x 8 \+ 4"),
    (lambda: RunShape(MIXTRAL, ParallelLayout(tp=4, cp=2, world=8), 4092, 1, 8),
     r"not divisible by 2 x cp = 2 x 2 = 4 and by tp x cp = 4 x 2, .*4092 = 511 x 8 \+ 4"),
    (lambda: RunShape(MIXTRAL, ParallelLayout(world=1), 4096, 0, 8), "--micro-batch-size must be a positive integer"),
    (lambda: RunShape(MIXTRAL, ParallelLayout(world=1), 4096, 1, 8, "some"), "recompute 'some'"),
])
def test_impossible_batches_are_refused(build: object, sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        build()


# -- published runs (docs/parallelism.md has the table) ----------------------------------------------------------

# Figures in the convention of Megatron-LM's log, which counts attention over the whole square: this factor more.
def _megatron_convention(model: MixtralConfig) -> float:
    ours = model.training_flops_per_token(4096)
    return 1 + 6 * model.num_hidden_layers * 4096 * model.num_attention_heads * model.head_dim / ours


@pytest.mark.parametrize(("model", "sizes", "world", "published", "error"), [
    ("mixtral-8x7b", {"ep": 8, "pp": 4, "vpp": 8}, 64, 468, 0.10),
    ("mixtral-8x22b", {"tp": 2, "ep": 8, "etp": 1, "pp": 8}, 128, 455, 0.10),
])
def test_published_points_on_h100(model: str, sizes: dict[str, int], world: int, published: float,
                                  error: float) -> None:
    run = shape(world, model=preset(model), **sizes)
    rate = model_flops_rate(run, predicted_step(run, Machine(world)).total) * _megatron_convention(preset(model)) / 1e12
    assert rate == pytest.approx(published, rel=error)


def test_published_best_layout_of_8x7b_is_among_the_first_three() -> None:
    fitting, _ = plan(Question(MIXTRAL, Machine(64), 4096, 256))
    first = [(one.shape.layout.tp, one.shape.layout.pp, one.shape.layout.vpp, one.shape.layout.ep)
             for one in fitting[:3]]
    assert (1, 4, 8, 8) in first


def test_a_thousand_devices_are_planned_in_seconds() -> None:
    began = time.process_time()
    fitting, _ = plan(Question(preset("mixtral-8x22b"), Machine(1024), 4096, 1024))
    assert len(fitting) > 10 and time.process_time() - began < 20


def test_more_recomputation_or_less_bandwidth_is_never_faster() -> None:
    run = shape(64, ep=8, pp=4, vpp=8)
    full = RunShape(MIXTRAL, run.layout, 4096, 1, 256, "full")
    assert predicted_step(full, Machine(64)).total > predicted_step(run, Machine(64)).total
    assert predicted_step(run, Machine(64, intra_node_gbps=400)).expert > predicted_step(run, Machine(64)).expert


# -- the tool ----------------------------------------------------------------------------------------------------

ARGV = ["--model", "mixtral-8x7b", "--devices", "16", "--device-memory", "80", "--device-tflops", "989",
        "--intra-node-gbps", "3600", "--inter-node-gbps", "400", "--seq-length", "4096", "--global-batch-size", "256"]


def test_the_tool_prints_ranking_terms_and_flags() -> None:
    text = "\n".join(cli.lines(ARGV))
    assert "layouts fit 16 devices of 80 GB" in text and "experts" in text and "Flags of the first:" in text
    assert "--expert-model-parallel-size" in text


def test_the_tool_prints_json() -> None:
    found = json.loads("\n".join(cli.lines([*ARGV, "--json", "--top", "3"])))
    assert len(found) == 3 and found[0]["step_seconds"] <= found[1]["step_seconds"]
    assert sum(found[0]["terms"].values()) == pytest.approx(found[0]["step_seconds"])


@pytest.mark.parametrize(("argv", "sentence"), [
    (["--model", "mixtral-8x22b", "--devices", "8", "--global-batch-size", "256"], "nothing fits 8 devices of 80 GB"),
    (["--model", "mixtral-8x7b", "--devices", "64", "--global-batch-size", "7", "--micro-batch-size", "2"],
     "no layout divides 64 devices"),
    (["--model", "mixtral-8x7b", "--devices", "0", "--global-batch-size", "8"], "--devices must be positive, found 0"),
    (["--model", "tiny", "--devices", "1", "--global-batch-size", "8", "--seq-length", "8192"], "is longer"),
])
def test_the_tool_refuses_with_a_sentence(argv: list[str], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        list(cli.lines(argv))


def test_a_device_stands_for_the_figures_of_its_data_sheet() -> None:
    sheet = hardware.DEVICES["a100-80g"]
    assert Machine.of(sheet, devices=16, device_memory=40.0) == Machine(16, 40.0, 312.0, 2039.0, 2400.0)
    assert Machine.of(hardware.DEVICES["h100-sxm"], devices=8) == Machine(8)
    argv = ["--model", "mixtral-8x7b", "--devices", "16", "--global-batch-size", "128", "--top", "1"]
    slow, fast, named = (list(cli.lines([*argv, *more]))[0:3] for more in (
        ["--device", "a100-80g"], ["--device", "b200"], ["--device", "b200", "--device-memory", "80"]))
    assert "16 devices of 80 GB" in slow[0] and "16 devices of 180 GB" in fast[0] and "16 devices of 80 GB" in named[0]
    seconds = [float(re.search(r" (\d+\.\d\d) +\d+ ", lines[2])[1]) for lines in (slow, fast)]
    assert 4 < seconds[0] / seconds[1] < 12  # 312 against 2250 TFLOP/s


def test_no_device_is_taken_for_another() -> None:
    """The first entry whose name is a part of what torch says wins."""
    for device in hardware.DEVICES.values():
        assert hardware.find(f"NVIDIA {device.reported}") is device


def test_adapters_alone_are_trained() -> None:
    """8x7B on one device, rank 64: the arithmetic of docs/finetuning.md, in bytes."""
    def memory(**values):
        adapter = AdapterConfig.of(preset("mixtral-8x7b"), rank=64, **values)
        return stage_memory(RunShape(preset("mixtral-8x7b"), ParallelLayout(world=1), 2048, 4, 16, "full",
                                     adapter=adapter), 0)

    trained, linears = 960_495_616, 46_702_792_704 - 2 * 32000 * 4096 - 32 * 4096 * 10 - 4096
    whole, packed = memory(), memory(quantized=True)
    assert whole.gradients == packed.gradients == 4 * trained and packed.optimizer == 12 * trained
    assert whole.weights == 2 * (46_702_792_704 + trained)
    assert packed.weights == whole.weights - linears * (2 - 0.53125)


def test_the_table_of_tuning_is_the_planner_s() -> None:
    from docs.figures import draw_memory

    text = (Path(__file__).parents[3] / "docs" / "finetuning.md").read_text(encoding="utf-8")
    assert "\n".join(draw_memory.table()) in text, "put what docs/figures/draw_memory.py prints into docs/finetuning.md"


@pytest.mark.parametrize(("rank", "micro", "known"), [(64, 4, 51.0), (64, 16, 65.5), (16, 4, 38.0)])
def test_qlora_on_one_device_takes_what_is_known(rank: int, micro: int, known: float) -> None:
    """GB: XTuner's published figure for micro-batches of 16; for the others an estimate with a round working set."""
    adapter = AdapterConfig.of(MIXTRAL, rank=rank, quantized=True)
    run = RunShape(MIXTRAL, ParallelLayout(world=1), 2048, micro, 16, "full", adapter=adapter)
    assert stage_memory(run, 0).total / 1e9 == pytest.approx(known, rel=0.005 if micro == 16 else 0.08)


def test_small_micro_batches_of_4_bits_are_slow_and_the_tool_says_what_is_enough() -> None:
    """Unpacking is a matter of weights, so of each micro-batch alike: on an H100 0.2 s of one of 8x7B."""
    adapter = AdapterConfig.of(MIXTRAL, rank=64, quantized=True)
    runs = [RunShape(MIXTRAL, ParallelLayout(world=1), 2048, micro, 16, "full", adapter=adapter) for micro in (1, 16)]
    small, large = (predicted_step(run, Machine(1)) for run in runs)
    assert small.unpacking / 16 == pytest.approx(large.unpacking) == pytest.approx(0.2, rel=0.1)
    assert small.total > 1.5 * large.total and large.unpacking < 0.1 * large.total
    dense = dataclasses.replace(runs[1], adapter=dataclasses.replace(adapter, quantized=False))
    whole = dataclasses.replace(runs[1], adapter=None)
    seconds = [predicted_step(run, Machine(1)) for run in (dense, whole)]
    assert seconds[0].unpacking == 0 and seconds[0].experts == pytest.approx(0.75 * seconds[1].experts)
    argv = ["--model", "mixtral-8x7b", "--devices", "1", "--seq-length", "2048", "--global-batch-size", "16",
            "--lora-rank", "64", "--qlora"]
    text = "\n".join(cli.lines(argv))
    assert "from about 8192 tokens on it is a fifth of the time or less" in text
    assert "4 bits" not in "\n".join(cli.lines([*argv[:-1], "--devices", "8"]))
    with pytest.raises(ConfigError, match="--qlora is of a run that trains adapters"):
        list(cli.lines([*argv[:-3], "--qlora"]))
    with pytest.raises(ConfigError, match="nothing fits 1 devices of 80 GB"):
        list(cli.lines(argv[:-1]))


@pytest.mark.parametrize("layout", [ParallelLayout(world=1), ParallelLayout(tp=2, pp=2, ep=2, etp=1, world=4),
                                    ParallelLayout(tp=2, ep=4, etp=2, world=8)], ids=str)
def test_trained_parameters_of_a_stage_are_those_of_the_plan(layout) -> None:
    from megatron_mixtral.weights import ShardPlan

    adapter = AdapterConfig.of(preset("mixtral-8x7b"), rank=16, targets=("q_proj", "o_proj", "w1", "w2", "w3", "gate"))
    shape = RunShape(preset("mixtral-8x7b"), layout, 2048, 1, 8, adapter=adapter)
    for coord in layout.coords():
        expected = sum(tensor.elements for tensor in ShardPlan(adapter, layout, coord).tensors())
        assert shape.trained_of_stage(coord.pp).total == expected
