# ruff: noqa: E501  (literal tables)
"""Fuzzing of table readers and labels.json: mutated files return rows or raise `HftlError`."""

import json
import os
import tempfile
import time
import warnings
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hftl.config.schema import DataConfig
from hftl.data.source import load_splits
from hftl.errors import HftlError
from hftl.logging import suppress_logs
from hftl.tasks.registry import TextClassification

ROWS = [{"text": f"row {number} a\u00e9", "label": "ab"[number % 2], "n": number} for number in range(6)]


def _seeds() -> dict[str, bytes]:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(ROWS), sink)
    lines = ["text,label,n", *(f'"{row["text"]}",{row["label"]},{row["n"]}' for row in ROWS)]
    return {
        "train.csv": "\n".join(lines).encode(),
        "train.tsv": "\n".join(lines).replace(",", "\t").encode(),
        "train.jsonl": "\n".join(map(json.dumps, ROWS)).encode(),
        "train.json": json.dumps(ROWS).encode(),
        "train.parquet": sink.getvalue().to_pybytes(),
        "labels.json": b'["a", "b"]',
    }


SEEDS = _seeds()
PIECES = [
    *(bytes([byte]) for byte in range(256)),
    *(b"\xef\xbb\xbf", b"\xff\xfe", b"\r\n", b"\r", b'""', b'","', b"\t", b";", b"\x00", b"null", b"NaN", b"1e999", b"[", b"{"),
    *(b"}", b"]", b"9" * 30, b"-", b"true", b'"\\ud800"', b"\xe2\x82", b"text", b"label", b"PAR1", b"\xc0\x80", b"[" * 2000),
]  # fmt: skip
MUTATION = st.tuples(
    st.sampled_from(["insert", "replace", "delete", "repeat", "truncate"]), st.floats(0, 1), st.sampled_from(PIECES)
)
OUTCOMES: Counter[str] = Counter()


def mutated(content: bytes, mutations) -> bytes:
    for mutation, fraction, piece in mutations:
        offset = int(fraction * len(content))
        before, after = content[:offset], content[offset:]
        content = {
            "insert": before + piece + after,
            "replace": before + piece + after[len(piece) :],
            "delete": before + after[len(piece) :],
            "repeat": before + after[:40] + after,
            "truncate": before,
        }[mutation]
    return content


def read(name: str, content: bytes) -> None:
    """Reads a folder with one file of this content, as a run does; only `HftlError` may be raised."""
    with tempfile.TemporaryDirectory() as folder:
        if name == "labels.json":
            (Path(folder) / "train.csv").write_bytes(SEEDS["train.csv"])
        (Path(folder) / name).write_bytes(content)
        OUTCOMES[name] += 1
        try:
            with suppress_logs(), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                TextClassification(load_splits(DataConfig(source=folder, validation_fraction=0.25)))
            OUTCOMES["read"] += 1
        except HftlError as error:
            assert all(problem and "\x00" not in problem for problem in error.problems)
            OUTCOMES["error"] += 1


def fuzz(examples: int) -> None:
    @settings(
        max_examples=examples, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck)
    )
    @given(st.sampled_from(sorted(SEEDS)), st.lists(MUTATION, min_size=1, max_size=3))
    def read_mutated(name, mutations):
        read(name, mutated(SEEDS[name], mutations))

    OUTCOMES.clear()
    begin = time.perf_counter()
    read_mutated()
    print(f"\nfuzz: {examples} examples in {time.perf_counter() - begin:.0f} s: {dict(OUTCOMES)}")
    assert sum(OUTCOMES[name] for name in SEEDS) >= examples * 0.99 and OUTCOMES["read"] and OUTCOMES["error"]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path)


def test_200_mutated_tables_are_read_or_raise():
    fuzz(200)


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_thousands_of_mutated_tables_are_read_or_raise():
    fuzz(int(os.environ.get("HFTL_FUZZ", "5000")))
