"""From the flags of a run to its data sets, as the engine asks for them."""

from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from helpers.datasets import numbered_dataset, numbered_rows

from megatron_mixtral.training import micro_batch

FLAGS = {"data_path": None, "train_data_path": None, "valid_data_path": None, "test_data_path": None,
         "is_instruction_dataset": False, "seq_length": 8, "seed": 3, "split": "6,3,1", "data_cache_path": None,
         "reset_position_ids": False, "reset_attention_mask": False, "eod_mask_loss": False, "mmap_bin_files": True,
         "num_dataset_builder_threads": 1, "calculate_per_token_loss": False, "context_parallel_size": 1}


def documents_read(monkeypatch: pytest.MonkeyPatch, **flags: Any) -> list[set[int]]:
    """The numbers of the documents that each of the three sets reads."""
    tokenizer = SimpleNamespace(vocab_size=96, eod=2, unique_identifiers={})
    monkeypatch.setattr(micro_batch, "get_tokenizer", lambda: tokenizer)
    monkeypatch.setattr(micro_batch, "is_first_or_last_pipeline_stage", lambda vp_stage: True)
    sets = micro_batch.datasets(Namespace(**(FLAGS | flags)), (30, 20, 10))
    return [{int(token) for index in range(len(one)) for token in np.unique(one[index]["tokens"])} - {0, 1}
            for one in sets]


@pytest.mark.parametrize("instruction", [False, True], ids=["text", "instruction"])
def test_each_flag_is_the_set_of_its_split(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, instruction: bool) -> None:
    write = numbered_rows if instruction else numbered_dataset
    train, valid, test = ([write(tmp_path / f"set{first}", first, 5)] for first in (10, 20, 30))
    read = documents_read(monkeypatch, train_data_path=train, valid_data_path=valid, test_data_path=test,
                          is_instruction_dataset=instruction)
    assert read == [set(range(10, 15)), set(range(20, 25)), set(range(30, 35))]


@pytest.mark.parametrize("instruction", [False, True], ids=["text", "instruction"])
def test_one_set_is_split_as_the_flag_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, instruction: bool) -> None:
    write = numbered_rows if instruction else numbered_dataset
    read = documents_read(monkeypatch, data_path=[write(tmp_path / "set", 10, 20)], is_instruction_dataset=instruction)
    assert [len(one) for one in read] == [12, 6, 2] and set.union(*read) == set(range(10, 30))
