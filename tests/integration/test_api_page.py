"""The Python of docs/api.md, as written, in one plain process in an empty directory, on a tiny model."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
BLOCK = re.compile(r"(<!-- settings: .*? -->\n)?```python\n(.*?)```", re.DOTALL)
SETTINGS = {"MODEL": "hf", "CORPUS": "raw"}  # in place of the page's, under the same names
AFTERWARDS = """torch.save({"ids": ids, "logits": logits, "report": report, "config": config,
                            "completion": completion}, "found.pt")
"""


def page() -> str:
    """The page as one program."""
    text = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    found = BLOCK.findall(text)
    assert len(found) == text.count("```python") and len(found) >= 6
    (_, settings), *blocks = found
    assert found[0][0] and not any(comment for comment, _ in found[1:])
    assert re.findall(r"^(\w+) = ", settings, re.MULTILINE) == list(SETTINGS)
    return "\n".join([*(f"{name} = {value!r}" for name, value in SETTINGS.items()), *(code for _, code in blocks)])


def test_the_page_runs_from_top_to_bottom(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")} | {
        "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}

    def python(*words: str) -> str:
        done = subprocess.run([sys.executable, *words], cwd=tmp_path, env=environment, text=True, timeout=300,
                              stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        assert done.returncode == 0, done.stdout[-6000:]
        return done.stdout

    python(str(ROOT / "examples" / "quickstart" / "model.py"), "--output-dir", "hf")
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw" / "0.jsonl").write_text("".join(json.dumps({"text": f"Document {n}."}) + "\n" for n in range(9)))
    (tmp_path / "page.py").write_text(page() + AFTERWARDS)
    said = python("page.py")
    assert "-> Mixture of experts" in said and "9 documents" in said
    assert {path.name for path in (tmp_path / "tokens").glob("corpus_text_document.*")} == {
        "corpus_text_document.bin", "corpus_text_document.idx"}

    from transformers import MixtralForCausalLM

    found = torch.load(tmp_path / "found.pt", weights_only=False)
    for folder in ("hf", "back"):  # what the page read, and what it converted three times
        model = MixtralForCausalLM.from_pretrained(tmp_path / folder, dtype=torch.float32,
                                                   attn_implementation="eager").eval()
        with torch.no_grad():
            expected = model(torch.tensor([found["ids"]])).logits
        assert (found["logits"] - expected).abs().max() < 1e-5
        prompt = torch.tensor([found["completion"].prompt_ids])
        continued = model.generate(prompt, max_new_tokens=4, do_sample=False)[0, prompt.shape[1]:].tolist()
        assert list(found["completion"].token_ids) == continued
