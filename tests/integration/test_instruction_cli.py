"""Preprocessing of instruction data by the commands as they are typed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from examples.quickstart.hf_tokenizer import write_hf_tokenizer
from megatron_mixtral.data.datasets import InstructionFiles

ROOT = Path(__file__).resolve().parents[2]

ALPACA = r"""
mkdir ./dataset/Mixtral-8x7B/
python ./tools/preprocess_data.py \
    --input ./dataset/Alpaca_data_gpt4_zh.jsonl \
    --output-prefix ./dataset/Mixtral-8x7B/alpaca \
    --tokenizer-type PretrainedFromHF \
    --tokenizer-name-or-path ./model_from_hf/Mixtral-8x7B/ \
    --append-eod \
    --tokenizer-not-use-fast \
    --handler-name GeneralInstructionHandler \
    --workers 4
"""

PACKED_CHATS = r"""
python tools/preprocess_data.py --input dataset/chats.json --output-prefix encoded/chats \
    --tokenizer-type PretrainedFromHF --tokenizer-model $MIXTRAL_HUGGINGFACE_PATH \
    --handler-name auto --seq-length 4096 --pack
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A working directory as after the download: tools, model_from_hf and dataset, in the layout of the real files."""
    path = tmp_path_factory.mktemp("work")
    (path / "tools").symlink_to(ROOT / "tools")
    write_hf_tokenizer(path / "model_from_hf/Mixtral-8x7B")
    (path / "dataset").mkdir()
    records = [{"instruction": f"Name {n} colours.", "input": "", "output": "Red, " * n + "blue.",
                "instruction_zh": f"说出{n}种颜色。", "input_zh": "", "output_zh": "红、" * n + "蓝。"}
               for n in range(1, 51)]
    (path / "dataset/Alpaca_data_gpt4_zh.jsonl").write_text(
        "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")
    # The form of XTuner's tutorial: one JSON array, the same conversation many times.
    chat = {"conversation": [{"input": "请介绍一下你自己", "output": "我是一个小助手。"}]}
    (path / "dataset/chats.json").write_text(json.dumps([chat] * 1000, ensure_ascii=False), encoding="utf-8")
    return path


def bash(folder: Path, command: str) -> subprocess.CompletedProcess:
    kept = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    kept |= {"PATH": f"{Path(sys.executable).parent}:{kept['PATH']}",
             "MIXTRAL_HUGGINGFACE_PATH": "model_from_hf/Mixtral-8x7B"}
    return subprocess.run(["bash", "-euc", command], cwd=folder, env=kept, capture_output=True, text=True, timeout=600)


def test_the_alpaca_command(folder):
    done = bash(folder, ALPACA)
    assert done.returncode == 0, done.stderr
    assert "50 records -> 50 samples" in done.stderr and "left out: 50 times output_zh_not_read" in done.stderr
    prefix = folder / "dataset/Mixtral-8x7B/alpaca"
    names = {path.name for path in prefix.parent.iterdir()}
    assert names == {"reports"} | {f"alpaca_packed_{column}_document.{end}" for end in ("bin", "idx")
                                              for column in ("input_ids", "attention_mask", "labels")}
    rows = InstructionFiles(str(prefix))
    assert len(rows) == 50 and not rows.packed
    [(ids, labels)] = rows.row(0)
    assert ids.dtype == labels.dtype == "int32" and ids[-1] == labels[-1] == 2 and (labels[:20] == -100).all()


def test_chats_of_one_json_array_are_packed(folder):
    done = bash(folder, PACKED_CHATS)
    assert done.returncode == 0, done.stderr
    assert "read the records by their content as: 1000 of conversation" in done.stderr
    rows = InstructionFiles(str(folder / "encoded/chats"))
    assert rows.packed and sum(len(rows.row(number)) for number in range(len(rows))) == 1000
    assert rows.longest() <= 4096


def test_a_handler_that_does_not_exist_is_refused_in_a_sentence(folder):
    done = bash(folder, ALPACA.replace("mkdir", "mkdir -p").replace("GeneralInstructionHandler", "Alpaca"))
    assert done.returncode == 1 and "--handler-name Alpaca is not one of: none, auto" in done.stderr
    assert "Traceback" not in done.stderr
