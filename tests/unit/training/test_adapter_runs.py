"""A run that trains adapters, as far as it is decided before torch: its flags, its plan, and what it may load."""

import logging
from argparse import Namespace
from pathlib import Path

import pytest
from helpers.models import TINY, random_hf_directory

from megatron_mixtral.config import MixtralConfig
from megatron_mixtral.errors import CheckpointError, ConfigError
from megatron_mixtral.training import adapters, arguments, preflight, pretrain
from megatron_mixtral.training.flags import parse


@pytest.fixture(scope="module")
def hf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_hf_directory(tmp_path_factory.mktemp("hf") / "model", MixtralConfig(**TINY))


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    sizes = {"hidden_size": 128, "intermediate_size": 192}
    return random_hf_directory(tmp_path_factory.mktemp("wide") / "model", MixtralConfig(**TINY | sizes))


def test_the_flags_become_adapters(wide: Path) -> None:
    run = arguments.resolve(["--hf-checkpoint", str(wide), "--lora-rank", "8", "--lora-alpha", "32", "--lora-dropout",
                             "0.1", "--lora-target-modules", "v_proj, q_proj,gate", "--qlora"], {})
    found = run.adapter
    assert (found.rank, found.alpha, found.dropout, found.quantized) == (8, 32.0, 0.1, True)
    assert found.targets == ("q_proj", "v_proj", "gate") and found.base_name == str(wide) and found.scale == 4.0
    assert run.load_hf and "adapters of rank 8, alpha 32, on q_proj, v_proj, gate" in str(run)
    assert "the base in 4 bits" in str(run)
    defaults = arguments.engine_defaults(run, "transformer_engine", "nccl")
    assert defaults["moe_aux_loss_coeff"] == 0.0 and defaults["transformer_impl"] == "local"
    assert arguments.resolve(["--hf-checkpoint", str(wide)], {}).adapter is None


def test_shares_of_rows_that_are_no_whole_blocks_are_refused(wide: Path) -> None:
    flags = ["--hf-checkpoint", str(wide), "--lora-rank", "8", "--qlora", "--tensor-model-parallel-size", "2"]
    with pytest.raises(ConfigError, match=r"intermediate_size 192 / 2 = 96 is no multiple of 64"):
        arguments.resolve(flags, {})
    assert arguments.resolve([*flags, "--expert-model-parallel-size", "2", "--expert-tensor-parallel-size", "1"], {})


def test_the_base_is_read_at_every_start(hf: Path, tmp_path: Path) -> None:
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("3")
    (tmp_path / "iter_0000003").mkdir()
    flags = ["--hf-checkpoint", str(hf), "--load", str(tmp_path)]
    assert not arguments.resolve(flags, {}).load_hf
    assert arguments.resolve([*flags, "--lora-rank", "4"], {}).load_hf


@pytest.mark.parametrize(("flags", "words"), [
    (["--model", "tiny", "--lora-rank", "4"], "give the base with --hf-checkpoint"),
    (["--qlora"], "--qlora is of a run that trains adapters"), (["--adapter", "x"], "--adapter is of a run"),
    (["--lora-rank", "4", "--no-moe-grouped-gemm"], "computed in grouped products"),
    (["--lora-rank", "4", "--lora-target-modules", "q_proj,wq"], "found 'wq'"),
    (["--lora-rank", "0"], "--lora-rank 0"),
])
def test_flags_that_do_not_go_together(flags: list[str], words: str, hf: Path) -> None:
    with pytest.raises(ConfigError, match=words):
        arguments.resolve([*([] if "--model" in flags else ["--hf-checkpoint", str(hf)]), *flags], {})


def test_a_dry_run_says_what_is_trained(hf: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    argv = ["--hf-checkpoint", str(hf), "--lora-rank", "4", "--seq-length", "32", "--micro-batch-size", "1"]
    assert pretrain.run([*argv, "--dry-run"]) == 0
    assert "18,944 parameters" in caplog.text and "trained are adapters of 0.02 M" in caplog.text
    full, tuned = (preflight.shape_of(arguments.resolve(one, {})) for one in (argv[:2] + argv[4:], argv))
    assert full.adapter is None and tuned.adapter.rank == 4


SAVED = {"lora_rank": 4, "lora_alpha": 8.0, "lora_dropout": 0.0, "lora_target_modules": "q_proj,w1,w3", "qlora": False,
         "lora_base": "a" * 32, "hf_checkpoint": "old"}


@pytest.mark.parametrize(("now", "words"), [
    ({"lora_rank": 8}, "with --lora-rank 4, this run has 8"), ({"lora_alpha": 16.0}, "--lora-alpha 8, this run has 16"),
    ({"lora_target_modules": "q_proj"}, "--lora-target-modules q_proj,w1,w3, this run has q_proj"),
    ({"qlora": True}, "--qlora False, this run has True"),
    ({"lora_base": "b" * 32, "hf_checkpoint": "new"}, "of the base a{32} .old., and --hf-checkpoint new is b{32}"),
    ({"lora_rank": None}, "holds adapters of rank 4, and this run trains the whole model"),
])
def test_other_adapters_are_refused_with_both_values(now: dict, words: str) -> None:
    with pytest.raises(CheckpointError, match=words):
        adapters.check_saved(Namespace(**SAVED), Namespace(**SAVED | now), Path("save"))


def test_what_may_change_and_what_is_no_adapter() -> None:
    harmless = {"lora_dropout": 0.1, "hf_checkpoint": "moved"}
    adapters.check_saved(Namespace(**SAVED), Namespace(**SAVED | harmless), Path())
    adapters.check_saved(Namespace(), Namespace(lora_rank=None), Path())
    with pytest.raises(CheckpointError, match="holds a whole model, and this run trains adapters"):
        adapters.check_saved(Namespace(), Namespace(**SAVED), Path("save"))


def test_every_flag_is_known() -> None:
    flags, _ = parse(["--lora-rank", "4", "--adapter-format", "v5"])
    assert flags.adapter_format == "v5" and flags.lora_target_modules == "q_proj,k_proj,v_proj,o_proj,w1,w2,w3"
