"""Instruction preprocessing: the files, their labels, packs as documents, and an account of every record."""

import gzip
import itertools
import json
from pathlib import Path

import numpy as np
import pytest

from megatron_mixtral.data.cli import parse_flags
from megatron_mixtral.data.corpus.files import list_inputs
from megatron_mixtral.data.corpus.objects import read_array
from megatron_mixtral.data.datasets import InstructionFiles, check_instruction, instruction_blend
from megatron_mixtral.data.indexed import inspect
from megatron_mixtral.data.instruction import InstructionOptions
from megatron_mixtral.data.instruction.run import COLUMNS, column_prefix, preprocess_instructions
from megatron_mixtral.errors import ConfigError, DataError
from megatron_mixtral.tokenizer import chat, mixtral_tokenizer_path, open_tokenizer

TOKENIZER = open_tokenizer(mixtral_tokenizer_path())
RECORDS = [{"instruction": f"Count to {n}.", "input": "" if n % 3 else "slowly",
            "output": " ".join(map(str, range(1, n + 1)))} for n in range(1, 41)]


def write(path: Path, records: list, as_array: bool = False) -> str:
    lines = [json.dumps(record, ensure_ascii=False) for record in records]
    path.write_text("[" + ",\n ".join(lines) + "]\n" if as_array else "\n".join(lines) + "\n", encoding="utf-8")
    return str(path)


def options(tmp_path: Path, source: str, **given) -> InstructionOptions:
    return InstructionOptions(**{"inputs": (source,), "output_prefix": str(tmp_path / "out"), "handler": "auto",
                      "tokenizer_path": str(mixtral_tokenizer_path()), "tokenizer_type": "Llama2Tokenizer", **given})


def rows_of(prefix: Path | str) -> list[list[tuple[list[int], list[int]]]]:
    files = InstructionFiles(str(prefix))
    return [[(ids.tolist(), labels.tolist()) for ids, labels in files.row(number)] for number in range(len(files))]


@pytest.fixture(scope="module")
def samples() -> list[tuple[list[int], list[int]]]:
    """(ids, labels) of RECORDS in the Mixtral template."""
    found = []
    for record in RECORDS:
        question = record["instruction"] + ("\n" + record["input"] if record["input"] else "")
        ids, trained = chat.render([chat.Turn(question, record["output"])], chat.TEMPLATES["mixtral"], TOKENIZER)
        found.append((ids.tolist(), np.where(trained, ids, -100).tolist()))
    return found


def test_three_datasets_one_sample_a_document(tmp_path, samples):
    report = preprocess_instructions(options(tmp_path, write(tmp_path / "a.jsonl", RECORDS)))
    assert rows_of(tmp_path / "out") == [[sample] for sample in samples]
    mask = np.fromfile(column_prefix(str(tmp_path / "out"), "attention_mask") + ".bin", dtype=np.int32)
    assert mask.size == report["tokens"] == sum(len(ids) for ids, _ in samples) and (mask == 1).all()
    assert report["trained_tokens"] == sum(label != -100 for _, labels in samples for label in labels)
    assert report["formats"] == {"alpaca": 40} and report["records"] == report["samples"] == report["rows"] == 40
    assert json.loads((tmp_path / "reports" / "out.report.json").read_text()) == report
    assert [inspect(column_prefix(str(tmp_path / "out"), column)).problems for column in COLUMNS] == [[], [], []]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        ["a.jsonl", "reports", *(Path(column_prefix("out", c)).name + end for c in COLUMNS
                                         for end in (".bin", ".idx"))])


def test_packs_are_documents_as_the_engine_writes_them(tmp_path, samples):
    import torch
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    source = write(tmp_path / "a.jsonl", RECORDS)
    report = preprocess_instructions(options(tmp_path, source, seq_length=200, pack=True))
    rows = rows_of(tmp_path / "out")
    assert len(rows) == report["rows"] < 20 and report["filled"] > 0.9
    assert all(sum(len(ids) - 1 for ids, _ in row) <= 200 for row in rows)
    assert sorted(sample for row in rows for sample in row) == sorted(samples), "whole samples, each once"
    builder = IndexedDatasetBuilder(str(tmp_path / "engine.bin"), dtype=np.int32)
    for row in rows:
        builder.add_document(torch.tensor([id for ids, _ in row for id in ids]), [len(ids) for ids, _ in row])
    builder.finalize(str(tmp_path / "engine.idx"))
    for end in (".bin", ".idx"):
        ours = Path(column_prefix(str(tmp_path / "out"), "input_ids") + end)
        assert ours.read_bytes() == (tmp_path / f"engine{end}").read_bytes()


def test_longer_samples_are_left_out_and_counted(tmp_path, samples, caplog):
    most = 60
    report = preprocess_instructions(options(tmp_path, write(tmp_path / "a.jsonl", RECORDS), seq_length=most))
    long = [len(ids) for ids, _ in samples if len(ids) - 1 > most]
    assert long and (report["too_long"], report["too_long_tokens"]) == (len(long), sum(long))
    assert rows_of(tmp_path / "out") == [[sample] for sample in samples if len(sample[0]) - 1 <= most]
    assert f"left out: {len(long)} samples of {sum(long)} tokens longer than --seq-length + 1" in caplog.text


def test_a_sample_that_just_fits_is_kept(tmp_path, samples):
    """n ids are n - 1 positions: n - 1 = --seq-length fits, one id more does not."""
    sizes = sorted({len(ids) for ids, _ in samples})
    assert any(low + 1 == high for low, high in itertools.pairwise(sizes))
    for most in (size - 1 for size in sizes[3:20]):
        preprocess_instructions(options(tmp_path, write(tmp_path / "a.jsonl", RECORDS), seq_length=most))
        assert rows_of(tmp_path / "out") == [[sample] for sample in samples if len(sample[0]) <= most + 1]


def test_modellinks_handler_masks_the_prompt_exactly(tmp_path):
    """Its text, with the mask at the boundary of the encoded pieces instead of the length of another encoding."""
    given = parse_flags(["--input", write(tmp_path / "a.jsonl", RECORDS), "--output-prefix", str(tmp_path / "out"),
                         "--tokenizer-type", "Llama2Tokenizer", "--tokenizer-model", str(mixtral_tokenizer_path()),
                         "--append-eod", "--handler-name", "GeneralInstructionHandler"], {})
    preprocess_instructions(given)
    for [(ids, labels)], record in zip(rows_of(tmp_path / "out"), RECORDS, strict=True):
        assert [label for label in labels if label != -100] == [*TOKENIZER.encode(record["output"] + "\n"), 2]
        assert TOKENIZER.decode(ids).endswith(
            f"step by step.\n### Instruction:\n{record['instruction']}\n{record['input']}\n### Response:\n"
            f" {record['output']}\n")
        assert ids[0] == 1 and ids.count(1) == ids.count(2) == 1


def test_append_eod_ends_every_sample_once(tmp_path):
    source = write(tmp_path / "a.jsonl", [{"text": "plain"}, {"instruction": "x", "output": "y"}])
    for kind in ("mixtral", "chatml"):
        preprocess_instructions(options(tmp_path, source, append_eod=True, prompt_type=kind))
        for [(ids, labels)] in rows_of(tmp_path / "out"):
            assert ids[-1] == labels[-1] == 2 and ids.count(2) == 1


def test_an_eod_after_an_untrained_answer_is_not_trained(tmp_path):
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"},
                {"role": "user", "content": "c"}, {"role": "assistant", "content": "d", "weight": 0}]
    source = write(tmp_path / "a.jsonl", [{"messages": messages}])
    for kind in ("mixtral", "chatml"):
        preprocess_instructions(options(tmp_path, source, append_eod=True, prompt_type=kind))
        [[(ids, labels)]] = rows_of(tmp_path / "out")
        assert (ids[-1], labels[-1]) == (2, chat.IGNORED) and set(labels) != {chat.IGNORED}


def test_every_record_is_accounted_for(tmp_path, caplog):
    lines = [json.dumps(RECORDS[0]), "", "not json", '{"instruction": "x"}', "[1]", '{"a": 1}', json.dumps(
        {"messages": [{"role": "user", "content": "a"}]}), json.dumps({"text": "plain"}), '{"text": "\\ud800"}']
    path = tmp_path / "bad.jsonl"
    path.write_text("\n".join(lines) + "\n")
    with pytest.raises(DataError, match=r"bad\.jsonl:3: bad_json: .*--on-error skip"):
        preprocess_instructions(options(tmp_path, str(path)))
    assert [one.name for one in tmp_path.iterdir()] == ["bad.jsonl"], "nothing half-written"
    report = preprocess_instructions(options(tmp_path, str(path), on_error="skip"))
    assert report["skipped"] == {"bad_json": 1, "lone_surrogate": 1, "no_answer": 1, "not_an_object": 1,
                                 "unknown_form": 2}
    assert (report["lines"], report["blank_lines"], report["records"], report["samples"]) == (9, 1, 8, 2)
    assert [one["where"].rpartition(":")[2] for one in report["skipped_records"]] == ["3", "4", "5", "6", "7", "9"]
    assert "--handler-name auto read the records by their content as: 1 of alpaca, 1 of pretrain" in caplog.text


def test_a_json_array_gives_the_same_samples(tmp_path, samples, monkeypatch):
    monkeypatch.setattr("megatron_mixtral.data.corpus.readers.BLOCK", 7)  # every record is cut by the blocks
    source = write(tmp_path / "a.json", RECORDS, as_array=True)
    assert preprocess_instructions(options(tmp_path, source))["samples"] == 40
    assert rows_of(tmp_path / "out") == [[sample] for sample in samples]


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.json.gz", "a.jsonl.zst", "a.json.zst", "a.parquet"])
def test_packed_files_and_parquet_give_the_same_samples(name, tmp_path, samples):
    import pyarrow
    import pyarrow.parquet
    import zstandard

    path = tmp_path / name
    plain = Path(write(tmp_path / "plain", RECORDS, as_array=".json." in name)).read_bytes()
    if name.endswith(".parquet"):
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(RECORDS), path)
    else:
        path.write_bytes(gzip.compress(plain) if name.endswith(".gz") else zstandard.compress(plain))
    preprocess_instructions(options(tmp_path, str(path)))
    assert rows_of(tmp_path / "out") == [[sample] for sample in samples]


def test_places_of_lines_are_those_of_the_file_whatever_the_chunks(tmp_path):
    lines = [json.dumps(record) for record in RECORDS * 60]
    lines[2000] = "broken"
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(lines))
    with pytest.raises(DataError, match=r"a\.jsonl:2001: bad_json"):
        preprocess_instructions(options(tmp_path, str(path), chunk_bytes=5000))
    assert [one.name for one in tmp_path.iterdir()] == ["a.jsonl"]


@pytest.mark.parametrize(("text", "elements"), [
    ("[]", []), (" [ ] \n", []), ('[{"a": "]"}]', [{"a": "]"}]), ('\ufeff[{}\n,\n{}]', [{}, {}]),
    ("[{}", None), ("[{},]", None), ("[{} {}]", None), ("[{}] x", None), ('[{"a": tru}]', None)])
def test_arrays_whole_and_damaged(tmp_path, text, elements, monkeypatch):
    path = tmp_path / "a.json"
    path.write_text(text, encoding="utf-8")
    [file] = list_inputs([str(path)]).files
    for block in (1, 1000):
        monkeypatch.setattr("megatron_mixtral.data.corpus.readers.BLOCK", block)
        if elements is None:
            with pytest.raises(DataError, match=r"a\.json: the JSON array cannot be read after record [01]"):
                list(read_array(file))
        else:
            assert list(read_array(file)) == elements


@pytest.mark.parametrize("as_array", [True, False], ids=["array", "lines"])
@pytest.mark.parametrize(("packing", "damage"), [
    ("gz", "cut"), ("gz", "flipped"), ("zst", "cut"), ("zst", "flipped"), ("zst", "wide")])
def test_damage_of_a_packed_file_is_not_blamed_on_its_text(packing, damage, as_array, tmp_path):
    import zstandard

    text = Path(write(tmp_path / "a", RECORDS * 400, as_array=as_array)).read_bytes()
    packed = (gzip.compress(text, 0) if packing == "gz"
              else zstandard.ZstdCompressor(write_checksum=True).compress(text))  # fmt: skip
    if damage == "cut":
        packed = packed[:-20]
    elif packing == "gz":  # the text of the first record is torn, which only the checksum at the end knows
        packed = packed.replace(b'"instruction":', b'"instruction ;', 1)
    else:  # of a window of 4 GiB; or with other bytes
        packed = packed[:4] + b"\x00\xb0\x01\x00\x00" if damage == "wide" else packed[:-1] + b"?"
    path = tmp_path / f"a.json.{packing}"
    path.write_bytes(packed)
    sentence = "requires too much memory" if damage == "wide" else "file is damaged or cut"
    with pytest.raises(DataError, match=rf"^\S+a\.json\.{packing}: .*{sentence}"):
        preprocess_instructions(options(tmp_path, str(path)))


def test_nothing_usable_is_an_error(tmp_path):
    source = write(tmp_path / "a.jsonl", [{"instruction": "x", "output": "y " * 50}])
    with pytest.raises(DataError, match="No sample came out of 1 records: 1 samples of .* longer"):
        preprocess_instructions(options(tmp_path, source, seq_length=20))


@pytest.mark.parametrize(("flags", "sentence"), [
    (["--handler-name", "Alpaca"], "not one of: none, auto, alpaca"),
    (["--handler-name", "auto", "--pack"], "--pack needs --seq-length"),
    (["--seq-length", "100"], "give --handler-name"),
    (["--handler-name", "auto", "--num-shards", "2"], "--num-shards: for plain text"),
    (["--prompt-type", "mixtral"], "give --handler-name"),
    (["--handler-name", "auto", "--prompt-type", "vicuna"], "not one of: mixtral, mixtral-v3, chatml"),
])
def test_flags_that_cannot_work(flags, sentence, tmp_path):
    with pytest.raises(ConfigError, match=sentence):
        parse_flags(["--input", "x", "--output-prefix", "y", "--tokenizer-type", "PretrainedFromHF", *flags], {})


def test_sets_that_training_cannot_use_are_refused(tmp_path):
    source = write(tmp_path / "a.jsonl", RECORDS)
    preprocess_instructions(options(tmp_path, source, seq_length=200, pack=True))
    prefix = str(tmp_path / "out")
    check_instruction([instruction_blend([prefix])], 32000, 200, 1)
    with pytest.raises(DataError, match=r"a row has \d+ positions, --seq-length has 100"):
        check_instruction([instruction_blend([prefix])], 32000, 100, 1)
    with pytest.raises(DataError, match="is packed, .* set --micro-batch-size 1"):
        check_instruction([instruction_blend([prefix])], 32000, 200, 2)
    with pytest.raises(DataError, match="the model's vocabulary has 500"):
        check_instruction([instruction_blend([prefix])], 500, 200, 1)
    with pytest.raises(DataError, match=r"missing_packed_input_ids_document\.bin does not exist"):
        instruction_blend([str(tmp_path / "missing")])
    preprocess_instructions(options(tmp_path, source, output_prefix=str(tmp_path / "other")))
    for end in (".bin", ".idx"):
        Path(column_prefix(prefix, "labels") + end).write_bytes(
            Path(column_prefix(str(tmp_path / "other"), "labels") + end).read_bytes())
    with pytest.raises(DataError, match="they are not of one set"):
        check_instruction([instruction_blend([prefix])], 32000, 200, 1)
