"""Files made to hurt: what a pickle or an archive may not do to the process that reads it."""

import argparse
import pickle
import random
import tracemalloc
import zipfile

import pytest
import torch

from megatron_mixtral.errors import CheckpointError
from megatron_mixtral.weights.files import inert_pickle, load_torch
from megatron_mixtral.weights.files.inert_pickle import PLAIN, UNPICKLING_ERRORS, scan, unpickle
from megatron_mixtral.weights.files.mapped import MappedFile
from megatron_mixtral.weights.formats.legacy_names import today


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


DEEP = b")" + b"\x85" * 200_000  # a tuple in a tuple in ...
BOMBS = {
    "a place far out in the memo": b"\x80\x02Nr\xff\xff\xff\x0f.", "the same in digits": b"Np268435455\n.",
    "an array of a terabyte": b"\x80\x05\x96" + (1 << 40).to_bytes(8, "little") + b".",
    "a deep key": b"\x80\x02}" + DEEP + b"Ns.", "a deep key under a name": b"\x80\x02}" + DEEP + b"q\x000h\x00Ns.",
    "a deep key of a list": b"\x80\x02}ctorch\nSize\n]" + DEEP + b"a\x85RNs.",
    "deep lists": b"\x80\x02" + b"]" * 20_000 + b"a" * 19_999 + b".",
    "empty lists without end": b"\x80\x02(" + b"]" * 3000 + b"t.", "a value of another": b"\x80\x02N2.",
}


@pytest.mark.parametrize("bomb", BOMBS.values(), ids=BOMBS)
def test_a_small_pickle_takes_no_memory_and_ends_no_process(bomb, monkeypatch):
    monkeypatch.setattr(inert_pickle, "MOST_STEPS", 2000 if bomb == BOMBS["empty lists without end"] else 10**6)
    tracemalloc.start()
    try:
        with pytest.raises(UNPICKLING_ERRORS):
            unpickle(bomb, "bomb.pt")
        assert tracemalloc.get_traced_memory()[1] < 1 << 22
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_every_kind_of_value_is_scanned_to_its_end(protocol):
    shared = [1, -2**70, 2.5, "\n\xe9", None, True]
    nested = shared
    for _ in range(90):
        nested = [nested]
    value = {"a": shared, "b": (shared, (), (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4)), "c": {"x" * 300: argparse.Namespace(
        d=shared)}, "e": set("ab"), "f": [str(number) for number in range(3000)], "g": nested}
    for older in range(2):
        assert scan(data := pickle.dumps(value, older)) == len(data)
    data = pickle.dumps(value, protocol)
    assert scan(b"..." + data + b"...", 3) == 3 + len(data)
    assert unpickle(data, "whole.pt") == value
    for end in (1, len(data) // 2, len(data) - 1):
        with pytest.raises(EOFError):
            scan(data[:end])


def test_a_dictionary_that_holds_itself_is_refused():
    group: dict = {}
    group["model"] = group
    with pytest.raises(CheckpointError, match="holds itself"):
        today(unpickle(pickle.dumps(group), "cycle.pt"), 1, 3.0, "cycle.pt")


def test_damage_to_a_file_of_the_older_form_is_refused(tmp_path):
    """It has no checksums: what is not a weight is refused, or changes nothing."""
    tensors = {"a": torch.arange(12.0).view(3, 4), "b": torch.ones(5, dtype=torch.bfloat16)}
    path, draw = tmp_path / "old.bin", random.Random(3)
    torch.save(tensors, path, _use_new_zipfile_serialization=False)
    whole, refused = path.read_bytes(), 0
    values = {name: bytes(tensor.view(torch.uint8).numpy()) for name, tensor in tensors.items()}
    weights = {whole.index(value) + at for value in values.values() for at in range(len(value))}
    damaged = [whole[:end] for end in range(0, len(whole), 17)] + [whole + b"x"]
    for at in draw.sample(sorted(set(range(len(whole))) - weights), 150):
        damaged.append(whole[:at] + bytes([whole[at] ^ 1 << draw.randrange(8)]) + whole[at + 1:])
    for contents in damaged:
        path.write_bytes(contents)
        try:
            found = load_torch(MappedFile(path), str(path))
            shapes = {name: one.shape for name, one in found.items()}
            # Another name or shape is refused where it is compared with the model's.
            assert shapes != {name: tensor.shape for name, tensor in tensors.items()} or values == {
                name: one.data.tobytes() for name, one in found.items()}
        except CheckpointError as error:
            refused += 1
            assert str(path) in str(error)
    assert refused > 100
    torch.save({"a": tensors["a"].t()}, path, _use_new_zipfile_serialization=False)
    with pytest.raises(CheckpointError, match="not all of its storage.*save the model again"):
        load_torch(MappedFile(path), str(path))
