"""The bodies of tests/distributed on GPUs and NCCL, with as many ranks as there are GPUs."""

from pathlib import Path

import pytest
import torch
from helpers import engine
from helpers.models import tiny_hf_mixtral
from helpers.ranks import run_ranks

from megatron_mixtral.config import ParallelLayout
from megatron_mixtral.weights import convert, open_sink, open_source

pytestmark = pytest.mark.gpu
LAYOUTS = [({}, 1), ({"tp": 2}, 2), ({"pp": 2}, 2), ({"ep": 2}, 2), ({"tp": 2, "pp": 2, "ep": 2, "etp": 1}, 4)]


@pytest.mark.parametrize(("sizes", "world"), LAYOUTS)
def test_logits_and_first_loss_equal_transformers(sizes: dict[str, int], world: int, tmp_path: Path) -> None:
    if torch.cuda.device_count() < world:
        pytest.skip(f"needs {world} GPUs, {torch.cuda.device_count()} visible")
    from transformers import MixtralForCausalLM

    hf = tiny_hf_mixtral(tmp_path / "hf")
    convert(open_source(hf), open_sink(tmp_path / "ranks", "torch", ParallelLayout(**sizes)))
    batch = torch.randint(3, 96, (4, 33), generator=torch.Generator().manual_seed(7))
    with torch.no_grad():
        expected = MixtralForCausalLM.from_pretrained(hf, dtype=torch.float32).eval()(batch[:, :-1]).logits
    loss = torch.nn.functional.cross_entropy(expected.flatten(0, 1), batch[:, 1:].flatten())
    found = torch.cat([one for one in run_ranks(world, engine.logits, str(tmp_path / "ranks"), sizes, batch)
                       if one is not None])
    # fp32 on the device, TF32 off by default: other summation orders, no other precision.
    assert (found - expected).abs().max() < 1e-4
    for losses, _ in filter(None, run_ranks(world, engine.train, str(tmp_path / "ranks"), sizes, batch[None], 1e-3)):
        assert losses[0] == pytest.approx(float(loss), abs=1e-4)
