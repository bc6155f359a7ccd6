"""The engine alone, without any repair of this library, loads what is converted here, and what it saves converts back.

Judge of both ways is `transformers`: the losses of every token, computed from the Hugging Face directory.
"""

from pathlib import Path

import pytest
import torch
from helpers import stock
from helpers.models import tiny_hf_mixtral
from helpers.program import Running

from megatron_mixtral.weights import cli

# The flags of a stock Mixtral as a user types them: nothing here is taken from this library.
ARCHITECTURE = """--num-layers 4 --hidden-size 32 --ffn-hidden-size 48 --moe-ffn-hidden-size 48 --num-attention-heads 4
    --group-query-attention --num-query-groups 2 --kv-channels 8 --num-experts 4 --moe-router-topk 2
    --normalization RMSNorm --swiglu --disable-bias-linear --untie-embeddings-and-output-weights
    --position-embedding-type rope --rotary-base 1000000 --attention-dropout 0 --hidden-dropout 0
    --max-position-embeddings 64 --padded-vocab-size 96""".split()
FLAGS = """--use-mcore-models --transformer-impl local --norm-epsilon 1e-5 --moe-token-dispatcher-type alltoall
    --moe-aux-loss-coeff 0 --moe-router-load-balancing-type none --seq-length 32 --tokenizer-type NullTokenizer
    --vocab-size 96 --make-vocab-size-divisible-by 1 --micro-batch-size 1 --global-batch-size 4 --train-iters 3
    --lr 1e-3 --lr-decay-style constant --eval-iters 0 --eval-interval 100 --no-masked-softmax-fusion
    --no-persist-layer-norm --no-gradient-accumulation-fusion --no-rope-fusion --distributed-backend gloo
    --num-workers 0 --save-interval 2 --log-interval 1""".split()
SIZES = {"tp": "tensor", "pp": "pipeline", "ep": "expert"}


def flags_of(layout: dict[str, int], prefix: str = "", suffix: str = "model-parallel-size") -> list[str]:
    return [word for axis, size in layout.items() for word in (f"--{prefix}{SIZES[axis]}-{suffix}", str(size))]


@pytest.fixture(scope="module")
def hf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_hf_mixtral(tmp_path_factory.mktemp("stock") / "hf")


def token_losses(hf: Path, rows: torch.Tensor) -> torch.Tensor:
    """What transformers makes of rows [N, S + 1]: losses [N, S]."""
    from transformers import MixtralForCausalLM

    model = MixtralForCausalLM.from_pretrained(hf, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.no_grad():
        logits = model(rows[:, :-1]).logits
    return torch.nn.functional.cross_entropy(logits.transpose(1, 2), rows[:, 1:], reduction="none")


def differs(hf: Path, folder: Path, step: int) -> float:
    """Largest difference between the run's losses in a step (counted from 0) and transformers'."""
    seen = [note for path in sorted(folder.glob("rank*.pt")) for note in torch.load(path) if note[0] == step]
    assert len(seen) >= 4, "every sample of the batch is seen"
    rows, losses = (torch.stack(part) for part in zip(*(note[1:] for note in seen), strict=True))
    return (token_losses(hf, rows) - losses).abs().max().item()


@pytest.mark.parametrize(("form", "world", "layout", "more"), [
    ("torch", 4, {"pp": 2, "ep": 2}, ARCHITECTURE),
    ("torch_dist", 4, {"pp": 2, "ep": 2}, ["--use-checkpoint-args", "--dist-ckpt-strictness", "raise_unexpected"]),
    ("torch", 2, {"tp": 2, "ep": 2}, ["--use-checkpoint-args", "--expert-tensor-parallel-size", "1",
                                      "--sequence-parallel", "--house-norm"]),
    ("torch_dist", 2, {"tp": 2}, [*ARCHITECTURE, "--sequence-parallel", "--house-norm"]),
])
def test_the_stock_engine_loads_ours_and_we_read_what_it_saves(form, world, layout, more, hf, tmp_path) -> None:
    size = [*flags_of(layout, "target-", "parallel-size")] if form == "torch" else []
    if "--expert-tensor-parallel-size" in more:
        size += ["--target-expert-tensor-parallel-size", "1"]
    cli.convert(["--loader", "mixtral_hf", "--load-dir", str(hf), "--save-dir", str(tmp_path / "ours"), *size,
                 "--target-ckpt-format", form])
    argv = [*FLAGS, *flags_of(layout), *more, "--ckpt-format", form, "--load", str(tmp_path / "ours"),
            "--save", str(tmp_path / "theirs")]
    found = Running(world, argv, tmp_path / "log", module=stock.__name__).finish()
    assert found.codes == [0] * world, "\n".join(log[-2500:] for log in found.logs)
    said = "".join(found.logs)
    assert "successfully loaded checkpoint" in said
    assert "load_return" not in said, "the engine's strict load failed and a lenient one followed"
    assert differs(hf, tmp_path / "log", 0) < 1e-5

    cli.convert(["--loader", "mixtral_mg", "--load-dir", str(tmp_path / "theirs" / "iter_0000002"), "--save-dir",
                 str(tmp_path / "hf"), "--save-model-type", "huggingface"])
    assert differs(tmp_path / "hf" / "mg2hg", tmp_path / "log", 2) < 1e-5, "step 2 is computed with what was saved"
    assert differs(hf, tmp_path / "log", 2) > 1e-3, "the run learned something in between"
