#!/usr/bin/env python3
"""What Megatron-LM's preprocessing tool does, in its least form: `benchmarks/preprocess.py` times it.

    python benchmarks/naive_pool.py CORPUS.jsonl PREFIX tokenizer.json WORKERS

A pool of processes, json.loads and the tokenizer for each line, lists of ids by pickle, the engine's builder for each
document.
"""

import json
import multiprocessing
import sys

EOS = 2


def start(tokenizer_path: str) -> None:
    """Once in every process."""
    import tokenizers

    global tokenizer
    tokenizer = tokenizers.Tokenizer.from_file(tokenizer_path)
    tokenizer.encode_special_tokens = True  # `</s>` in a document is text, so that all outputs are the same


def encode(line: str) -> tuple[list[int], list[int], int]:
    """The ids of a line, the length of each sequence, the characters read."""
    ids = tokenizer.encode(json.loads(line)["text"], add_special_tokens=False).ids
    ids.append(EOS)
    return ids, [len(ids)], len(line)


def main(source: str, prefix: str, tokenizer_path: str, workers: str) -> None:
    """One corpus."""
    import torch
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=DType.optimal_dtype(32000))
    with open(source, encoding="utf-8") as lines, \
            multiprocessing.Pool(int(workers), initializer=start, initargs=(tokenizer_path,)) as pool:
        for ids, lengths, _ in pool.imap(encode, lines, 32):
            builder.add_document(torch.IntTensor(ids), lengths)
    builder.finalize(f"{prefix}.idx")


if __name__ == "__main__":
    main(*sys.argv[1:])
