"""Resolving a command line: which model, which layout, from where; refused early and with a sentence."""

import argparse
import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_mixtral.config import CONFIG_FILE, MixtralConfig, engine, preset
from megatron_mixtral.errors import ConfigError
from megatron_mixtral.training.arguments import engine_defaults, resolve
from megatron_mixtral.training.flags import Flags, help_of, parse, without
from megatron_mixtral.weights import directory

ROOT = Path(__file__).resolve().parents[3]


def checkpoint(folder: Path, config: MixtralConfig, tracker: bool = True) -> str:
    folder.mkdir()
    (folder / CONFIG_FILE).write_text(config.to_json())
    if tracker:
        (folder / directory.TRACKER).write_text("release")
        (folder / directory.RELEASE).mkdir()
    return str(folder)


def test_preset_gives_the_model() -> None:
    run = resolve(["--model", "mixtral-8x7b", "--tensor-model-parallel-size", "4", "--lr", "1e-3"],
                  {"WORLD_SIZE": "8"})
    assert run.config == preset("mixtral-8x7b")
    assert (run.layout.tp, run.layout.etp, run.layout.world, run.start) == (4, 4, 8, "random weights")


def test_checkpoint_gives_the_model(tmp_path: Path) -> None:
    run = resolve(["--load", checkpoint(tmp_path / "run", preset("tiny"))], {})
    assert run.config == preset("tiny")
    assert run.start == f"weights of {tmp_path / 'run'}, converted, without an optimizer: begins at step 0"
    (tmp_path / "run" / directory.TRACKER).write_text("7")
    (tmp_path / "run" / directory.name_of(7)).mkdir()
    assert resolve(["--load", str(tmp_path / "run")], {}).start == f"checkpoint {tmp_path / 'run'}"


def test_own_checkpoint_wins_over_starting_weights(tmp_path: Path) -> None:
    hf = tmp_path / "hf"
    hf.mkdir()
    (hf / "config.json").write_text(json.dumps(preset("tiny").to_hf_dict()))
    argv = ["--hf-checkpoint", str(hf), "--load", checkpoint(tmp_path / "run", preset("tiny"), tracker=False)]
    assert resolve(argv, {}).load_hf
    (tmp_path / "run" / directory.TRACKER).write_text("100")
    (tmp_path / "run" / directory.name_of(100)).mkdir()
    assert not resolve(argv, {}).load_hf


@pytest.mark.parametrize(("argv", "world", "sentence"), [
    ([], 1, "no model is given"),
    (["--model", "tiny", "--tensor-model-parallel-size", "3"], 3, r"4 is not divisible by tp 3: 4 = 1 x 3 \+ 1"),
    (["--model", "tiny", "--expert-model-parallel-size", "3"], 3, "num_local_experts 8 is not divisible by ep 3"),
    (["--model", "tiny", "--pipeline-model-parallel-size", "3"], 3, "num_hidden_layers 4 is not divisible by pp 3"),
    (["--model", "tiny", "--tensor-model-parallel-size", "4"], 6, "world size 6 is not a multiple of tp x pp x cp = 4"),
    (["--model", "tiny", "--seq-length", "4097"], 1, "--seq-length 4097 is longer"),
    (["--model", "huge"], 1, "--model huge: no such preset"),
    (["--model", "tiny", "--pipeline-model-parallel-size", "2", "--num-layers-per-virtual-pipeline-stage", "3"], 2,
     "does not divide the 2 layers"),
    (["--model", "tiny", "--moe-aux-loss-convention", "hf", "--pipeline-model-parallel-size", "2"], 2,
     "convention megatron, where --moe-aux-loss-coeff 0.01 "),
    *[(["--model", "tiny", "--overlap-moe-expert-parallel-comm", *words.split()], 4, sentence) for words, sentence in (
        ("--recompute-granularity full --recompute-method uniform", "does not go together with --recompute-granularity "
         "full, of whole layers, .*: use selective"),
        ("--recompute-granularity selective --recompute-modules moe", "recompute moe_act instead"),
        ("--expert-model-parallel-size 2", "weights in fp32: give --bf16"), ("--bf16", "one expert-parallel rank"),
        ("--bf16 --expert-model-parallel-size 2 --pipeline-model-parallel-size 2", "without virtual stages"),
        ("--bf16 --expert-model-parallel-size 2 --moe-token-dispatcher-type allgather", "allgather: use alltoall"),
        ("--bf16 --expert-model-parallel-size 2 --moe-aux-loss-convention hf", "one micro-batch at a time: use meg"))],
    (["--model", "tiny", "--cuda-graph-impl", "local"], 1, "add --cuda-graph-modules attn"),
    (["--model", "tiny", "--optimizer", "sgd", "--use-distributed-optimizer"], 1, "drop one of the two"),
    (["--model", "tiny", "--verify-checkpoint", "--no-verify-checkpoint"], 1, "say the opposite"),
    (["--model", "tiny", "--log-expert-load"], 1, "give --save or --metrics-file"),
    (["--model", "tiny", "--use-checkpoint-args", "--use-mp-args-from-checkpoint-args"], 1,
     "--use-mp-args-from-checkpoint-args is needed before .*: give the sizes"),
])
def test_refusals(argv: list[str], world: int, sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        resolve(argv, {"WORLD_SIZE": str(world)})


def test_different_models_are_refused(tmp_path: Path) -> None:
    load = checkpoint(tmp_path / "run", preset("mixtral-8x22b"))
    with pytest.raises(ConfigError, match="hidden_size 6144, --model tiny has 128"):
        resolve(["--load", load, "--model", "tiny"], {})


def test_layers_per_virtual_stage() -> None:
    run = resolve(["--model", "mixtral-8x7b", "--pipeline-model-parallel-size", "4",
                   "--num-layers-per-virtual-pipeline-stage", "2"], {"WORLD_SIZE": "4"})
    assert run.layout.vpp == 4


def test_wrong_layout_is_refused_by_the_program() -> None:
    done = subprocess.run([sys.executable, str(ROOT / "tools" / "pretrain_mixtral.py"), "--model", "mixtral-8x7b",
                           "--tensor-model-parallel-size", "3"], capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "8 = 2 x 3 + 2; set --tensor-model-parallel-size to one of 1, 2, 4, 8" in done.stderr


def test_dry_run_says_what_would_run_and_starts_nothing() -> None:
    argv = ["--model", "mixtral-8x7b", "--pipeline-model-parallel-size", "8", "--expert-model-parallel-size", "2",
            "--micro-batch-size", "1", "--global-batch-size", "128", "--seq-length", "4096", "--bf16"]
    done = subprocess.run([sys.executable, str(ROOT / "tools" / "pretrain_mixtral.py"), *argv, "--dry-run"],
                          capture_output=True, text=True, check=False, env={**os.environ, "WORLD_SIZE": "16"})
    assert done.returncode == 0
    first, *needs = done.stderr.splitlines()
    assert first == ("Mixtral of 46702.8 M parameters (12879.9 M active) on tp1-pp8-ep2, 16 device(s), "
                     "data parallel 2; start: random weights")
    kinds = [line.split(":")[0] for line in needs]
    assert kinds == ["batch", "parameters per device", "memory per device", "training state per device",
                     "sent per device and step", "pipeline bubble"]


@pytest.mark.parametrize(("words", "sentence"), [
    ("--no-such-flag 3", "--no-such-flag is neither a flag of megatron-core 0.19.2 nor one of ours"),
    ("--tensor-model-parallel 2", "is it --tensor-model-parallel-size or "),  # argparse would take the beginning
    ("--hf-check x", "is it --hf-checkpoint"),
    ("--lr 1e-3 1e-4", "1e-4 is neither a flag"),
    ("--lr fast", "argument --lr: invalid float value: 'fast'"),
    ("--recompute-granularity half", "argument --recompute-granularity: invalid choice: 'half'"),
    ("--save", "argument --save: expected one argument"),
])
def test_flags_that_nobody_has_are_refused_in_a_dry_run(words: str, sentence: str) -> None:
    tool = [sys.executable, str(ROOT / "tools" / "pretrain_mixtral.py"), "--model", "tiny", "--dry-run"]
    done = subprocess.run([*tool, *words.split()], capture_output=True, text=True, check=False)
    assert done.returncode == 1 and sentence in done.stderr and "Traceback" not in done.stderr


def test_one_parse_gives_every_value_its_type() -> None:
    flags, engine = parse("--model=tiny --log-expert-load --max-nan-steps 3 --data-path 0.5 a 0.5 b --bf16 --lr 1e-3 "
                          "--persistent-save-interval 7 --save runs --tokenizer-type OurOwn --seq-length 16".split())
    assert (flags.model, flags.log_expert_load, flags.max_nan_steps, flags.dry_run) == ("tiny", True, 3, False)
    assert (engine.data_path, engine.bf16, engine.fp16) == (["0.5", "a", "0.5", "b"], True, False)
    assert (engine.save_interval, engine.seq_length, engine.micro_batch_size) == (7, 16, None)


def test_a_dry_run_imports_neither_torch_nor_the_engine() -> None:
    code = ("import sys; from megatron_mixtral.training import pretrain_command; pretrain_command(sys.argv[1:]); "
            "print([name for name in ('torch', 'megatron', 'transformers') if name in sys.modules])")
    argv = ["--model", "tiny", "--seq-length", "64", "--micro-batch-size", "1", "--dry-run"]
    done = subprocess.run([sys.executable, "-c", code, *argv], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_help_has_every_flag_of_ours_under_its_task_and_the_engines_in_its_words() -> None:
    ours = help_of(["--model", "tiny", "--help"], "pretrain")
    for item in dataclasses.fields(Flags):
        assert f"\n  --{item.name.replace('_', '-')}" in ours, item.name
    engines = help_of(["--help-engine"], "pretrain")
    assert "--adam-beta1 " in engines and "%" in engines and help_of(["--model", "tiny"], "pretrain") is None


DENSE = {"model_type": "llama", "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4,
         "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}


def test_a_dense_model_has_nothing_to_balance(tmp_path: Path) -> None:
    hf = tmp_path / "hf"
    hf.mkdir()
    (hf / "config.json").write_text(json.dumps(DENSE))
    given = ["--hf-checkpoint", str(hf)]
    run = resolve(given, {})
    assert run.model.startswith("llama of 0.0 M parameters, as a Mixtral of one expert")
    defaults = engine_defaults(run, "local", "gloo")
    assert defaults["moe_aux_loss_coeff"] == 0 and defaults["moe_router_pre_softmax"] is True
    for words in (["--moe-aux-loss-coeff", "0.01"], ["--moe-z-loss-coeff", "1e-3"], ["--moe-input-jitter-eps", "0.1"],
                  ["--moe-expert-capacity-factor", "1.0"]):
        with pytest.raises(ConfigError, match=f"{words[0]} .* is about a choice among experts, and a llama is"):
            resolve([*given, *words], {})
    assert resolve([*given, "--moe-aux-loss-coeff", "0"], {}).config == run.config
    for words, sentence in ((["--expert-model-parallel-size", "2"], "num_local_experts 1 is not divisible by ep 2"),
                            (["--seq-length", "65"], "--seq-length 65 is longer"),
                            (["--lora-rank", "4", "--lora-target-modules", "gate"], "and has no router")):
        with pytest.raises(ConfigError, match=sentence):
            resolve([*given, *words], {"WORLD_SIZE": "2"})
    # A Mistral of the same sizes is another model; the same Llama whose config.json says another type of its numbers is
    # not.
    for change, refused in (({"model_type": "mistral", "rms_norm_eps": 1e-6, "sliding_window": None}, True),
                            ({"torch_dtype": "bfloat16"}, False)):
        config = MixtralConfig.from_hf_dict(DENSE | change)
        argv = [*given, "--load", checkpoint(tmp_path / f"run-{refused}", config, tracker=False)]
        if not refused:
            assert resolve(argv, {}).config.model_type == "llama"
            continue
        with pytest.raises(ConfigError, match="has model_type mistral, .* has llama: they are different models"):
            resolve(argv, {})
    assert config.to_hf_dict("float16") == DENSE | {"torch_dtype": "float16"}


def test_defaults_that_matter() -> None:
    run = resolve(["--model", "mixtral-8x7b", "--tensor-model-parallel-size", "2"], {"WORLD_SIZE": "2"})
    defaults = engine_defaults(run, "local", "gloo")
    assert defaults["moe_router_pre_softmax"] is False and defaults["rotary_base"] == 1e6
    assert defaults["sequence_parallel"] is True
    # HF's 0.02 over 32 layers and top-2 is 0.00125 for each layer of the engine.
    assert defaults["moe_aux_loss_coeff"] == pytest.approx(0.00125)
    with_te = engine_defaults(run, "transformer_engine", "nccl")
    assert with_te.keys().isdisjoint({"masked_softmax_fusion", "num_workers"})


def test_defaults_that_nobody_would_miss(tmp_path: Path) -> None:
    """Left out, each gives a run that goes on, and is another one."""
    config = dataclasses.replace(preset("tiny"), initializer_range=0.07)
    defaults = engine_defaults(resolve(["--load", checkpoint(tmp_path / "run", config)], {}), "local", "gloo")
    assert defaults["moe_router_dtype"] == "fp32"
    assert defaults["init_method_std"] == 0.07
    assert defaults["dist_ckpt_strictness"] == "raise_unexpected"
    assert defaults["null_tokenizer_eod_id"] == config.eos_token_id
    assert defaults["calculate_per_token_loss"] is False
    answers = resolve(["--model", "tiny", "--is-instruction-dataset"], {})
    assert engine_defaults(answers, "local", "gloo")["calculate_per_token_loss"] is True


@pytest.fixture(scope="module")
def parser() -> argparse.ArgumentParser:
    """The engine's own, with this library's defaults for the tiny model."""
    from megatron.training.arguments import add_megatron_arguments

    parser = add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False))
    parser.set_defaults(**engine_defaults(resolve(["--model", "tiny"], {}), "local", "gloo"))
    return parser


def test_every_default_is_a_flag_of_the_engine(parser: argparse.ArgumentParser) -> None:
    known = {action.dest for action in parser._actions}
    run = resolve(["--model", "tiny"], {})
    assert set(engine_defaults(run, "local", "gloo")) | set(engine.architecture_args(run.config)) <= known
    unknown = set(engine.FOREIGN) - known
    assert not unknown, "nothing would be refused by these"


@pytest.mark.parametrize("words", [
    "--use-rope-scaling", "--rotary-seq-len-interpolation-factor 2", "--qk-layernorm", "--softmax-type learnable",
    "--moe-router-topk-scaling-factor 2.5", "--no-rope-freq 2", "--moe-router-num-groups 2 --moe-router-group-topk 1",
    "--moe-shared-expert-intermediate-size 16", "--mtp-num-layers 1", "--activation-func-clamp-value 7",
    "--rotary-base 10000",
])
def test_what_makes_another_model_is_refused_of_the_engine_s_arguments_too(
        words: str, parser: argparse.ArgumentParser) -> None:
    """Whatever brings it there: the engine's parser changes some arguments by others."""
    engine.check_flags(parser.parse_args([]), preset("tiny"))
    with pytest.raises(ConfigError, match=f"{words.split()[0]}.* drop "):
        engine.check_flags(parser.parse_args(words.split()), preset("tiny"))


def test_a_flag_is_dropped_with_its_value() -> None:
    assert without(["--a", "--tokenizer-type", "PretrainedFromHF", "--b"], "--tokenizer-type") == ["--a", "--b"]
    assert without(["--tokenizer-type=X", "--b", "1"], "--tokenizer-type") == ["--b", "1"]


def test_a_run_asks_for_what_it_needs_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron_mixtral import runtime
    from megatron_mixtral.training import pretrain

    class Backend:
        device = "cuda"

        def check_compiler(self) -> None:
            raise ConfigError("no compiler")

        def check_checkpoints(self) -> None:
            raise ConfigError("unreadable")

    def engine_args(*arguments: object) -> None:
        raise ConfigError("went on")

    monkeypatch.setattr(runtime, "ready", lambda training: Backend(), raising=False)
    monkeypatch.setattr(runtime, "device_memory", lambda: 1, raising=False)
    monkeypatch.setattr(pretrain, "_engine_args", engine_args)
    plain = ["--disable-jit-fuser"]
    for flags, sentence in (([], "no compiler"), (plain, "went on"),
                            ([*plain, "--save", "here", "--save-interval", "1"], "unreadable")):
        with pytest.raises(ConfigError, match=sentence):
            pretrain._train(resolve(["--model", "tiny", *flags], {}), [], None, None, None, None)
