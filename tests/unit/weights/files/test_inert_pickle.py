"""Files made to hurt: what a pickle or an archive may not do to the process that reads it."""

import argparse
import pickle
import tracemalloc
import zipfile

import pytest

from megatron_mixtral.errors import CheckpointError
from megatron_mixtral.weights.files import load_torch
from megatron_mixtral.weights.files.inert_pickle import PLAIN, UNPICKLING_ERRORS, unpickle
from megatron_mixtral.weights.files.mapped import MappedFile


@pytest.mark.parametrize(("module", "name"), [*PLAIN, ("torch.serialization", "_get_layout")])
@pytest.mark.parametrize("state", [{"planted": 1}, (None, {"planted": 1})])
def test_a_pickle_changes_nothing_that_the_next_one_sees(module, name, state):
    """BUILD with a class, not an object of it, sets attributes of the class."""
    data = b"\x80\x02c" + f"{module}\n{name}\n".encode() + pickle.dumps(state, 2)[2:-1] + b"b."
    with pytest.raises(UNPICKLING_ERRORS):
        unpickle(data, "planted.pt")
    assert not hasattr(argparse.Namespace, "planted") and not hasattr(argparse.Namespace(), "planted")


def test_arguments_are_read_as_before():
    args = argparse.Namespace(a=1, b=[argparse.Namespace(c=2)])
    found = unpickle(pickle.dumps(args), "whole.pt")
    assert isinstance(found, argparse.Namespace) and found == args and found.b[0].c == 2


def test_a_byte_order_of_a_gigabyte_is_not_read(tmp_path):
    path = tmp_path / "large.pt"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(zipfile.ZipInfo("archive/data.pkl"), pickle.dumps({}, 2))
        archive.writestr("archive/byteorder", bytes(1 << 24))
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError, match=r"large\.pt.*byteorder"):
            load_torch(MappedFile(path), str(path))
        assert tracemalloc.get_traced_memory()[1] < 1 << 22
    finally:
        tracemalloc.stop()
