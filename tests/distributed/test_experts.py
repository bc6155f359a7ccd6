"""Grouped experts are the engine's sequential experts: outputs, gradients, state dicts, distributed checkpoints."""

import pytest
import torch
from helpers import engine
from helpers.ranks import run_ranks

HIDDEN, FFN = 32, 48
COUNTS = {"balanced": [6, 6, 6, 6], "unbalanced": [1, 17, 2, 4], "empty": [0, 24, 0, 0], "nothing": [0, 0, 0, 0]}


def _experts(layout: dict[str, int], dtype: torch.dtype = torch.float32, ffn: int = FFN) -> tuple:
    """Ours and the engine's, with the same weights, and the local number of experts."""
    from megatron.core.models.backends import LocalSpecProvider
    from megatron.core.process_groups_config import ProcessGroupCollection

    from megatron_mixtral.config import MixtralConfig
    from megatron_mixtral.model import transformer_config
    from megatron_mixtral.model.experts import GroupedExperts

    laid = engine.set_up(layout)
    model = MixtralConfig(vocab_size=96, hidden_size=HIDDEN, intermediate_size=ffn, num_hidden_layers=1,
                          num_attention_heads=4, num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2)
    config = transformer_config(model, laid, dtype)
    groups = ProcessGroupCollection.use_mpu_process_groups()
    local = 4 // laid.ep
    theirs = LocalSpecProvider().grouped_mlp_modules(False)(local, config, pg_collection=groups)
    ours = GroupedExperts(local, config, pg_collection=groups)
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs, local


def _named_gradients(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """By the names of the sequential experts."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(parameter.grad)
    return {name: value for name, value in module.state_dict().items() if value is not None}


def _compare(rank: int, layout: dict[str, int], dtype: torch.dtype, ffn: int) -> dict[str, float]:
    """For each distribution of tokens the largest difference of output, input, probability and weight gradients."""
    worst = {}
    for name, counts in COUNTS.items():
        ours, theirs, local = _experts(layout, dtype, ffn)
        counts = counts[:local]
        generator = torch.Generator().manual_seed(1)
        tokens = torch.randn(sum(counts), HIDDEN, generator=generator).to(dtype)
        probabilities = torch.rand(sum(counts), generator=generator)
        weights = torch.randn(sum(counts), HIDDEN, generator=generator).to(dtype)
        results = []
        for module in (ours, theirs):
            x, p = tokens.clone().requires_grad_(), probabilities.clone().requires_grad_()
            output, bias = module(x, torch.tensor(counts), p)
            assert bias is None and output.dtype == dtype
            output.backward(weights)
            results.append({"output": output.detach(), "x": x.grad, "p": p.grad, **_named_gradients(module)})
        first, second = results
        assert first.keys() == second.keys() and len(first) == 3 + 2 * local
        worst[name] = max(float((first[key] - second[key]).abs().max()) for key in first if first[key].numel())
    return worst


@pytest.mark.parametrize(("layout", "world"), [({}, 1), ({"ep": 2}, 2), ({"tp": 2, "ep": 2}, 4)],
                         ids=["one", "ep2", "ep2-etp2"])
def test_equal_the_sequential_experts(layout, world):
    for worst in run_ranks(world, _compare, layout, torch.float32, FFN):
        assert set(worst) == set(COUNTS) and max(worst.values()) < 1e-6, worst


@pytest.mark.parametrize(("dtype", "ffn", "tolerance"), [(torch.float32, 46, 1e-6), (torch.bfloat16, FFN, 2e-2)],
                         ids=["rows that grouped_mm refuses", "bf16"])
def test_other_sizes_and_types(dtype, ffn, tolerance):
    [worst] = run_ranks(1, _compare, {}, dtype, ffn)
    assert max(worst.values()) < tolerance, worst


def _shards(rank: int, layout: dict[str, int], singleton: bool) -> tuple:
    """What each kind of experts would write into a distributed checkpoint."""
    from megatron.core import parallel_state
    from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory

    found = []
    for module in _experts(layout)[:2]:
        metadata = {"singleton_local_shards": singleton,
                    "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True)}
        entries = []
        for entry in module.sharded_state_dict("mlp.", ((0, 1, 3),), metadata).values():
            for one in entry.build() if isinstance(entry, ShardedTensorFactory) else [entry]:
                data = one.data.tolist() if isinstance(one.data, torch.Tensor) else one.data
                entries.append((one.key, one.global_shape, one.global_offset, tuple(one.replica_id), data))
        found.append(sorted(entries, key=str))
    return tuple(found)


@pytest.mark.parametrize("singleton", [False, True])
@pytest.mark.parametrize(("layout", "world"), [({}, 1), ({"tp": 2, "ep": 2}, 4)], ids=["one", "ep2-etp2"])
def test_distributed_checkpoints_have_the_same_shards(layout, world, singleton):
    for ours, theirs in run_ranks(world, _shards, layout, singleton):
        assert ours == theirs and ours


def _names(rank: int) -> None:
    ours, theirs, _ = _experts({})
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    assert [name for name, _ in ours.named_parameters()][0] == "linear_fc1.weight3", "laid out from the last"
    engines = {name: torch.full_like(weight, float(index)) for index, (name, weight) in
               enumerate(ours.named_parameters())} | {"linear_fc1._extra_state": None, "linear_fc1._extra_state1": None}
    ours.load_state_dict(dict(engines))  # transformer-engine's names
    assert all(torch.equal(weight, engines[name]) for name, weight in ours.named_parameters())


def test_state_dicts_have_the_names_of_both():
    run_ranks(1, _names)


def _storage(rank: int, bucket: int | None) -> None:
    """The stack is a view of the parameters when they are made, moved, and taken over by DDP's buffers."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig

    from megatron_mixtral.model.experts import stacked

    ours, theirs, _ = _experts({})
    linears = ours.linear_fc1, ours.linear_fc2
    for moved in (ours, ours.to(torch.bfloat16), ours.to(torch.float32)):
        assert all(stacked(linear.weights()) is not None for linear in linears), moved
    ours.load_state_dict(theirs.state_dict())
    config = DistributedDataParallelConfig(use_distributed_optimizer=True, bucket_size=bucket)
    ddp = DistributedDataParallel(ours.config, config, ours)
    for linear in linears:
        weights = linear.weights()
        assert torch.equal(stacked(weights), torch.stack(weights))
        assert stacked([weight.main_grad for weight in weights]) is not None
    x, p, counts = torch.randn(8, HIDDEN), torch.rand(8), torch.tensor([2, 0, 5, 1])
    for _ in range(2):  # two micro-batches
        ddp(x, counts, p)[0].sum().backward()
        theirs(x, counts, p)[0].sum().backward()
    gradients = {f"linear_fc{n}.weight{i}": getattr(expert, f"linear_fc{n}").weight.grad
                 for i, expert in enumerate(theirs.local_experts) for n in (1, 2)}
    for name, weight in ours.named_parameters():
        assert weight.grad_added_to_main_grad and weight.grad is None
        assert (weight.main_grad - gradients[name]).abs().max() < 1e-5
    assert weight.main_grad.abs().max() > 0.01


@pytest.mark.parametrize("bucket", [None, 1])
def test_weights_stay_in_place_and_gradients_are_accumulated_there(bucket):
    run_ranks(1, _storage, bucket)


def test_tensors_that_do_not_lie_evenly_have_no_stack():
    from megatron_mixtral.model.experts import stacked

    whole = torch.arange(24.0).view(4, 2, 3)
    assert torch.equal(stacked(list(whole)), whole)
    assert torch.equal(stacked([whole[0], whole[2]]), whole[::2])
    assert stacked([whole[2], whole[0]]) is None, "descending"
    assert stacked([whole[0], whole[1], whole[3]]) is None
    assert stacked([whole[0], whole[1].clone()]) is None
    assert stacked([whole[0].t(), whole[1].t()]) is None
