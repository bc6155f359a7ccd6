"""Compare the native engine with the published tokenizer, in a process with a given build of the extension.

    python tests/helpers/native_fuzz.py EXTENSION TOKENIZER COUNT

For builds with sanitizers (`native_build.run_sanitized`). Exit status 0: no difference.
"""

import sys
import threading
from pathlib import Path

from helpers.documents import first_difference, random_texts, real_documents
from helpers.native_build import use_extension
from megatron_mixtral.tokenizer.engines import native
from megatron_mixtral.tokenizer.engines.base import SpecialTokens
from megatron_mixtral.tokenizer.tokenizer import NASTY_STRINGS, open_tokenizer


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


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
