"""Compare the native engine with the published tokenizer, in a process with a given build of the extension.

    python tests/helpers/native_fuzz.py EXTENSION TOKENIZER COUNT

For builds with sanitizers, which must be loaded before Python: `run_sanitized` does that. Exit status 0: no difference.
"""

import os
import subprocess
import sys
import threading
from pathlib import Path

from helpers.documents import first_difference, random_texts, real_documents
from helpers.native_build import use_extension
from megatron_mixtral.data.engines import native
from megatron_mixtral.data.engines.base import SpecialTokens
from megatron_mixtral.data.tokenizer import NASTY_STRINGS, open_tokenizer

TESTS = Path(__file__).resolve().parents[1]


def main(extension: str, tokenizer_path: str, count: str) -> int:
    use_extension(Path(extension))
    tokenizer = open_tokenizer(Path(tokenizer_path))
    engine = native.NativeEngine(tokenizer)
    texts = [*NASTY_STRINGS, *real_documents(int(count) // 50, 5000), *random_texts(int(count), tokenizer, seed=5)]
    texts += [character * 200_000 for character in "a =\u4e2d\n\0\U0001f600"]
    difference = first_difference(engine, tokenizer, texts)
    for text in texts:  # alone and framed, so that the buffer has no room to spare
        engine.encode([text], SpecialTokens(1, 2))
    # Threads that share an engine.
    threads = [threading.Thread(target=engine.encode, args=(texts, SpecialTokens(1, 2))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    sys.stdout.write(f"{len(texts)} texts, first difference: {difference}\n")
    return int(difference is not None)


def run_sanitized(extension: Path, tokenizer_path: Path, count: int) -> subprocess.CompletedProcess[str]:
    """Run this file with the runtime of the address sanitizer in front of everything else.

    Python itself never frees some memory at its end, so leaks are not looked for. Its own allocator would hide what is
    written behind the end of a small buffer, so that of the system is used.
    """
    runtime = subprocess.run(["c++", "-print-file-name=libasan.so"], capture_output=True, text=True, check=True)
    environ = dict(
        os.environ,
        LD_PRELOAD=runtime.stdout.strip(),
        ASAN_OPTIONS="detect_leaks=0",
        PYTHONMALLOC="malloc",
        PYTHONPATH=os.pathsep.join([str(TESTS), str(TESTS.parent)]),
    )
    command = [sys.executable, __file__, str(extension), str(tokenizer_path), str(count)]
    return subprocess.run(command, env=environ, capture_output=True, text=True, timeout=900)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
