"""What the engine itself makes of a layout, in one process: its state dicts, and its distributed checkpoints.

    python tests/helpers/engine_files.py REQUEST.json

The request lists {"checkpoint", "layout", "names", "dist"}: for every rank of the layout the engine's model is built
(under a process group that only pretends to have the other ranks), the rank's file of the converted `checkpoint` is
loaded into it, names, shapes and differences go to the JSON file `names`, and the shards of all ranks are saved
together as a torch_dist checkpoint in the directory `dist`. In between the engine fills the emptied models from the
torch_dist checkpoint `ours`; what then differs from the rank files is listed in `names` under "loaded".
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist


def engine_group(layout: Any, rank: int) -> None:
    """Make this process believe that it is one rank of a layout. Collectives do nothing."""
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=rank, world_size=layout.world, store=FakeStore())
    parallel_state.initialize_model_parallel(
        layout.tp, layout.pp, layout.vpp if layout.vpp > 1 else None, expert_model_parallel_size=layout.ep,
        expert_tensor_parallel_size=layout.etp, create_gloo_process_groups=False)
    model_parallel_cuda_manual_seed(1)


def chunks_of(config: Any, layout: Any, rank: int, rows: int) -> list[Any]:
    """The engine's model chunks of a rank, in bfloat16, with `rows` vocabulary rows."""
    from megatron_mixtral.model import build, transformer_config

    pp = layout.coord_of(rank).pp
    return [build(config, transformer_config(config, layout, torch.bfloat16), max_sequence_length=32,
                  padded_vocab_size=rows, pre_process=layout.is_first(pp, chunk),
                  post_process=layout.is_last(pp, chunk), vp_stage=chunk if layout.vpp > 1 else None)
            for chunk in range(layout.vpp)]


def filled_wrongly(model: Any, metadata: dict[str, Any], ours: str, expected: dict[str, Any]) -> list[str]:
    """Empty a rank's model, let the engine fill it from a distributed checkpoint; the names that are not `expected`."""
    from unittest.mock import patch

    from megatron.core import dist_checkpointing
    from torch.distributed.checkpoint.utils import _DistWrapper

    wrap = _DistWrapper.__init__
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    # Ranks that only pretend to be there cannot agree on a plan: this one plans for itself.
    with patch.object(_DistWrapper, "__init__", lambda self, group, use_dist, rank: wrap(self, None, False, 0)):
        loaded = dist_checkpointing.load({"model": model.sharded_state_dict(metadata=metadata)}, ours,
                                         validate_access_integrity=False)
    assert loaded["args"].num_layers and loaded["checkpoint_version"] == 3.0
    model.load_state_dict(loaded["model"], strict=False)
    return [name for name, value in model.state_dict().items()
            if value is not None and not torch.equal(value, expected[name])]


def serve(request: dict[str, Any]) -> None:
    """Do one request; see the module's docstring."""
    from megatron.core import dist_checkpointing, parallel_state
    from megatron.training.checkpointing import get_checkpoint_name

    from megatron_mixtral.config import MixtralConfig, ParallelLayout

    checkpoint = Path(request["checkpoint"])
    config = MixtralConfig.from_checkpoint(checkpoint)
    layout = ParallelLayout(**request["layout"], world=ParallelLayout(**request["layout"]).min_world)
    found, shards = {}, {}
    for rank in range(layout.world):
        engine_group(layout, rank)
        stored = torch.load(get_checkpoint_name(str(checkpoint), 0, release=True), weights_only=True)
        for number, model in enumerate(chunks_of(config, layout, rank, stored["args"].padded_vocab_size)):
            key = f"model{number}" if layout.vpp > 1 else "model"
            state = model.state_dict_for_save_checkpoint()
            model.load_state_dict(stored[key], strict=True)
            found[f"{rank} {key}"] = {
                "engine": {name: value if value is None else list(value.shape) for name, value in state.items()},
                "stored": {name: value if value is None else list(value.shape) for name, value in stored[key].items()},
                "different": [name for name, value in model.state_dict().items()
                              if value is not None and not torch.equal(value, stored[key][name])]}
            metadata = {"dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True)}
            found[f"{rank} {key}"]["loaded"] = filled_wrongly(model, metadata, request["ours"], stored[key])
            shards[f"{rank} {key}"] = model.sharded_state_dict(metadata=metadata)
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    Path(request["dist"]).mkdir(parents=True)
    dist_checkpointing.save({**shards, "args": stored["args"], "iteration": 7, "checkpoint_version": 3.0},
                            request["dist"])
    Path(request["names"]).write_text(json.dumps(found), encoding="utf-8")
    dist.destroy_process_group()


def main(path: str) -> None:
    """Serve the requests of a file."""
    from megatron_mixtral import runtime

    runtime.ready()
    for request in json.loads(Path(path).read_text(encoding="utf-8")):
        serve(request)


if __name__ == "__main__":
    main(sys.argv[1])
