"""The pages for users of other programs: every name of theirs has a row, and what a row names here is there.

The commands in their bash blocks are run by test_readme.py like those of every page.
"""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_mixtral import __main__ as commands
from megatron_mixtral.training.engine_flags import table

ROOT = Path(__file__).resolve().parents[2]
# What users of the other program type, from its guides: commands, flags, variables and keys.
THEIRS = {
    "from_modellink.md": """set_env.sh torch_npu apex AscendSpeed conda --handler-name GeneralInstructionHandler --input
        --output-prefix --tokenizer-type PretrainedFromHF --tokenizer-name-or-path --append-eod --tokenizer-not-use-fast
        --workers --model-type --loader mixtral_hf mixtral_mg --saver --load-dir --save-dir --tokenizer-model
        --target-tensor-parallel-size --target-pipeline-parallel-size --target-expert-parallel-size --save-model-type
        DATA_PATH TOKENIZER_MODEL CKPT_SAVE_DIR CKPT_LOAD_DIR GPUS_PER_NODE MASTER_ADDR MASTER_PORT NNODES NODE_RANK
        WORLD_SIZE TP PP EP DATA_ARGS --is-instruction-dataset --load pretrain_mixtral_8x7b_ptd.sh
        tasks/inference/generate_mixtral_8x7b_ptd.sh tasks/inference/inference_mixtral.py DISTRIBUTED_ARGS CHECKPOINT
        tasks/evaluation/evaluate_mixtral_8x7b_ptd.sh TOKENIZER_PATH TASK git wget""",
    "from_xtuner.md": """train convert chat list-cfg copy-cfg pth_to_hf merge --work-dir --deepspeed deepspeed_zero1
        deepspeed_zero2 deepspeed_zero3 --launcher slurm mixtral_8x7b_qlora_oasst1_e3
        mixtral_8x7b_instruct_full_oasst1_e3 --resume --fp32 --prompt-template streamlit ssh tmux calc.py
        throughput_hook.py srun pretrained_model_name_or_path alpaca_en_path data_files dataset_map_fn openai_map_fn
        alpaca_map_fn prompt_template internlm2_chat max_length pack_to_max_length sequence_parallel_size batch_size
        accumulative_counts dataloader_num_workers max_epochs optim_type lr betas weight_decay max_norm warmup_ratio
        save_steps save_total_limit evaluation_freq evaluation_inputs LoraConfig BitsAndBytesConfig ThroughputHook eta
        time data_time memory loss tflops tokens_per_sec""",
}  # fmt: skip
ROW = re.compile(r"^\| (.+?) \| (.+) \|$", re.MULTILINE)


def rows(page: str) -> list[tuple[str, str]]:
    found = ROW.findall((ROOT / "docs" / page).read_text(encoding="utf-8"))
    return [(theirs, ours) for theirs, ours in found if set(theirs) != {"-"} and ours != "here"]


@pytest.mark.parametrize("page", THEIRS)
def test_every_name_of_theirs_has_a_row(page):
    left = " ".join(theirs for theirs, _ in rows(page))
    words = re.findall(r"[\w./-]+", left)
    known = {*words, *(part for word in words for part in word.split("/"))}
    assert not [name for name in THEIRS[page].split() if name not in known]


@pytest.fixture(scope="module")
def flags() -> set[str]:
    """Every flag of ours that a row can mean: what the commands' own helps print, and the engine's."""
    found = set()
    for name in commands.COMMANDS:
        done = subprocess.run([sys.executable, "-m", "megatron_mixtral", name, "--help"], cwd=ROOT, capture_output=True,
                              text=True)
        assert done.returncode == 0, done.stderr
        found |= set(re.findall(r"--[a-z][\w-]+", done.stdout))
    return found | set(table.flags())


@pytest.mark.parametrize("page", THEIRS)
def test_what_a_row_names_here_is_there(page, flags):
    wrong = []
    for theirs, ours in rows(page):
        for code in re.findall(r"`([^`]+)`", ours):
            words = code.split()
            if words[0] == "srun":
                words = words[2:]
            if words[0] in ("python", "bash", "source"):
                wrong += [] if (ROOT / words[1]).is_file() else [f"{theirs}: {words[1]}"]
            elif words[0] == "megatron-mixtral":
                wrong += [] if words[1] in commands.COMMANDS else [f"{theirs}: {words[1]}"]
            elif re.match(r"(tools|examples)/", words[0]):
                wrong += [] if (ROOT / words[0]).is_file() else [f"{theirs}: {words[0]}"]
            wrong += [f"{theirs}: {word}" for word in words if word.startswith("--") and word not in flags]
    assert not wrong
