"""Engines of encoding: programs that give the same ids. The fastest one is chosen, and proved, at the start of a run.

`base.py` says what an engine is, `choose.py` picks one; `native.py` (our C++ extension, tables by `bpe_tables.py`),
`gigatoken_engine.py` and `reference.py` are the engines. `tokenizer/encode.py` is the only caller.
"""
