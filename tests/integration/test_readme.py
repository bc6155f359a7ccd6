"""The commands of the README and of docs/quickstart.md, as written, on a tiny model in an empty directory."""

import json
import os
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
BLOCK = re.compile(r"(?:<!--\s*(.*?)\s*-->\n)?```bash\n(.*?)```", re.DOTALL)
SETTINGS = {  # in place of the README's block of settings, under the same names
    "DATA_ROOT_DIR": "raw", "ENCODED_DATA_ROOT_DIR": "tokens", "MIXTRAL_HUGGINGFACE_PATH": "hf",
    "MIXTRAL_MEGATRON_PATH": "megatron", "TP": "2", "PP": "2",
}  # fmt: skip
SMALL = {"MODEL": "tiny", "TRAIN_ITERS": "2", "GLOBAL_BATCH_SIZE": "2", "SEQ_LENGTH": "64"}


def blocks(document: str) -> list[tuple[str, str]]:
    """(the comment before it, the text) of every bash block."""
    found = BLOCK.findall((ROOT / document).read_text(encoding="utf-8"))
    assert len(found) == (ROOT / document).read_text(encoding="utf-8").count("```bash")
    return found


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """A directory with the repository's folders, a corpus of two folders, and a Hugging Face Mixtral."""
    folder = tmp_path_factory.mktemp("readme")
    for name in ("examples", "tools", "tests"):
        (folder / name).symlink_to(ROOT / name)
    for name in ("common_crawl", "github"):
        (folder / "raw" / name).mkdir(parents=True)
        for part in range(2):
            lines = [json.dumps({"text": f"Document {number} of {name}: " + "some words of it, " * 30})
                     for number in range(10 * part, 10 * part + 10)]
            (folder / "raw" / name / f"{part}.jsonl").write_text("\n".join(lines) + "\n")
    bash("python examples/quickstart/model.py --output-dir hf", folder, {})
    return folder


def bash(code: str, folder: Path, variables: dict[str, str]) -> str:
    environment = {**os.environ, "MIXTRAL_VENV": "active", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **variables}
    done = subprocess.run(["bash", "-euo", "pipefail", "-c", code], cwd=folder, env=environment, text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=300)
    assert done.returncode == 0, f"{code}\n{done.stdout[-6000:]}"
    return done.stdout


def run_document(document: str, folder: Path, variables: dict[str, str]) -> list[str]:
    """Run every block that no comment takes out; the reason has to be given."""
    outputs = []
    for comment, code in blocks(document):
        if comment.startswith("settings:"):
            assert re.findall(r"^export (\w+)=", code, re.MULTILINE) == list(SETTINGS)
        elif comment:
            assert re.match(r"not run by \S+test_readme\.py: .{10,}", comment), comment
        else:
            outputs.append(bash(code, folder, variables))
    return outputs


def test_readme(world):
    outputs = run_document("README.md", world, SETTINGS | SMALL)
    assert len(outputs) >= 6
    figures = [json.loads(line) for line in (world / "ckpt/trained/metrics.jsonl").read_text().splitlines()]
    assert [step["iteration"] for step in figures] == [1, 2]
    exported = world / "model_from_hf" / "trained" / "mg2hg"
    assert (exported / "model.safetensors").is_file() and (exported / "config.json").is_file()


def test_quickstart_document(world):
    assert run_document("docs/quickstart.md", world, {})


def test_both_languages_give_the_same_commands():
    assert [code for _, code in blocks("README.md")] == [code for _, code in blocks("README_zh.md")]


def test_links_lead_somewhere():
    wrong = []
    for document in [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]:
        for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", document.read_text(encoding="utf-8")):
            if "://" not in target and not (document.parent / target).exists():
                wrong.append(f"{document.name}: {target}")
    assert not wrong, wrong
