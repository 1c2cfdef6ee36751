# ruff: noqa: E501  (literal tables)
"""Tables that break readers: each is refused with the file, the place and the reason, or read in one documented way."""

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
    """Returns the task and the splits of a folder of tables; without keywords, of the folder as it is."""
    for name, content in files.items():
        (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)
    splits = load_splits(DataConfig(source=str(folder), validation_fraction=0.0))
    return TextClassification(splits), splits


def parquet(table, **options) -> bytes:
    found = io.BytesIO()
    pq.write_table(pa.table(table) if isinstance(table, dict) else table, found, **options)
    return found.getvalue()


def zipped(**members) -> bytes:
    found = io.BytesIO()
    with zipfile.ZipFile(found, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return found.getvalue()


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


WHOLE = parquet({"text": [f"row {n}" for n in range(5000)], "label": [n % 2 for n in range(5000)]})
NUL = '"nul"\0'

REFUSED = {
    "utf-16 csv": ("train.csv", GOOD.encode("utf-16"), "train.csv' is UTF-16 text; convert it: iconv"),
    "utf-16 jsonl": ("train.jsonl", LINES.encode("utf-16-be"), "line 1 holds a NUL byte"),
    "latin-1 csv": (
        "train.csv",
        "text,label\nrow,a\nrow,a\ncaf\xe9,b\n".encode("latin-1"),
        "is not UTF-8: byte 0xe9 in line 4 (byte 27 of the file). If it is Latin-1 or Windows text, convert it",
    ),
    "latin-1 after a megabyte": (
        "train.csv",
        b"text,label\n" + b"row,a\n" * 300_000 + b"caf\xe9,b\n",
        "byte 0xe9 in line 300002 (byte 1800015 of the file)",
    ),
    "latin-1 jsonl": ("train.jsonl", LINES.encode() + b'{"text": "\xfc"}', "byte 0xfc in line 7"),
    "cut utf-8": ("train.csv", GOOD.encode() + b"\xe2\x82", "byte 0xe2 in line 8"),
    "nul csv": ("train.csv", GOOD + "a\0b,a\n", "line 8 holds a NUL byte"),
    "nul jsonl": ("train.jsonl", LINES + NUL, "line 7 holds a NUL byte"),
    "twice a column": ("train.csv", "text,label,text\na,b,c\n", "several columns named text; rename or remove"),
    "twice after blanks": ("train.csv", "text,label, label\na,b,c\n", "several columns named label"),
    "twice a field": ("train.jsonl", '{"text": "a", "text": "b"}\n', "line 1: the field 'text' stands twice"),
    "twice a column in parquet": (
        "train.parquet",
        parquet(pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], names=["text", "text"])),
        "several columns named text",
    ),
    "text, then number": (
        "train.jsonl",
        LINES + '{"text": "x", "label": 1}\n',
        "line 7: 'label' is a number ('1'), but text in line 1; write it one way in all rows",
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
        "line 8 has 3 cell(s), but the header names 2 (text, label)",
    ),
    "too few cells": ("train.csv", GOOD + "alone\n", "line 8 has 1 cell(s), but the header names 2"),
    "a cell too many in all rows": ("train.csv", "text,label\nx,a,1\ny,b,2\n", "line 2 has 3 cell(s)"),
    "too many cells in tsv": (
        "train.tsv",
        "text\tlabel\na\tb\tc\n",
        "A cell that has a tab in it must stand in double",
    ),
    "open quote": ("train.csv", GOOD + '"open,a\nmore,b\n', "line 8: a cell begins with a double quote that is never"),
    "quote swallows rows": (
        "train.csv",
        'text,label\n"oh,a\nno,b\n"oh",a\n',
        "line 2: a cell goes on after its closing",
    ),
    "raw quotes in tsv": ("train.tsv", 'text\tlabel\n"Well" said he\ta\n', "line 2: a cell goes on after its closing"),
    "empty": ("train.csv", "", "train.csv' is empty: there is no header"),
    "only newlines": ("train.csv", "\n\r\n\n  \n", "train.csv' is empty: there is no header"),
    "only a mark": ("train.csv", b"\xef\xbb\xbf", "train.csv' is empty"),
    "header only": ("train.csv", "text,label\n", "it holds no rows"),
    "empty jsonl": ("train.jsonl", "\n \n", "train.jsonl' is empty: it holds no rows"),
    "empty list": ("train.json", "[]", "train.json' is empty: it holds no rows"),
    "empty objects": ("train.jsonl", "{}\n{}\n", "train.jsonl' is empty"),
    "empty parquet": ("train.parquet", b"", "train.parquet' is empty"),
    "parquet without rows": ("train.parquet", parquet({"text": pa.array([], pa.string())}), "it holds no rows"),
    "semicolons": ("train.csv", "text;label\na;b\n", "seems to have a semicolon between its cells (its first line is"),
    "tabs in csv": ("train.csv", "text\tlabel\na\tb\n", "seems to have a tab between its cells"),
    "commas in tsv": ("train.tsv", "text,label\na,b\n", "seems to have a comma between its cells"),
    "nan numbers": ("train.csv", "text,label\na,0.5\nb,1.5\nc,nan\n", "1 row(s) without a finite number"),
    "nan labels": ("train.csv", "text,label\na,1.0\nb,nan\nc,2.0\n", "1 row(s) without a label in column 'label'"),
    "infinite labels": ("train.csv", "text,label\na,1\nb,inf\n", "'label' holds real numbers, not classes"),
    "missing labels": ("train.csv", GOOD + "x,\ny,\n", "train has 2 row(s) without a label in column 'label'"),
    "one class": ("train.csv", "text,label\na,x\nb,x\n", "train has only one class ('x')"),
    "a label column of inputs": ("train.csv", "text,label_\na,x\n", "no label column found"),
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
    "a broken line": ("train.jsonl", LINES + '{"text": "x", \n', "line 7 is not valid JSON"),
    "a broken first line": ("train.jsonl", '{"text: 1}\n' + LINES, "line 1 is not valid JSON"),
    "a row that is a list": ("train.jsonl", LINES + "[1, 2]\n", "line 7 is not an object with fields: '[1, 2]'"),
    "rows that are texts": ("train.json", '["a", "b"]', "row 0 is not an object with fields"),
    "columns": ("train.json", '{"text": ["a", "b"], "label": [0, 1]}', "holds columns, not rows; write a list of"),
    "columns of pandas": ("train.json", '{"text":\n{"0": "a"},\n"label":\n{"0": 1}}', "holds columns, not rows"),
    "one object": ("train.json", '{\n"text": "a",\n"label": 1\n}', "is one object, not rows"),
    "NaN in JSON": ("train.jsonl", '{"text": "a", "label": NaN}\n', "line 1: NaN is not JSON; write null"),
    "a bottomless list": ("train.json", "[" * 100_000, "is nested too deeply to be a table"),
    "a deep line": ("train.jsonl", '{"a":' * 100_000 + "\n", "is nested too deeply"),
    "half a character": ("train.jsonl", '{"text": "\\ud83d", "label": 1}\n', "line 1 holds half of a character"),
    "a number beyond 64 bits": ("train.jsonl", '{"text": "a", "label": 123456789012345678901}\n', "line 1 to line 1: "),
    "a number of 5000 digits": ("train.jsonl", '{"text": "a", "id": ' + "9" * 5000 + "}\n", "line 1"),
    "cut parquet": ("train.parquet", WHOLE[: len(WHOLE) // 2], "it is cut off or no Parquet file"),
    "no parquet": ("train.parquet", GOOD, "it is cut off or no Parquet file"),
    "damaged parquet": ("train.parquet", b"PAR1" + b"\xff" * 3000 + WHOLE[3004:], "is damaged after row 0"),
    "encrypted parquet": ("train.parquet", encrypted(), "it is encrypted; write it without encryption"),
    "parquet of nothing": (
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
    "parquet as csv": ("train.csv", WHOLE, "is a Parquet file; name it .parquet"),
    "a pointer": ("train.csv", "version https://git-lfs.github.com/spec/v1\n", "is a pointer of Git LFS, not the data"),
    "a web page": ("train.csv", "<!DOCTYPE html><html>", "is a web page"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_a_bad_table_is_refused_with_the_place_and_the_reason(kind, tmp_path):
    name, content, reason = REFUSED[kind]
    with pytest.raises(DataError) as caught:
        load(tmp_path, **{name: content})
    message = str(caught.value)
    assert reason in message and "\n" not in caught.value.problems[0] and len(message) < 900


LONG, LONGER = "x" * 1_000_000, "y" * 10_000_000
READ = {
    "a mark before the first name": ("csv", "\ufeff" + GOOD, {"text": "row 0", "label": "a"}),
    "a mark before a quoted name": ("csv", '\ufeff"text","label"\nx,a\ny,b\n', {"text": "x", "label": "a"}),
    "a mark before JSON": ("jsonl", "\ufeff" + LINES, {"text": "row 0", "label": "a"}),
    "a mark before a list": ("json", '\ufeff[{"text":"x","label":"a"},{"text":"y","label":"b"}]', {"text": "x", "label": "a"}),
    "ends of lines by CR": ("csv", GOOD.replace("\n", "\r"), {"text": "row 0", "label": "a"}),
    "ends of lines by CR LF": ("csv", GOOD.replace("\n", "\r\n"), {"text": "row 0", "label": "a"}),
    "no end of the last line": ("csv", GOOD.rstrip(), {"text": "row 0", "label": "a"}),
    "blank lines": ("csv", "\n" + GOOD.replace("\n", "\n\n \n"), {"text": "row 0", "label": "a"}),
    "blanks around names": ("csv", " text , label \nx, a\ny, b\n", {"text": "x", "label": "a"}),
    "newlines in a cell": ("csv", 'text,label\n"a\nb",x\n"c",y\n', {"text": "a\nb", "label": "x"}),
    "doubled quotes": ("csv", 'text,label\n"say ""a"", b",x\nc,y\n', {"text": 'say "a", b', "label": "x"}),
    "quotes inside": ("csv", 'text,label\nsay "a",x\nc,y\n', {"text": 'say "a"', "label": "x"}),
    "numbers and words": ("csv", "text,label\nx,1\ny,two\n", {"text": "x", "label": "1"}),
    "codes with zeros": ("csv", "text,label\nx,007\ny,7\n", {"text": "x", "label": "007"}),
    "whole numbers, one missing": ("csv", "text,label,n\nx,0,5\ny,1,\n", {"text": "x", "label": 0, "n": 5}),
    "beyond 64 bits": ("csv", f"text,label,id\nx,a,{2**80}\ny,b,1\n", {"text": "x", "label": "a", "id": str(2**80)}),
    "truth": ("csv", "text,label\nx,True\ny,false\n", {"text": "x", "label": True}),
    "dates": ("csv", "text,label,day\nx,a,2024-02-30\ny,b,1.1.2024\n", {"text": "x", "label": "a", "day": "2024-02-30"}),
    "lists as text": ("csv", 'text,label\n"[\'a\', \'b\']",x\nc,y\n', {"text": "['a', 'b']", "label": "x"}),
    "a column of row numbers": ("csv", ",text,label\n0,x,a\n1,y,b\n", {"Unnamed: 0": 0, "text": "x", "label": "a"}),
    "a column of nothing": ("csv", "text,label,x\na,b,\nb,c,\n", {"text": "a", "label": "b", "x": None}),
    "a field that comes late": ("jsonl", '{"text":"x","label":"a"}\n{"text":"y","label":"b","z":1}\n', {"text": "x", "label": "a", "z": None}),
    "null, then text": ("jsonl", '{"text":"x","label":"a","z":null}\n{"text":"y","label":"b","z":"w"}\n', {"text": "x", "label": "a", "z": None}),
    "whole, then real": ("jsonl", '{"text":"x","label":"a","z":1}\n{"text":"y","label":"b","z":1.5}\n', {"text": "x", "label": "a", "z": 1.0}),
    "nested beside": ("jsonl", '{"text":"x","label":"a","z":{"k":[1]}}\n{"text":"y","label":"b","z":{"k":[]}}\n', {"text": "x", "label": "a", "z": {"k": [1]}}),
    "one line": ("jsonl", '{"text":"x","label":"a","z":[1]}\n{"text":"y","label":"b"}', {"text": "x", "label": "a", "z": [1]}),
    "a cell of 1 MB": ("csv", f'text,label\n"{LONG}",a\ny,b\n', {"text": LONG, "label": "a"}),
    "a cell of 10 MB": ("csv", f"text,label\n{LONGER},a\ny,b\n", {"text": LONGER, "label": "a"}),
    "a field of 10 MB": ("jsonl", json.dumps({"text": LONGER, "label": "a"}) + '\n{"text":"y","label":"b"}\n', {"text": LONGER, "label": "a"}),
    "strange names": ("csv", 'text,label\nx,"<b>|\n\U0001f642\u202e\x1b]0;"\ny,b\n', {"text": "x", "label": "<b>|\n\U0001f642\u202e\x1b]0;"}),
    "categories": ("parquet", parquet(pa.Table.from_pandas(pd.DataFrame({"text": ["x", "y"], "label": pd.Categorical(["a", "b"])}))), {"text": "x", "label": "a"}),
}  # fmt: skip


@pytest.mark.parametrize("kind", READ)
def test_an_unusual_table_is_read_as_it_was_meant(kind, tmp_path):
    ending, content, row = READ[kind]
    task, splits = load(tmp_path, **{f"train.{ending}": content})
    assert splits["train"][0] == row and list(splits["train"].features) == list(row)
    assert task.head.num_outputs == 2


OURS = ("length", "row", "split", "index", "weight", "input_ids", "labels", "hftl_length", "prediction")


@pytest.mark.parametrize("name", OURS)
def test_columns_may_have_the_names_that_hftl_uses(name, tmp_path, tiny_bert):
    from transformers import AutoTokenizer

    lines = [f"text,category,{name}"] + [f"row {n},{'ab'[n % 2]},{n}" for n in range(4)]
    task, splits = load(tmp_path, **{"train.csv": "\n".join(lines)})
    if name == "labels":  # a usual name for labels comes first, and that is said
        assert task.target.column == "labels"
        return
    rows = task.encode(splits["train"], AutoTokenizer.from_pretrained(tiny_bert), None, None)
    batch = task.collate(rows.fetch([0, 1, 2, 3], 0))
    assert batch["labels"].tolist() == [0, 1, 0, 1] and list(rows.lengths) == [len(row) for row in _ids(rows)]


def _ids(rows):
    return [example["input_ids"] for example in rows.fetch(range(len(rows)), 0)]


def test_a_label_column_may_be_called_length_but_not_as_an_input(tmp_path, tiny_bert):
    from transformers import AutoTokenizer

    (tmp_path / "train.csv").write_text("text,length\nrow,7\nrow row,9\n")
    splits = load_splits(DataConfig(source=str(tmp_path), validation_fraction=0.0, label_column="length"))
    task = TextClassification(splits)
    rows = task.encode(splits["train"], AutoTokenizer.from_pretrained(tiny_bert), None, None)
    assert task.collate(rows.fetch([0, 1], 0))["labels"].tolist() == [0, 1] and task.head.labels == ("7", "9")
    for name in ("input_ids", "pixel_values"):
        with pytest.raises(DataError, match=f"'{name}' is what models call an input; rename"):
            find_column("label", Features({"text": Value("string"), name: Value("int64")}), name)


@pytest.mark.parametrize(
    ("files", "outcome"),
    [
        (("train.csv", "train_old.csv"), "'train_old.csv' is not used"),
        (("train.csv", "train (1).csv"), "'train (1).csv' is not used"),
        (("train.csv", "training.csv"), DataError("could each be train; keep one, or number its parts")),
        (("train.csv", "dev.csv", "val.csv"), DataError("dev.csv, val.csv in")),
        (("train.csv", "train_1.csv"), DataError("train.csv, train_1.csv in")),
        (("train_a.csv", "train_b.csv"), DataError("train_a.csv, train_b.csv in")),
        (("train_1.csv", "train_2.csv", "train_10.csv"), 18),
        (("train-00000-of-00002.csv", "train-00001-of-00002.csv"), 12),
        (("train-00000-of-00001-5a2c8f1d3b.csv",), 6),
        (("train-00000-of-00003.csv", "train-00001-of-00003.csv"), DataError("has 2 part(s), but their names say 3")),
        (("train-part1.csv", "train.part2.csv"), 12),
        (("train_v2.csv",), 6),
    ],
)
def test_only_numbered_parts_of_a_split_are_read_together(files, outcome, tmp_path, capsys):
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


def test_numbered_parts_come_in_the_order_of_their_numbers(tmp_path):
    parts = {f"train_{number}.csv": f"text,label\n{number},{'ab'[number % 2]}\n" for number in range(1, 12)}
    assert load_with_text(tmp_path, parts) == list(range(1, 12))


def load_with_text(folder, files):
    for name, content in files.items():
        (folder / name).write_text(content)
    return load_splits(DataConfig(source=str(folder), validation_fraction=0.0))["train"]["text"][:]


def test_parts_with_other_columns_are_refused(tmp_path):
    with pytest.raises(DataError, match=r"train_2\.csv' has more too and lacks label, compared with .*train_1\.csv"):
        load(tmp_path, **{"train_1.csv": GOOD, "train_2.csv": "text,more\na,b\n"})


def test_a_column_has_one_type_in_all_splits(tmp_path):
    _, splits = load(tmp_path, **{"train.csv": "text,label\na,1\nb,2\nc,x\n", "test.csv": "text,label\na,1\n"})
    assert splits["train"]["label"][:] == ["1", "2", "x"] and splits["test"]["label"][:] == ["1"]


NAMES = {
    "broken": ("[", "labels.json is not valid JSON"),
    "not utf-8": (b'["\xff"]', "labels.json is not valid JSON"),
    "no list": ('{"0": "a"}', "must hold a list of class names"),
    "empty": ("[]", "must hold a list of class names"),
    "empty name": ('["a", ""]', "must hold a list of class names"),
    "numbers": ("[1, 2]", "must hold a list of class names"),
    "deep": ("[" * 100_000, "labels.json is not valid JSON"),
    "twice a name": ('["a", "b", "a"]', "has the name(s) a more than once"),
    "too short": ('["a", "c"]', "names 2 classes, but column 'label' has 1 other label(s): 'b'"),
}


@pytest.mark.parametrize("kind", NAMES)
def test_bad_names_beside_the_tables_are_refused(kind, tmp_path):
    content, reason = NAMES[kind]
    with pytest.raises(DataError) as caught:
        load(tmp_path, **{"train.csv": GOOD, "labels.json": content})
    assert reason in str(caught.value)


def test_too_few_names_for_numbers_are_refused_and_names_of_something_else_are_said(tmp_path, capsys):
    numbers = "text,label\na,0\nb,1\nc,2\n"
    with pytest.raises(DataError, match=r"names 2 classes \(0 to 1\), but column 'label' has 1 other label\(s\): 2"):
        load(tmp_path, **{"train.csv": numbers, "labels.json": '["x", "y"]'})
    task, _ = load(tmp_path, **{"train.csv": GOOD, "labels.json": '["x", "y"]'})
    assert task.head.labels == ("a", "b") and "labels.json is not used" in capsys.readouterr().out


def test_labels_that_only_look_alike_are_said(tmp_path, capsys):
    task, _ = load(tmp_path, **{"train.csv": "text,label\na,Cat\nb,cat\nc,cat \nd,dog\n"})
    assert task.head.num_outputs == 4
    assert (
        "differ by case or blanks alone and count as different classes: 'Cat' and 'cat' and 'cat '"
        in capsys.readouterr().out
    )


def test_unseen_labels_and_missing_columns_of_other_splits_are_named(tmp_path):
    with pytest.raises(DataError) as caught:
        load(tmp_path, **{"train.csv": GOOD, "test.csv": "text,label\nx,z\ny,z\n", "dev.csv": "text\nx\n"})
    message = str(caught.value)
    assert "test has 2 row(s) of class 'z', missing from train" in message
    assert "validation has 1 row(s) without a label" in message


def test_a_hundred_thousand_classes_are_read(tmp_path):
    lines = ["text,label", *(f"t,c{number}" for number in range(100_000))]
    task, _ = load(tmp_path, **{"train.csv": "\n".join(lines)})
    assert task.head.num_outputs == 100_000


def test_types_are_those_of_the_whole_file_not_of_its_first_rows(tmp_path):
    rows = [f"t,{number % 5}" for number in range(25_000)]
    task, splits = load(tmp_path, **{"train.csv": "\n".join(["text,label", *rows, "t,five"])})
    assert task.head.labels == ("0", "1", "2", "3", "4", "five") and len(splits["train"]) == 25_001


def test_a_changed_file_is_read_again(tmp_path):
    first, _ = load(tmp_path, **{"train.csv": GOOD})
    second, _ = load(tmp_path, **{"train.csv": GOOD.replace(",a", ",c")})
    assert first.head.labels == ("a", "b") and second.head.labels == ("b", "c")


def test_nothing_of_a_refused_table_stays(tmp_path):
    """A file that is put right is read, though it was refused under the same name before."""
    with pytest.raises(HftlError):
        load(tmp_path, **{"train.csv": "text,label\nx\n"})
    assert len(load(tmp_path, **{"train.csv": GOOD})[1]["train"]) == 6


def test_each_format_is_among_the_kinds_tried():
    tried = {Path(name).suffix for name, _, _ in REFUSED.values()}
    assert tried == set(TABLES) and len(REFUSED) + len(READ) >= 90
