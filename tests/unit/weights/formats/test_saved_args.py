"""The arguments of a checkpoint before it is loaded, and the rank directories that a run's layout cannot read."""

from argparse import Namespace
from pathlib import Path

import pytest
import torch
from helpers.models import TINY, random_hf_directory

from megatron_mixtral.config import MixtralConfig, ParallelLayout
from megatron_mixtral.errors import CheckpointError
from megatron_mixtral.weights.conversion import convert
from megatron_mixtral.weights.engine_args import make_args
from megatron_mixtral.weights.formats.dist_sink import DistSink
from megatron_mixtral.weights.formats.hf_source import HFSource
from megatron_mixtral.weights.formats.rank_sink import RankDirSink
from megatron_mixtral.weights.formats.saved_args import saved_arguments

PP2 = ParallelLayout(pp=2, ep=2)


def run(layout: ParallelLayout) -> Namespace:
    return make_args(MixtralConfig(**TINY), layout, 96, 1, "bfloat16")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> HFSource:
    folder = tmp_path_factory.mktemp("hf") / "hf"
    return HFSource(random_hf_directory(folder, MixtralConfig(**TINY), torch.bfloat16))


def test_both_forms_carry_them(source: HFSource, tmp_path: Path) -> None:
    convert(source, RankDirSink(tmp_path / "ranks", PP2))
    convert(source, DistSink(tmp_path / "dist"))
    for form, now in (("ranks", run(PP2)), ("dist", Namespace())):
        found = saved_arguments(tmp_path / form / "release", now)
        assert found is not None and found.num_layers == source.config.num_hidden_layers


@pytest.mark.parametrize(("layout", "words"), [
    (ParallelLayout(pp=2, ep=2, vpp=2), "layout tp1-pp2-ep2, the run is tp1-pp2-ep2-vpp2"),
    (ParallelLayout(pp=2, ep=1), "layout tp1-pp2-ep2, the run is tp1-pp2-ep1"),
    (ParallelLayout(pp=2, ep=2, first=1), "the run is tp1-pp2-ep2-first1"),
])
def test_rank_directories_of_another_layout_are_refused(source: HFSource, tmp_path: Path, layout: ParallelLayout,
                                                        words: str) -> None:
    convert(source, RankDirSink(tmp_path / "ranks", PP2))
    with pytest.raises(CheckpointError, match=words):
        saved_arguments(tmp_path / "ranks/release", run(layout))


def test_a_missing_rank_directory_is_named(source: HFSource, tmp_path: Path) -> None:
    convert(source, RankDirSink(tmp_path / "ranks", PP2))
    (tmp_path / "ranks/release/mp_rank_00_001_001/model_optim_rng.pt").unlink()
    with pytest.raises(CheckpointError, match=r"mp_rank_00_001_001/model_optim_rng.pt is missing"):
        saved_arguments(tmp_path / "ranks/release", run(PP2))
