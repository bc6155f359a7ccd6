"""The state of optimizers that a checkpoint was saved by, in the form of those that read it."""

from types import SimpleNamespace

import pytest
import torch

from megatron_mixtral.errors import CheckpointError
from megatron_mixtral.runtime.engine_fixes.bucket_padding import with_bucket_padding
from megatron_mixtral.runtime.engine_fixes.expert_optimizers import regroup
from megatron_mixtral.runtime.engine_fixes.optimizer_load import settled

DENSE, EXPERT = ({"lr": 0.1, "step": 5, "is_expert_parallel": expert} for expert in (False, True))


def test_distributed_optimizers_are_regrouped() -> None:
    def part(group: dict, **more: object) -> dict:
        return {"optimizer": {"param_groups": [group]}, "param_state_sharding_type": "fully_reshardable", **more}

    as_two = {0: part(DENSE), 1: part(EXPERT)}
    one = regroup({**as_two, "param_state": "tensors"}, wanted=1)
    assert one == {**part(DENSE, param_state="tensors"), "optimizer": {"param_groups": [DENSE, EXPERT]}}
    two = regroup({**part(DENSE), 0: {"param_state": "dense"}, 1: {"param_state": "experts"}}, wanted=2)
    for index, tensors in enumerate(("dense", "experts")):
        assert two[index] == {**part(DENSE, param_state=tensors), "optimizer": {"param_groups": [DENSE, EXPERT]}}
    assert regroup(as_two, wanted=2) is as_two
    assert regroup(part(DENSE), wanted=1) == part(DENSE)


@pytest.mark.parametrize("mixed_precision", [False, True])
def test_whole_optimizers_are_regrouped(mixed_precision: bool) -> None:
    """Without the distributed optimizer the parameters of the groups are read into place, by their order."""
    def state(groups: list[dict], tensors: dict, **more: object) -> dict:
        inner = {"param_groups": groups, "state": tensors}
        return {"optimizer": inner, **more} if mixed_precision else inner

    more = {"grad_scaler": "scale"} if mixed_precision else {}
    read = {"fp32_from_fp16_params": [["weight"]]} if mixed_precision else {}
    saved = {0: state([DENSE], {"common_step": 5}, **more), 1: state([EXPERT], {"common_step": 5}, **more)}
    one = regroup({**saved, **state([{"params": [0]}], {0: "moments"}, **read)}, wanted=1)
    groups = [{**DENSE, "params": [0]}, {**EXPERT, "params": []}]
    assert one == state(groups, {"common_step": 5, 0: "moments"}, **more, **read)

    parts = {index: state([{"params": [index]}], {index: "moments"}, **read) for index in (0, 1)}
    two = regroup({**state([DENSE], {"common_step": 5}, **more), **parts}, wanted=2)
    for index in (0, 1):
        groups = [{**DENSE, "params": [index]}, {**EXPERT, "params": []}]
        assert two[index] == state(groups, {"common_step": 5, index: "moments"}, **more, **read)


def test_bucket_padding_is_where_the_buffer_has_it() -> None:
    buckets = [SimpleNamespace(offset=0, numel_unpadded=3, grad_data=torch.empty(4)),
               SimpleNamespace(offset=4, numel_unpadded=2, grad_data=torch.empty(4))]
    state = {"buckets_coalesced": True, 0: {"dtype": {"param": torch.arange(1.0, 6.0), "numel_unpadded": 5}}}
    found = with_bucket_padding(state, [SimpleNamespace(buckets=buckets)])
    assert found[0]["dtype"]["param"].tolist() == [1, 2, 3, 0, 4, 5, 0, 0]
    assert found[0]["dtype"]["numel_unpadded"] == 5
    assert with_bucket_padding(None, []) is None


def group(max_lr: float, min_lr: float = 0.0, wd_mult: float = 1.0, **more: object) -> dict:
    return {"params": [int(wd_mult)], "max_lr": max_lr, "min_lr": min_lr, "wd_mult": wd_mult, "lr_mult": 1.0,
            "is_expert_parallel": False, "default_config": True, "betas": (0.9, 0.99), **more}


def test_groups_are_found_by_what_they_are_and_have_the_settings_of_the_run() -> None:
    """Norms, and embeddings with a learning rate of their own, whatever these rates were; `step` is no setting."""
    saved = [group(3e-3, step=7, params=["a"]), group(3e-3, wd_mult=0.0, step=7, params=["b"]),
             group(5e-3, default_config=False, step=7, params=["c"])]
    now = [group(4e-3, default_config=False), group(1e-3, betas=(0.5, 0.6)), group(1e-3, wd_mult=0.0)]
    plain, norms, decoupled = settled(saved, now)
    assert (plain["max_lr"], plain["betas"], plain["step"], plain["params"]) == (1e-3, (0.5, 0.6), 7, ["a"])
    assert (norms["max_lr"], norms["wd_mult"], norms["step"]) == (1e-3, 0.0, 7)
    assert (decoupled["max_lr"], decoupled["default_config"]) == (4e-3, False)
    assert saved[0]["max_lr"] == 3e-3, "what was read is not changed"


def test_settings_that_are_kept_are_those_of_the_checkpoint() -> None:
    now = [group(1e-3, betas=(0.5, 0.6))]
    [found] = settled([group(3e-3, 1e-4)], now, kept=("max_lr", "min_lr"))
    for one in (found, now[0]):
        assert (one["max_lr"], one["min_lr"], one["betas"]) == (3e-3, 1e-4, (0.5, 0.6))


def test_groups_of_one_kind_are_told_apart_by_the_order_of_their_rates() -> None:
    saved = [group(1.0, default_config=False, params=["low"]), group(2.0, default_config=False, params=["high"])]
    low, high = settled(saved, [group(0.4, default_config=False), group(0.2, default_config=False)])
    assert (low["max_lr"], low["params"], high["max_lr"], high["params"]) == (0.2, ["low"], 0.4, ["high"])


def test_another_number_of_groups_is_refused() -> None:
    with pytest.raises(CheckpointError, match="1 group.* default_config False, the checkpoint has 0: .*decoupled-lr"):
        settled([group(1.0)], [group(1.0), group(2.0, default_config=False)])
