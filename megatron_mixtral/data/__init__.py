"""Data: from text files to the token datasets that the engine reads.

`tokenizer` (text to ids), `readers` (files to records), `encoding` (documents to arrays), `indexed` (arrays to
`.bin/.idx`), `workers` (processes) and `preprocess` (the command) need neither torch nor transformers, so that the
tool starts at once. So do those of instruction data: `instruction_records` (files to records), `instruction_formats`
(records to turns), `chat` (turns to ids and mask), `packing`, `instruction` (the command). `pretrain` and `sft` (the
datasets of a training run) need the engine. Importing this package imports none of them.
"""
