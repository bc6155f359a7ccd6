"""`--overlap-moe-expert-parallel-comm` hides the exchange of tokens behind another micro-batch, and changes no bit."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import datasets, engine
from helpers.models import tiny_hf_mixtral
from helpers.program import pretrain
from helpers.ranks import run_ranks
from test_context_parallel import AUX, SEQUENCE, packed_rows

from megatron_mixtral.config import ParallelLayout
from megatron_mixtral.data.instruction import InstructionOptions, preprocess_instructions
from megatron_mixtral.tokenizer import mixtral_tokenizer_path
from megatron_mixtral.weights import convert, open_sink, open_source

FLAG = "--overlap-moe-expert-parallel-comm"
EP2 = {"ep": 2}
LAYOUTS = {"ep2": (["--expert-model-parallel-size", "2"], 2),
           "pp2-vpp2-ep2": (["--pipeline-model-parallel-size", "2", "--num-virtual-stages-per-pipeline-rank", "2",
                             "--expert-model-parallel-size", "2"], 4),
           "tp2-ep2": (["--tensor-model-parallel-size", "2", "--expert-model-parallel-size", "2",
                        "--expert-tensor-parallel-size", "1"], 4)}
STEPS = 5
RECIPE = ["--seq-length", "96", "--micro-batch-size", "1", "--global-batch-size", "8", "--lr", "1e-3",
          "--lr-decay-style", "constant", "--eval-iters", "0", "--train-iters", str(STEPS), "--bf16",
          "--use-distributed-optimizer", "--moe-aux-loss-coeff", "0.5"]


def _gradients(rank: int, checkpoint: str, overlap: bool) -> dict[str, torch.Tensor]:
    """Of packed instruction data under balancing losses, which must see neither padding nor untrained tokens."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
    from megatron.core.models.common.model_chunk_schedule_plan import TransformerModelChunkSchedulePlan as Plan
    from megatron.core.timers import Timers
    from megatron.training import global_vars

    from megatron_mixtral.training import micro_batch
    from megatron_mixtral.training.metrics import ExpertLoad

    global_vars._GLOBAL_TIMERS = Timers(0, "minmax")
    options = {"calculate_per_token_loss": True, "overlap_moe_expert_parallel_comm": overlap, **AUX}
    [model] = engine.load_stages(checkpoint, EP2, torch.bfloat16, **options)
    load = ExpertLoad(4, 4, "cpu")
    load.watch(model)
    model = DistributedDataParallel(model.config, DistributedDataParallelConfig(grad_reduce_in_fp32=True), model)
    model.config.finalize_model_grads_func = finalize_model_grads
    ran, run = [], Plan.run
    Plan.run = staticmethod(lambda *pair, **more: ran.append(pair[:2]) or run(*pair, **more))
    reduced = engine._schedule([model], packed_rows(1), micro_batch.instruction_step, seq_length=SEQUENCE,
                               forward_only=False)
    assert len([pair for pair in ran if None not in pair]) == (3 if overlap else 0), "two micro-batches at a time"
    found = {name: parameter.main_grad.clone() for name, parameter in model.module.named_parameters()}
    return {**found, "loss": torch.stack([one["lm loss"] for one in reduced]), "load": load.collect()}


def test_packed_rows_under_balancing_losses_bit_by_bit(tmp_path: Path) -> None:
    convert(open_source(tiny_hf_mixtral(tmp_path / "hf", dtype=torch.bfloat16)),
            open_sink(tmp_path / "ranks", "torch", ParallelLayout(**EP2)))
    plain, overlapped = (run_ranks(2, _gradients, str(tmp_path / "ranks"), overlap) for overlap in (False, True))
    for ours, theirs in zip(overlapped, plain, strict=True):
        assert max(float(one.abs().max()) for one in theirs.values()) > 0.1
        assert [name for name in theirs if not torch.equal(ours[name], theirs[name])] == []


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """The flags of each kind of data, and the model."""
    root = tmp_path_factory.mktemp("overlap")
    records = [{"conversation": [{"input": f"Say {n}.", "output": " ".join(["word"] * (1 + n % 13))}]}
               for n in range(1, 81)]
    (root / "records.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    preprocess_instructions(InstructionOptions(
        inputs=(str(root / "records.jsonl"),), output_prefix=str(root / "packed"), handler="auto", seq_length=96,
        tokenizer_path=str(mixtral_tokenizer_path()), tokenizer_type="Llama2Tokenizer", pack=True))
    prefix = datasets.write_dataset(root / "corpus_text_document", vocab_size=96)
    small, large = (str(tiny_hf_mixtral(root / f"hf{size}", dtype=torch.bfloat16, vocab_size=size,
                                        max_position_embeddings=128)) for size in (96, 32000))
    text = ["--data-path", prefix, "--split", "1,0,0", "--data-cache-path", str(root / "cache"),
            "--hf-checkpoint", small]
    return {
        "text": text, "eod-mask": [*text, "--eod-mask-loss"],
        "eod-mask-per-token": [*text, "--eod-mask-loss", "--calculate-per-token-loss"],
        "again": [*text, "--recompute-granularity", "selective", "--recompute-modules", "moe_act", "layernorm"],
        "packed": ["--is-instruction-dataset", "--data-path", str(root / "packed"), "--split", "1,0,0",
                   "--hf-checkpoint", large],
    }


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["text", "eod-mask", "eod-mask-per-token", "again", "packed"])
@pytest.mark.parametrize("name", LAYOUTS)
def test_five_steps_of_a_run(name: str, kind: str, sets: dict[str, list[str]], tmp_path: Path) -> None:
    layout, world = LAYOUTS[name]
    plain, overlapped = (pretrain(world, [*RECIPE, *layout, *sets[kind], *more], tmp_path / str(len(more)))
                         for more in ([], [FLAG]))
    for one in (plain, overlapped):
        assert all(code == 0 for code in one.codes), one.logs[-1][-3000:]

    def figures(outcome: Any) -> list[Any]:
        return [[outcome.steps[step][key] for key in ("lm_loss", "aux_loss", "grad_norm", "expert_imbalance")]
                for step in range(1, STEPS + 1)]

    assert figures(overlapped) == figures(plain)
