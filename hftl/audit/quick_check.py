"""The least that is said about data before every run: a look that costs less than opening them."""

from __future__ import annotations

import os
from collections import defaultdict
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np

from hftl.audit.class_balance import FEW, Labels, class_counts, read_labels
from hftl.audit.duplicates import Groups, conflicting
from hftl.audit.finding import Numbering, spoken
from hftl.audit.text_normalization import text_keys
from hftl.data.columns import arrow_column
from hftl.data.layouts.in_memory import GIVEN
from hftl.data.splits import Splits
from hftl.errors import shorten
from hftl.tasks.inputs import ImageInputs, TextInputs

READ = 64_000_000
"""Bytes of images that are read at most."""
_AT_ONCE = 500
"""Images whose files are looked at together."""


def brief(splits: Splits, task: Any) -> list[str]:
    """Returns a sentence each for rows that splits share, contradicting labels and rare classes; [] where all is well.

    Texts are compared as `hftl check` does; images only where their files are the same. Never raises: a run does not
    end for what this cannot read.

    Args:
        splits: All rows.
        task: Its `inputs` name the columns; of a task without them nothing is said.
    """
    try:
        return _brief(splits, task)
    except Exception:  # whatever it is, the run's own checks say it better
        return []


def _brief(splits: Splits, task: Any) -> list[str]:
    numbering = Numbering({split: len(rows) for split, rows in splits.items()})
    inputs = getattr(task, "inputs", None)
    if isinstance(inputs, TextInputs):
        keys = np.concatenate([text_keys(rows, inputs.columns) for rows in splits.values()])
    elif isinstance(inputs, ImageInputs):
        keys = _image_keys(splits, inputs.column, numbering)
    else:
        return []
    labels = read_labels(splits, numbering, task)
    groups = Groups(keys, keys, np.ones(len(keys), bool), "")
    said = [*_shared(groups, numbering), *_contradictions(groups, labels, numbering)]
    source = splits.config.source
    listed = "" if source.startswith(GIVEN) else f"; `hftl check {source}` lists them"
    return [f"{'; '.join(said)}{listed}"] * bool(said) + _rare(labels, numbering)


def _shared(groups: Groups, numbering: Numbering) -> list[str]:
    counts: dict[str, int] = defaultdict(int)
    for group in groups.groups:
        places = numbering.split_of(group)
        for place in places[places > places[0]].tolist():
            counts[numbering.splits[place]] += 1
    order = sorted(counts, key=numbering.splits.index, reverse=True)
    return [f"{spoken({split: counts[split] for split in order})} also stand in an earlier split"] if counts else []


def _contradictions(groups: Groups, labels: Labels, numbering: Numbering) -> list[str]:
    rows = numbering.rows([number for group in conflicting(groups, labels) for number in group.tolist()])
    counts = {split: len(found) for split, found in rows.items() if found}
    return [f"{spoken(counts)} have the same input as another row and another label"] if counts else []


def _rare(labels: Labels, numbering: Numbering) -> list[str]:
    counts = class_counts(labels, numbering).get("train", np.empty(0))[: labels.known]
    few = [f"{name} ({count})" for name, count in zip(labels.names, counts, strict=False) if count < FEW]
    return [f"{len(few)} class(es) have fewer than {FEW} training rows: {shorten(few, 6)}"] if few else []


def _image_keys(splits: Splits, column: str, numbering: Numbering) -> Any:
    """Returns a key for each image, equal for equal files; only files of a size that occurs again are read."""
    keys = np.arange(len(numbering)).astype(np.uint64)  # all different
    sizes = np.concatenate([_sizes(rows, column) for rows in splits.values()])
    _, group, counts = np.unique(sizes, return_inverse=True, return_counts=True)
    again = np.flatnonzero((counts[group] > 1) & (sizes > 0))
    again = again[np.cumsum(sizes[again]) <= READ]
    for split, rows in splits.items():
        span = numbering.of_split(split)
        mine = again[(again >= span.start) & (again < span.stop)]
        for start in range(0, len(mine), _AT_ONCE):
            numbers = mine[start : start + _AT_ONCE]
            images = arrow_column(rows.select(numbers - span.start), column).combine_chunks()
            for number, image in zip(numbers, images.to_pylist(), strict=True):
                content = Path(image["path"]).read_bytes() if image["bytes"] is None else image["bytes"]
                # the top bit keeps hashes apart from the numbers of rows
                keys[number] = int.from_bytes(blake2b(content, digest_size=8).digest(), "little") | 1 << 63
    return keys


def _sizes(rows: Any, column: str) -> Any:
    """Returns the bytes of each image file [N], 0 where there is none; a few images at a time are in memory."""
    import pyarrow.compute as pc

    sizes: list[int] = []
    for start in range(0, len(rows), _AT_ONCE):
        for chunk in arrow_column(rows.select(range(start, min(start + _AT_ONCE, len(rows)))), column).chunks:
            inside, paths = (
                pc.call_function("binary_length", [chunk.field("bytes")]).to_pylist(),
                chunk.field("path").to_pylist(),
            )
            valid = chunk.is_valid().to_pylist()
            for size, path, there in zip(inside, paths, valid, strict=True):
                sizes.append(size if size is not None else os.stat(path).st_size if there and path else 0)
    return np.array(sizes, dtype=np.int64)
