"""`ParallelLayout` against the engine: which rank holds what, which stage has which layers, and what is refused."""

import itertools
from types import SimpleNamespace

import pytest
from megatron.core.parallel_state import RankGenerator
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

from megatron_mixtral.config import TARGET_FLAGS, Coord, MixtralConfig, ParallelLayout, preset
from megatron_mixtral.errors import ConfigError

ORDER = "tp-cp-ep-dp-pp"


def engine_coords(layout: ParallelLayout) -> list[Coord]:
    """Coord of each rank from the engine's two rank grids, made as `initialize_model_parallel` makes them."""
    dense = RankGenerator(tp=layout.tp, ep=1, dp=layout.data_parallel, pp=layout.pp, cp=layout.cp, order=ORDER)
    expert_dp = layout.world // (layout.etp * layout.ep * layout.pp)
    expert = RankGenerator(tp=layout.etp, ep=layout.ep, dp=expert_dp, pp=layout.pp, cp=1, order=ORDER)

    def positions(grid: RankGenerator, axis: str) -> dict[int, int]:
        return {rank: place for group in grid.get_ranks(axis) for place, rank in enumerate(group)}

    tp, pp = positions(dense, "tp"), positions(dense, "pp")
    etp, ep = positions(expert, "tp"), positions(expert, "ep")
    assert positions(expert, "pp") == pp
    return [Coord(pp=pp[rank], tp=tp[rank], ep=ep[rank], etp=etp[rank]) for rank in range(layout.world)]


def layouts():
    for tp, pp, ep, etp, cp, copies in itertools.product((1, 2, 4), (1, 2), (1, 2, 4), (1, 2), (1, 2), (1, 2)):
        if etp <= tp:
            smallest = ParallelLayout(tp=tp, pp=pp, ep=ep, etp=etp, cp=cp)
            yield ParallelLayout(tp=tp, pp=pp, ep=ep, etp=etp, cp=cp, world=smallest.min_world * copies)


def test_coords_of_ranks_are_the_engines():
    count = 0
    for layout in layouts():
        assert [layout.coord_of(rank) for rank in range(layout.world)] == engine_coords(layout), layout
        count += 1
    assert count > 100


def test_coords_are_each_ranks_once():
    for layout in layouts():
        seen = {layout.coord_of(rank) for rank in range(layout.world)}
        assert set(layout.coords()) == seen, layout
        assert list(layout.coords()) == sorted(seen), layout


@pytest.mark.parametrize(("layout", "layers"), [
    (ParallelLayout(), 4),
    (ParallelLayout(pp=4), 32),
    (ParallelLayout(pp=2, vpp=2), 8),
    (ParallelLayout(pp=4, vpp=4), 32),
    (ParallelLayout(pp=4, first=2), 11),
    (ParallelLayout(pp=4, last=1), 10),
    (ParallelLayout(pp=3, first=2, last=4), 10),
    (ParallelLayout(pp=2, first=3, last=5), 8),
    (ParallelLayout(pp=4, vpp=2, first=2, last=4), 14),
], ids=str)  # fmt: skip
def test_layers_are_where_the_engine_has_them(layout, layers):
    config = SimpleNamespace(
        num_layers=layers, pipeline_model_parallel_size=layout.pp, pipeline_model_parallel_layout=None,
        virtual_pipeline_model_parallel_size=layout.vpp if layout.vpp > 1 else None,
        num_layers_in_first_pipeline_stage=layout.first, num_layers_in_last_pipeline_stage=layout.last,
        account_for_embedding_in_pipeline_split=False, account_for_loss_in_pipeline_split=False)
    held = []
    for chunk, pp in itertools.product(range(layout.vpp), range(layout.pp)):
        part = layout.layers_of(pp, layers, chunk)
        stage = chunk if layout.vpp > 1 else None
        assert part.start == get_transformer_layer_offset(config, vp_stage=stage, pp_rank=pp), (pp, chunk)
        held += part
    assert held == list(range(layers))


def test_experts_are_consecutive_blocks():
    layout = ParallelLayout(ep=4)
    assert [list(layout.experts_of(ep, 8)) for ep in range(4)] == [[0, 1], [2, 3], [4, 5], [6, 7]]


def test_ends_of_the_network():
    layout = ParallelLayout(pp=2, vpp=2)
    chunks = [(pp, chunk) for pp in range(2) for chunk in range(2)]
    assert [c for c in chunks if layout.is_first(*c)] == [(0, 0)]
    assert [c for c in chunks if layout.is_last(*c)] == [(1, 1)]


def test_names():
    assert str(ParallelLayout(tp=2, pp=2, ep=2, etp=1)) == "tp2-pp2-ep2-etp1"
    assert str(ParallelLayout(pp=8, ep=2, vpp=2)) == "tp1-pp8-ep2-vpp2"
    assert ParallelLayout(tp=2, pp=2, ep=2).min_world == 8
    assert ParallelLayout(tp=2, pp=2, ep=2, etp=1).min_world == 4


EIGHT = MixtralConfig()  # 8 query groups, 8 experts, 32 layers


@pytest.mark.parametrize(("sizes", "config", "parts"), [
    ({"tp": 3}, EIGHT, ["8 is not divisible by tp 3", "8 = 2 x 3 + 2", "--tensor-model-parallel-size", "1, 2, 4, 8"]),
    ({"ep": 3}, EIGHT, ["8 is not divisible by ep 3", "--expert-model-parallel-size"]),
    ({"etp": 3}, EIGHT, ["intermediate_size 14336 is not divisible by etp 3", "--expert-tensor-parallel-size"]),
    ({"pp": 5}, EIGHT, ["num_hidden_layers 32 is not divisible by pp 5", "32 = 6 x 5 + 2",
                        "--pipeline-model-parallel-size"]),
    ({"pp": 2, "vpp": 3}, EIGHT, ["16 layers of pipeline stage 0", "vpp 3"]),
    ({"vpp": 2}, EIGHT, ["vpp 2 needs pp > 1"]),
    ({"first": 2}, EIGHT, ["needs pp > 1", "--decoder-first-pipeline-num-layers"]),
    ({"pp": 4, "first": 3}, EIGHT, ["(32 - 3) 29 is not divisible by pp 3"]),
    ({"pp": 2, "first": 3, "last": 4}, EIGHT, ["do not add up to 32 layers"]),
    ({"pp": 2, "first": 0}, EIGHT, ["do not add up"]),
    ({"tp": 2, "pp": 2, "world": 6}, EIGHT, ["world size 6 is not a multiple of tp x pp x cp = 4", "multiple of 4",
                                             "--nproc-per-node"]),
    ({"tp": 2, "pp": 2, "ep": 2, "world": 4}, EIGHT, ["etp x ep x pp = 8", "--expert-tensor-parallel-size"]),
    ({"pp": 8}, preset("tiny"), ["num_hidden_layers 4 is not divisible by pp 8"]),
], ids=str)  # fmt: skip
def test_refused_with_the_arithmetic_and_the_flag(sizes, config, parts):
    with pytest.raises(ConfigError) as error:
        ParallelLayout(**sizes).validate(config)
    for part in parts:
        assert part in str(error.value), str(error.value)


def test_the_converters_flags_are_named_by_the_converter():
    with pytest.raises(ConfigError, match="--target-tensor-parallel-size"):
        ParallelLayout(tp=3).validate(EIGHT, TARGET_FLAGS)


@pytest.mark.parametrize("size", [0, -1, 1.0, True, "2"])
def test_sizes_are_positive_integers(size):
    with pytest.raises(ConfigError, match="must be a positive integer"):
        ParallelLayout(tp=size)


def test_what_fits_is_accepted():
    for layout in (ParallelLayout(tp=4, pp=2, world=8), ParallelLayout(pp=8, ep=2, world=16),
                   ParallelLayout(tp=8, pp=4, vpp=2, ep=8, etp=1, world=32), ParallelLayout(pp=3, first=11, last=11)):
        assert layout.validate(EIGHT) is layout
