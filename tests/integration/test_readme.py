"""The commands of the README and of every page in docs/, as written, on small models in one directory.

Programs that would train for long are dry-run: the scripts by DRY_RUN, the training program by --dry-run.
"""

import gzip
import json
import os
import re
import shutil
import subprocess
from importlib.resources import files
from pathlib import Path

import pytest
import torch
from helpers.events import HANG
from helpers.models import random_hf_directory

from megatron_mixtral.config import MixtralConfig

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "megatron_mixtral"
BLOCK = re.compile(r"(?:<!--\s*(.*?)\s*-->\n)?```bash\n(.*?)```", re.DOTALL)
PAGES = sorted(path.relative_to(ROOT).as_posix() for path in [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")]
               if "```bash" in path.read_text(encoding="utf-8") and path.name != "README_zh.md")
SETTINGS = {  # in place of the README's block of settings, under the same names
    "DATA_ROOT_DIR": "raw", "ENCODED_DATA_ROOT_DIR": "tokens", "MIXTRAL_HUGGINGFACE_PATH": "hf",
    "MIXTRAL_MEGATRON_PATH": "megatron", "TP": "2", "PP": "2",
}  # fmt: skip
VARIABLES = {  # what a page's commands are run with, besides the settings
    "README.md": {"GPUS_PER_NODE": "4", "SEQ_LENGTH": "64", "GLOBAL_BATCH_SIZE": "2", "TRAIN_ITERS": "2",
                  "LR_WARMUP_ITERS": "1"},  # the five of a laptop, and no others
    "docs/data.md": {"ENCODED_DATA_ROOT_DIR": "encoded"},
    "docs/instruction_data.md": {"DRY_RUN": "1"},
}
# In place of the commands of these names: ranks are not started, and the training program is only asked.
DRY = """
python() {
    if [[ "$1" == tools/pretrain_mixtral.py ]]; then set -- "$@" --dry-run; fi
    command python "$@"
}
torchrun() {
    local world=1
    while [[ "$1" == --* ]]; do if [[ "$1" == --nproc-per-node ]]; then world="$2"; fi; shift 2; done
    WORLD_SIZE="$world" python "$@"
}
"""


def blocks(document: str) -> list[tuple[str, str]]:
    """(the comment before it, the text) of every bash block."""
    text = (ROOT / document).read_text(encoding="utf-8")
    found = BLOCK.findall(text)
    assert len(found) == text.count("```bash")
    return found


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """A directory with the repository's folders and everything that the pages' commands read."""
    folder = tmp_path_factory.mktemp("readme")
    for name in ("examples", "tools", "tests", "benchmarks", "docs"):
        (folder / name).symlink_to(ROOT / name)
    for name in ("raw/common_crawl", "raw/github", "more", "dataset", "RUN_DIR", "ANOTHER_RUN_DIR"):
        (folder / name).mkdir(parents=True)
    documents = [{"text": f"Document {number}: " + "some words of it, " * 900, "title": f"No. {number}"}
                 for number in range(600)]
    for number, place in enumerate(("raw/common_crawl/0.jsonl", "raw/common_crawl/1.jsonl", "raw/github/0.jsonl",
                                    "corpus.jsonl", "more/0.jsonl", "more/1.jsonl")):
        some = documents[100 * number:300 + 100 * number]
        write_lines(folder / place, documents if place == "corpus.jsonl" else some)
    with gzip.open(folder / "first.jsonl.gz", "wt") as packed:
        packed.write("".join(json.dumps(one) + "\n" for one in documents[:10]))
    write_lines(folder / "dataset/Alpaca_data_gpt4_zh.jsonl",
                [{"instruction": f"Count to {n}.", "input": "", "output": "One. " * n} for n in range(1, 9)])
    turn = {"input": "Who are you?", "output": "A small model."}
    (folder / "chats.json").write_text(json.dumps([{"conversation": [turn]}] * 20))
    for run in ("RUN_DIR", "ANOTHER_RUN_DIR"):
        write_lines(folder / run / "metrics.jsonl", [
            {"iteration": step, "lm_loss": 10.0, "aux_loss": 1.0, "grad_norm": 0.5, "step_seconds": 1.0,
             "tokens_per_second_per_device": 100.0, "memory_bytes": 2**30, "expert_imbalance": 1.5,
             "expert_imbalance_worst": 2.0} for step in range(1, 411)])
    downloads(folder)
    return folder


def downloads(folder: Path) -> None:
    """Models in the places of published ones, with as many layers, experts and query groups as layouts of 8 need."""
    sizes = {"vocab_size": 32000, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 8, "head_dim": 2,
             "num_attention_heads": 8, "num_key_value_heads": 8, "num_local_experts": 8}
    mixtral = random_hf_directory(folder / "model_from_hf/Mixtral-8x7B", MixtralConfig(**sizes), torch.bfloat16)
    shutil.copyfile(str(files("mistral_common") / "data" / "tokenizer.model.v1"), mixtral / "tokenizer.model")
    write_lines(folder / "expert_load.jsonl", [{"iteration": 1, "expert_load": [list(range(8))] * 8}])
    bash(f"python {ROOT}/examples/quickstart/model.py --output-dir hf", folder, {})
    bash("""python - <<'END'
from transformers import MistralConfig, MistralForCausalLM
small = MistralConfig(vocab_size=320, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
                      num_key_value_heads=2)
MistralForCausalLM(small).save_pretrained("model_from_hf/Mistral-7B")
END""", folder, {})


def write_lines(path: Path, records: list[dict]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def bash(code: str, folder: Path, variables: dict[str, str]) -> str:
    environment = {**os.environ, "MIXTRAL_VENV": "active", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **variables}
    done = subprocess.run(["bash", "-euo", "pipefail", "-c", code], cwd=folder, env=environment, text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=HANG)
    assert done.returncode == 0, f"{code}\n{done.stdout[-6000:]}"
    return done.stdout


@pytest.mark.parametrize("document", PAGES)
def test_the_commands_of_a_page(document, world):
    """Every block is run that no comment takes out; the reason has to be given."""
    variables, outputs = SETTINGS | VARIABLES.get(document, {}), []
    for comment, code in blocks(document):
        if comment.startswith("settings:"):
            assert re.findall(r"^export (\w+)=", code, re.MULTILINE) == list(SETTINGS)
        elif comment.startswith("settings of a laptop:"):
            assert re.findall(r"^export (\w+)=", code, re.MULTILINE) == list(VARIABLES[document])
        elif comment:
            assert re.match(r"not run by \S+test_readme\.py: .{10,}", comment), comment
        else:
            outputs.append(bash(DRY + code, world, variables))
    if document == "README.md":
        assert len(outputs) >= 6
        steps = [json.loads(line) for line in (world / "ckpt/trained/metrics.jsonl").read_text().splitlines()]
        assert [step["iteration"] for step in steps] == [1, 2]
        exported = world / "model_from_hf" / "trained" / "mg2hg"
        assert (exported / "model.safetensors").is_file() and (exported / "config.json").is_file()
        card = (exported / "README.md").read_text()
        assert "| steps | 2 |" in card and "data set common_crawl_text_document" in card and "tensor parallel 2" in card
        assert json.loads((exported / "generation_config.json").read_text())["eos_token_id"] == 2


def test_both_languages_give_the_same_commands():
    assert [code for _, code in blocks("README.md")] == [code for _, code in blocks("README_zh.md")]


def test_links_lead_somewhere():
    wrong = []
    for document in [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]:
        for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", document.read_text(encoding="utf-8")):
            if "://" not in target and not (document.parent / target).exists():
                wrong.append(f"{document.name}: {target}")
    assert not wrong, wrong


def test_paths_that_are_named_exist():
    """`weights/rules.py` in a document is a file of the package, or of the repository."""
    wrong = []
    for document in [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]:
        if document.name == "CHANGELOG.md":
            continue  # it tells of what was, too
        for path in re.findall(r"`([\w./]+/[\w.]+\.(?:py|sh|cpp|h|txt|lock))(?:::\w+)?`", document.read_text("utf-8")):
            if not (ROOT / path).exists() and not (PACKAGE / path).exists():
                wrong.append(f"{document.name}: {path}")
    assert not wrong, wrong
