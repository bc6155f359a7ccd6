"""Data: from text files to the token datasets that the engine reads.

`tokenizer` (text to ids), `readers` (files to records), `encoding` (documents to arrays), `indexed` (arrays to
`.bin/.idx`), `workers` (processes) and `preprocess` (the command) need neither torch nor transformers, so that the
tool starts at once. `pretrain` (the datasets of a training run) needs the engine. Importing this package imports none
of them.
"""
