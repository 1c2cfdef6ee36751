# ruff: noqa: E501  (literal tables)
"""Table readers on malformed and unusual files: each raises with file, position and reason, or returns defined rows."""

import gzip
import io
import json
import zipfile
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pyarrow.parquet.encryption as pe
import pytest
from datasets import Features, Value

from hftl.config.schema import DataConfig
from hftl.data.columns import find_column
from hftl.data.source import load_splits
from hftl.data.tables.table_files import TABLES
from hftl.errors import DataError, HftlError
from hftl.tasks.registry import TextClassification

GOOD = "text,label\n" + "".join(f"row {number},{'ab'[number % 2]}\n" for number in range(6))
LINES = "".join(json.dumps({"text": f"row {n}", "label": "ab"[n % 2]}) + "\n" for n in range(6))


def load(folder: Path, **files):
    """Writes `files` into a folder of tables; returns its task and splits."""
    for name, content in files.items():
        (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)
    splits = load_splits(DataConfig(source=str(folder), validation_fraction=0.0))
    return TextClassification(splits), splits


def parquet(table, **options) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(pa.table(table) if isinstance(table, dict) else table, buffer, **options)
    return buffer.getvalue()


def zipped(**members) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def encrypted() -> bytes:
    class Kms(pe.KmsClient):
        def wrap_key(self, key_bytes, master_key_identifier):
            return key_bytes

        def unwrap_key(self, wrapped_key, master_key_identifier):
            return wrapped_key

    factory = pe.CryptoFactory(lambda _: Kms())
    options = pe.EncryptionConfiguration(footer_key="footer", column_keys={"key": ["text"]})
    properties = factory.file_encryption_properties(pe.KmsConnectionConfig(), options)
    return parquet({"text": ["a", "b"], "label": [0, 1]}, encryption_properties=properties)


PARQUET = parquet({"text": [f"row {n}" for n in range(5000)], "label": [n % 2 for n in range(5000)]})
NUL = '"nul"\0'

INVALID = {
    "utf-16 csv": ("train.csv", GOOD.encode("utf-16"), "train.csv' is UTF-16 text; convert it: iconv"),
    "utf-16 jsonl": ("train.jsonl", LINES.encode("utf-16-be"), "line 1 has a NUL byte"),
    "latin-1 csv": (
        "train.csv",
        "text,label\nrow,a\nrow,a\ncaf\xe9,b\n".encode("latin-1"),
        "is not UTF-8: byte 0xe9 in line 4 (byte 27 of the file). Convert Latin-1 or Windows text: iconv",
    ),
    "latin-1 after a megabyte": (
        "train.csv",
        b"text,label\n" + b"row,a\n" * 300_000 + b"caf\xe9,b\n",
        "byte 0xe9 in line 300002 (byte 1800015 of the file)",
    ),
    "latin-1 jsonl": ("train.jsonl", LINES.encode() + b'{"text": "\xfc"}', "byte 0xfc in line 7"),
    "truncated utf-8": ("train.csv", GOOD.encode() + b"\xe2\x82", "byte 0xe2 in line 8"),
    "nul csv": ("train.csv", GOOD + "a\0b,a\n", "line 8 has a NUL byte"),
    "nul jsonl": ("train.jsonl", LINES + NUL, "line 7 has a NUL byte"),
    "duplicate column": ("train.csv", "text,label,text\na,b,c\n", "duplicate columns: text. Rename or remove"),
    "duplicate after spaces": ("train.csv", "text,label, label\na,b,c\n", "duplicate columns: label"),
    "duplicate field": ("train.jsonl", '{"text": "a", "text": "b"}\n', "line 1: duplicate field 'text'"),
    "duplicate column in parquet": (
        "train.parquet",
        parquet(pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], names=["text", "text"])),
        "duplicate columns: text",
    ),
    "text, then number": (
        "train.jsonl",
        LINES + '{"text": "x", "label": 1}\n',
        "line 7: 'label' is a number ('1'), but text in line 1. Use one type in all rows",
    ),
    "1 and '1'": ("train.jsonl", '{"text":"a","label":1}\n{"text":"b","label":"1"}\n', "line 2: 'label' is text ('1')"),
    "true and 1": (
        "train.jsonl",
        '{"t":"a","label":true}\n{"t":"b","label":1}\n',
        "'label' is a number ('1'), but true or",
    ),
    "text, then object": ("train.json", '[{"text":"a"},{"text":{"x":1}}]', "row 1: 'text' is an object"),
    "mixed lists": ("train.jsonl", '{"text":"a","tags":[1,"b"]}\n', "line 1 to line 1: "),
    "too many cells": (
        "train.csv",
        GOOD + "one, two,a\n",
        "line 8 has 3 cell(s), but the header has 2 (text, label)",
    ),
    "too few cells": ("train.csv", GOOD + "alone\n", "line 8 has 1 cell(s), but the header has 2"),
    "too many cells in all rows": ("train.csv", "text,label\nx,a,1\ny,b,2\n", "line 2 has 3 cell(s)"),
    "too many cells in tsv": ("train.tsv", "text\tlabel\na\tb\tc\n", "Enclose cells that contain a tab"),
    "unclosed quote": ("train.csv", GOOD + '"open,a\nmore,b\n', "line 8: a double quote at the start of a cell is not"),
    "quote over several rows": ("train.csv", 'text,label\n"oh,a\nno,b\n"oh",a\n', "line 2: text follows the closing"),
    "raw quotes in tsv": ("train.tsv", 'text\tlabel\n"Well" done\ta\n', "line 2: text follows the closing"),
    "empty": ("train.csv", "", "train.csv' is empty: no header"),
    "only newlines": ("train.csv", "\n\r\n\n  \n", "train.csv' is empty: no header"),
    "only a byte order mark": ("train.csv", b"\xef\xbb\xbf", "train.csv' is empty"),
    "header only": ("train.csv", "text,label\n", "it has no rows"),
    "empty jsonl": ("train.jsonl", "\n \n", "train.jsonl' is empty: it has no rows"),
    "empty list": ("train.json", "[]", "train.json' is empty: it has no rows"),
    "empty objects": ("train.jsonl", "{}\n{}\n", "train.jsonl' is empty"),
    "empty parquet": ("train.parquet", b"", "train.parquet' is empty"),
    "parquet without rows": ("train.parquet", parquet({"text": pa.array([], pa.string())}), "it has no rows"),
    "semicolons": (
        "train.csv",
        "text;label\na;b\n",
        "appears to be separated by semicolons (first line: 'text;label')",
    ),
    "tabs in csv": ("train.csv", "text\tlabel\na\tb\n", "appears to be separated by tabs"),
    "commas in tsv": ("train.tsv", "text,label\na,b\n", "appears to be separated by commas"),
    "nan numbers": ("train.csv", "text,label\na,0.5\nb,1.5\nc,nan\n", "1 row(s) without a finite number"),
    "nan labels": ("train.csv", "text,label\na,1.0\nb,nan\nc,2.0\n", "1 row(s) without a label in column 'label'"),
    "infinite labels": ("train.csv", "text,label\na,1\nb,inf\n", "'label' holds real numbers, not classes"),
    "missing labels": ("train.csv", GOOD + "x,\ny,\n", "train has 2 row(s) without a label in column 'label'"),
    "one class": ("train.csv", "text,label\na,x\nb,x\n", "train has only one class ('x')"),
    "no label column": ("train.csv", "text,label_\na,x\n", "no label column found"),
    "nested labels": (
        "train.jsonl",
        '{"text":"a","label":{"x":1}}\n{"text":"b","label":{"x":2}}\n',
        "no label column found",
    ),
    "nested texts": (
        "train.jsonl",
        '{"text":{"a":1},"label":"x"}\n{"text":{"a":2},"label":"y"}\n',
        "no text column found",
    ),
    "invalid line": ("train.jsonl", LINES + '{"text": "x", \n', "line 7 is not valid JSON"),
    "invalid first line": ("train.jsonl", '{"text: 1}\n' + LINES, "line 1 is not valid JSON"),
    "list as row": ("train.jsonl", LINES + "[1, 2]\n", "line 7 is not an object with fields: '[1, 2]'"),
    "texts as rows": ("train.json", '["a", "b"]', "row 0 is not an object with fields"),
    "columns": ("train.json", '{"text": ["a", "b"], "label": [0, 1]}', "has columns, not rows; allowed: a list of"),
    "pandas columns": ("train.json", '{"text":\n{"0": "a"},\n"label":\n{"0": 1}}', "has columns, not rows"),
    "one object": ("train.json", '{\n"text": "a",\n"label": 1\n}', "is one object, not rows"),
    "NaN in JSON": ("train.jsonl", '{"text": "a", "label": NaN}\n', "line 1: NaN is not JSON; write null"),
    "deeply nested list": ("train.json", "[" * 100_000, "is nested too deeply for a table"),
    "deeply nested line": ("train.jsonl", '{"a":' * 100_000 + "\n", "is nested too deeply"),
    "lone surrogate": ("train.jsonl", '{"text": "\\ud83d", "label": 1}\n', "line 1 has a lone surrogate"),
    "integer beyond 64 bits": ("train.jsonl", '{"text": "a", "label": 123456789012345678901}\n', "line 1 to line 1: "),
    "integer of 5000 digits": ("train.jsonl", '{"text": "a", "id": ' + "9" * 5000 + "}\n", "line 1"),
    "truncated parquet": ("train.parquet", PARQUET[: len(PARQUET) // 2], "it is truncated or not a Parquet file"),
    "not parquet": ("train.parquet", GOOD, "it is truncated or not a Parquet file"),
    "damaged parquet": ("train.parquet", b"PAR1" + b"\xff" * 3000 + PARQUET[3004:], "is damaged after row 0"),
    "encrypted parquet": ("train.parquet", encrypted(), "it is encrypted; write it without encryption"),
    "null column in parquet": (
        "train.parquet",
        parquet({"text": pa.nulls(3), "label": [0, 1, 0]}),
        "train column 'text' has 3 empty text(s), at row 0, 1, 2",
    ),
    "gzip": ("train.csv", gzip.compress(GOOD.encode()), "is compressed by gzip; unpack it (gunzip)"),
    "bzip2": ("train.csv", b"BZh91AY&SY", "is compressed by bzip2"),
    "zip": (
        "train.csv",
        zipped(**{"train.csv": GOOD}),
        "is a zip archive or an Excel file; unpack it, or save it as CSV",
    ),
    "parquet as csv": ("train.csv", PARQUET, "is a Parquet file; name it .parquet"),
    "git lfs pointer": ("train.csv", "version https://git-lfs.github.com/spec/v1\n", "is a Git LFS pointer, not the"),
    "web page": ("train.csv", "<!DOCTYPE html><html>", "is a web page"),
}


@pytest.mark.parametrize("kind", INVALID)
def test_invalid_table_raises_with_position_and_reason(kind, tmp_path):
    name, content, reason = INVALID[kind]
    with pytest.raises(DataError) as caught:
        load(tmp_path, **{name: content})
    message = str(caught.value)
    assert reason in message and "\n" not in caught.value.problems[0] and len(message) < 900


LONG, LONGER = "x" * 1_000_000, "y" * 10_000_000
VALID = {
    "byte order mark before name": ("csv", "\ufeff" + GOOD, {"text": "row 0", "label": "a"}),
    "byte order mark before quoted name": ("csv", '\ufeff"text","label"\nx,a\ny,b\n', {"text": "x", "label": "a"}),
    "byte order mark before JSON": ("jsonl", "\ufeff" + LINES, {"text": "row 0", "label": "a"}),
    "byte order mark before list": ("json", '\ufeff[{"text":"x","label":"a"},{"text":"y","label":"b"}]', {"text": "x", "label": "a"}),
    "CR line endings": ("csv", GOOD.replace("\n", "\r"), {"text": "row 0", "label": "a"}),
    "CR LF line endings": ("csv", GOOD.replace("\n", "\r\n"), {"text": "row 0", "label": "a"}),
    "no final line ending": ("csv", GOOD.rstrip(), {"text": "row 0", "label": "a"}),
    "blank lines": ("csv", "\n" + GOOD.replace("\n", "\n\n \n"), {"text": "row 0", "label": "a"}),
    "spaces around names": ("csv", " text , label \nx, a\ny, b\n", {"text": "x", "label": "a"}),
    "newlines in a cell": ("csv", 'text,label\n"a\nb",x\n"c",y\n', {"text": "a\nb", "label": "x"}),
    "doubled quotes": ("csv", 'text,label\n"say ""a"", b",x\nc,y\n', {"text": 'say "a", b', "label": "x"}),
    "quotes inside a cell": ("csv", 'text,label\nsay "a",x\nc,y\n', {"text": 'say "a"', "label": "x"}),
    "numbers and text": ("csv", "text,label\nx,1\ny,two\n", {"text": "x", "label": "1"}),
    "codes with leading zeros": ("csv", "text,label\nx,007\ny,7\n", {"text": "x", "label": "007"}),
    "integers with missing value": ("csv", "text,label,n\nx,0,5\ny,1,\n", {"text": "x", "label": 0, "n": 5}),
    "integers beyond 64 bits": ("csv", f"text,label,id\nx,a,{2**80}\ny,b,1\n", {"text": "x", "label": "a", "id": str(2**80)}),
    "booleans": ("csv", "text,label\nx,True\ny,false\n", {"text": "x", "label": True}),
    "dates": ("csv", "text,label,day\nx,a,2024-02-30\ny,b,1.1.2024\n", {"text": "x", "label": "a", "day": "2024-02-30"}),
    "lists as text": ("csv", 'text,label\n"[\'a\', \'b\']",x\nc,y\n', {"text": "['a', 'b']", "label": "x"}),
    "unnamed index column": ("csv", ",text,label\n0,x,a\n1,y,b\n", {"Unnamed: 0": 0, "text": "x", "label": "a"}),
    "empty column": ("csv", "text,label,x\na,b,\nb,c,\n", {"text": "a", "label": "b", "x": None}),
    "field missing in first row": ("jsonl", '{"text":"x","label":"a"}\n{"text":"y","label":"b","z":1}\n', {"text": "x", "label": "a", "z": None}),
    "null, then text": ("jsonl", '{"text":"x","label":"a","z":null}\n{"text":"y","label":"b","z":"w"}\n', {"text": "x", "label": "a", "z": None}),
    "integer, then float": ("jsonl", '{"text":"x","label":"a","z":1}\n{"text":"y","label":"b","z":1.5}\n', {"text": "x", "label": "a", "z": 1.0}),
    "nested field": ("jsonl", '{"text":"x","label":"a","z":{"k":[1]}}\n{"text":"y","label":"b","z":{"k":[]}}\n', {"text": "x", "label": "a", "z": {"k": [1]}}),
    "list field": ("jsonl", '{"text":"x","label":"a","z":[1]}\n{"text":"y","label":"b"}', {"text": "x", "label": "a", "z": [1]}),
    "cell of 1 MB": ("csv", f'text,label\n"{LONG}",a\ny,b\n', {"text": LONG, "label": "a"}),
    "cell of 10 MB": ("csv", f"text,label\n{LONGER},a\ny,b\n", {"text": LONGER, "label": "a"}),
    "field of 10 MB": ("jsonl", json.dumps({"text": LONGER, "label": "a"}) + '\n{"text":"y","label":"b"}\n', {"text": LONGER, "label": "a"}),
    "control characters in labels": ("csv", 'text,label\nx,"<b>|\n\U0001f642\u202e\x1b]0;"\ny,b\n', {"text": "x", "label": "<b>|\n\U0001f642\u202e\x1b]0;"}),
    "categories": ("parquet", parquet(pa.Table.from_pandas(pd.DataFrame({"text": ["x", "y"], "label": pd.Categorical(["a", "b"])}))), {"text": "x", "label": "a"}),
}  # fmt: skip


@pytest.mark.parametrize("kind", VALID)
def test_unusual_table_returns_expected_row(kind, tmp_path):
    extension, content, row = VALID[kind]
    task, splits = load(tmp_path, **{f"train.{extension}": content})
    assert splits["train"][0] == row and list(splits["train"].features) == list(row)
    assert task.head.num_outputs == 2


INTERNAL_NAMES = ("length", "row", "split", "index", "weight", "input_ids", "labels", "hftl_length", "prediction")


@pytest.mark.parametrize("name", INTERNAL_NAMES)
def test_internal_column_names_are_accepted(name, tmp_path, tiny_bert):
    from transformers import AutoTokenizer

    lines = [f"text,category,{name}"] + [f"row {n},{'ab'[n % 2]},{n}" for n in range(4)]
    task, splits = load(tmp_path, **{"train.csv": "\n".join(lines)})
    if name == "labels":  # a usual name of label columns has precedence
        assert task.target.column == "labels"
        return
    rows = task.encode(splits["train"], AutoTokenizer.from_pretrained(tiny_bert), None, None)
    batch = task.collate(rows.fetch([0, 1, 2, 3], 0))
    assert batch["labels"].tolist() == [0, 1, 0, 1] and list(rows.lengths) == [len(row) for row in input_ids(rows)]


def input_ids(rows):
    return [example["input_ids"] for example in rows.fetch(range(len(rows)), 0)]


def test_label_column_rejects_model_input_names(tmp_path, tiny_bert):
    from transformers import AutoTokenizer

    (tmp_path / "train.csv").write_text("text,length\nrow,7\nrow row,9\n")
    splits = load_splits(DataConfig(source=str(tmp_path), validation_fraction=0.0, label_column="length"))
    task = TextClassification(splits)
    rows = task.encode(splits["train"], AutoTokenizer.from_pretrained(tiny_bert), None, None)
    assert task.collate(rows.fetch([0, 1], 0))["labels"].tolist() == [0, 1] and task.head.labels == ("7", "9")
    for name in ("input_ids", "pixel_values"):
        with pytest.raises(DataError, match=f"'{name}' is a reserved name of model inputs"):
            find_column("label", Features({"text": Value("string"), name: Value("int64")}), name)


@pytest.mark.parametrize(
    ("files", "outcome"),
    [
        (("train.csv", "train_old.csv"), "'train_old.csv' is ignored"),
        (("train.csv", "train (1).csv"), "'train (1).csv' is ignored"),
        (("train.csv", "training.csv"), DataError("could each be train. Keep one, or number the shards")),
        (("train.csv", "dev.csv", "val.csv"), DataError("dev.csv, val.csv in")),
        (("train.csv", "train_1.csv"), DataError("train.csv, train_1.csv in")),
        (("train_a.csv", "train_b.csv"), DataError("train_a.csv, train_b.csv in")),
        (("train_1.csv", "train_2.csv", "train_10.csv"), 18),
        (("train-00000-of-00002.csv", "train-00001-of-00002.csv"), 12),
        (("train-00000-of-00001-5a2c8f1d3b.csv",), 6),
        (("train-00000-of-00003.csv", "train-00001-of-00003.csv"), DataError("has 2 shard(s) of 3")),
        (("train-part1.csv", "train.part2.csv"), 12),
        (("train_v2.csv",), 6),
    ],
)
def test_only_numbered_shards_are_concatenated(files, outcome, tmp_path, capsys):
    contents = dict.fromkeys(files, GOOD)
    if isinstance(outcome, DataError):
        with pytest.raises(DataError) as caught:
            load(tmp_path, **contents)
        assert str(outcome) in str(caught.value)
        return
    _, splits = load(tmp_path, **contents)
    if isinstance(outcome, int):
        assert len(splits["train"]) == outcome
    else:
        assert len(splits["train"]) == 6 and outcome in capsys.readouterr().out


def test_shards_are_ordered_by_number(tmp_path):
    for number in range(1, 12):
        (tmp_path / f"train_{number}.csv").write_text(f"text,label\n{number},{'ab'[number % 2]}\n")
    splits = load_splits(DataConfig(source=str(tmp_path), validation_fraction=0.0))
    assert splits["train"]["text"][:] == list(range(1, 12))


def test_shards_with_different_columns_raise(tmp_path):
    problem = (
        r"train_2\.csv' has the additional column\(s\) more and lacks the column\(s\) label, compared with .*train_1"
    )
    with pytest.raises(DataError, match=problem):
        load(tmp_path, **{"train_1.csv": GOOD, "train_2.csv": "text,more\na,b\n"})


def test_csv_column_type_matches_in_all_splits(tmp_path):
    _, splits = load(tmp_path, **{"train.csv": "text,label\na,1\nb,2\nc,x\n", "test.csv": "text,label\na,1\n"})
    assert splits["train"]["label"][:] == ["1", "2", "x"] and splits["test"]["label"][:] == ["1"]


LABEL_FILES = {
    "invalid": ("[", "labels.json' is not valid JSON"),
    "not utf-8": (b'["\xff"]', "labels.json' is not valid JSON"),
    "not a list": ('{"0": "a"}', "labels.json' is invalid; allowed: a list of class names"),
    "empty": ("[]", "labels.json' is invalid; allowed: a list of class names"),
    "empty name": ('["a", ""]', "labels.json' is invalid; allowed: a list of class names"),
    "numbers": ("[1, 2]", "labels.json' is invalid; allowed: a list of class names"),
    "deeply nested": ("[" * 100_000, "labels.json' is not valid JSON"),
    "duplicate name": ('["a", "b", "a"]', "has duplicate class names: a"),
    "too short": ('["a", "c"]', "has 2 classes, but column 'label' has 1 other label(s): 'b'"),
}


@pytest.mark.parametrize("kind", LABEL_FILES)
def test_invalid_labels_json_raises(kind, tmp_path):
    content, reason = LABEL_FILES[kind]
    with pytest.raises(DataError) as caught:
        load(tmp_path, **{"train.csv": GOOD, "labels.json": content})
    assert reason in str(caught.value)


def test_labels_json_too_short_raises_unrelated_logs(tmp_path, capsys):
    numbers = "text,label\na,0\nb,1\nc,2\n"
    with pytest.raises(DataError, match=r"has 2 classes \(0 to 1\), but column 'label' has 1 other label\(s\): 2"):
        load(tmp_path, **{"train.csv": numbers, "labels.json": '["x", "y"]'})
    task, _ = load(tmp_path, **{"train.csv": GOOD, "labels.json": '["x", "y"]'})
    assert task.head.labels == ("a", "b") and "labels.json is ignored" in capsys.readouterr().out


def test_labels_differing_by_case_are_logged(tmp_path, capsys):
    task, _ = load(tmp_path, **{"train.csv": "text,label\na,Cat\nb,cat\nc,cat \nd,dog\n"})
    assert task.head.num_outputs == 4
    assert (
        "differ only by case or whitespace and are separate classes: 'Cat' and 'cat' and 'cat '"
        in capsys.readouterr().out
    )


def test_unseen_and_missing_labels_raise_per_split(tmp_path):
    with pytest.raises(DataError) as caught:
        load(tmp_path, **{"train.csv": GOOD, "test.csv": "text,label\nx,z\ny,z\n", "dev.csv": "text\nx\n"})
    message = str(caught.value)
    assert "test has 2 row(s) of class 'z', missing from train" in message
    assert "validation has 1 row(s) without a label" in message


def test_table_with_100000_classes_is_read(tmp_path):
    lines = ["text,label", *(f"t,c{number}" for number in range(100_000))]
    task, _ = load(tmp_path, **{"train.csv": "\n".join(lines)})
    assert task.head.num_outputs == 100_000


def test_csv_types_cover_all_rows(tmp_path):
    rows = [f"t,{number % 5}" for number in range(25_000)]
    task, splits = load(tmp_path, **{"train.csv": "\n".join(["text,label", *rows, "t,five"])})
    assert task.head.labels == ("0", "1", "2", "3", "4", "five") and len(splits["train"]) == 25_001


def test_changed_table_invalidates_cache(tmp_path):
    first, _ = load(tmp_path, **{"train.csv": GOOD})
    second, _ = load(tmp_path, **{"train.csv": GOOD.replace(",a", ",c")})
    assert first.head.labels == ("a", "b") and second.head.labels == ("b", "c")


def test_repaired_table_is_read_after_error(tmp_path):
    """A repaired file with the same name is read again."""
    with pytest.raises(HftlError):
        load(tmp_path, **{"train.csv": "text,label\nx\n"})
    assert len(load(tmp_path, **{"train.csv": GOOD})[1]["train"]) == 6


def test_cases_cover_all_table_formats():
    extensions = {Path(name).suffix for name, _, _ in INVALID.values()}
    assert extensions == set(TABLES) and len(INVALID) + len(VALID) >= 90
