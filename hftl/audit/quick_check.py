"""Check of the data before every run: shared rows, contradicting labels, rare classes."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable, Mapping
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np

from hftl.audit.class_balance import FEW, Labels, class_counts, read_labels
from hftl.audit.duplicates import Groups, conflicting
from hftl.audit.finding import Numbering, format_counts
from hftl.audit.text_normalization import BATCH, key_of, normalise
from hftl.data.columns import arrow_column
from hftl.data.layouts.in_memory import GIVEN
from hftl.data.splits import Splits
from hftl.errors import shorten
from hftl.tasks.targets.detection.target import DetectionTarget
from hftl.tasks.targets.question_answering.target import QuestionAnsweringTarget, answers_in
from hftl.tasks.targets.segmentation.target import SegmentationTarget
from hftl.tasks.task import input_column_types

READ = 64_000_000
"""Bytes of images that are read at most."""
_AT_ONCE = 500
"""Images whose files are looked at together."""
ABSENT = np.uint64(2**64 - 1)
"""Key of an input that a row does not have."""
_REASON = 300
"""Characters of an error that are logged."""


def quick_check(splits: Splits, task: Any) -> list[str]:
    """Returns a sentence each for rows that splits share, contradicting labels and rare classes; [] where all is well.

    Texts are compared as `hftl check` does; images only where their files are the same. Never raises: a run does not
    end because its data cannot be checked.

    Args:
        splits: All rows.
        task: Its `inputs` name the columns. A task without them, such as a custom one, is not checked.

    Returns:
        Sentences. A check that fails gives a single one with the reason.
    """
    try:
        return _brief(splits, task)
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        return [f"failed ({reason[:_REASON]}); the run continues without it"]


def _brief(splits: Splits, task: Any) -> list[str]:
    numbering = Numbering({split: len(rows) for split, rows in splits.items()})
    kinds = input_column_types(task)
    columns = getattr(getattr(task, "inputs", None), "key_columns", tuple(kinds))
    if not columns:
        return []
    images = {name: _image_keys(splits, name, numbering) for name in columns if kinds[name] == "image"}

    def group(text_of: Callable[[str], str]) -> Groups:
        keys = [images[name] if name in images else _cell_keys(splits, name, text_of) for name in columns]
        usable = (np.stack(keys) != ABSENT).any(0)
        # numbers of the distinct rows: exact, so columns need no further hash
        rows = keys[0] if len(keys) == 1 else np.unique(np.stack(keys, 1), axis=0, return_inverse=True)[1].reshape(-1)
        return Groups(rows, rows, usable, "")

    groups = group(normalise)
    if task.head.problem_type is not None:
        labels, alike = read_labels(splits, numbering, task), groups
    else:  # positions of words and answers hold only for the text as it stands
        alike = group(str)
        labels = _cell_labels(splits, getattr(task, "target", None), kinds, alike, numbering)
    said = [*_shared(groups, numbering), *_contradictions(alike, labels, numbering)]
    source = splits.config.source
    listed = "" if source.startswith(GIVEN) else f"; `hftl check {source}` lists them"
    return [f"{'; '.join(said)}{listed}"] * bool(said) + _rare(labels, numbering)


def _cell_keys(splits: Splits, column: str, text_of: Callable[[str], str]) -> Any:
    """Returns a key for each cell of a column [N] uint64; `ABSENT` where it is empty or its split lacks the column."""
    keys = []
    for split, rows in splits.items():
        if column not in rows.features and split != "train":
            keys.append(np.full(len(rows), ABSENT))
            continue
        for start in range(0, len(rows), BATCH):
            cells = arrow_column(rows.select(range(start, min(start + BATCH, len(rows)))), column).to_pylist()
            texts = [cell if isinstance(cell, str) else _as_text(cell) for cell in cells]
            keys.append(np.array([key_of(text_of(text)) if text.strip() else ABSENT for text in texts], np.uint64))
    return np.concatenate(keys)


def _as_text(cell: Any) -> str:
    if isinstance(cell, (list, tuple)):
        return " ".join(map(str, cell))
    return "" if cell is None else repr(cell)


def _cell_labels(splits: Splits, target: Any, kinds: Mapping[str, str], groups: Groups, numbering: Numbering) -> Labels:
    """Returns what the target learns from each row as a code, of the rows with equal inputs; other rows have none."""
    codes, known = np.full(len(numbering), -1, np.int64), dict[str, int]()
    columns = [name for name in getattr(target, "columns", ()) if name not in kinds]
    grouped = np.sort(np.concatenate(groups.groups)) if groups.groups and columns else ()
    for split, numbers in numbering.rows(grouped).items():
        rows = splits[split]
        if not numbers or columns[0] not in rows.features:
            continue
        read = _reader(target, rows)
        start = numbering.of_split(split).start
        for number, cell in zip(numbers, arrow_column(rows.select(numbers), columns[0]).to_pylist(), strict=True):
            if cell is not None:
                codes[start + number] = known.setdefault(read(cell), len(known))
    return Labels(codes, [], 0)


def _reader(target: Any, rows: Any) -> Callable[[Any], str]:
    """Returns a function that writes a cell of labels as a text, equal for equal labels."""
    if isinstance(target, DetectionTarget):
        objects = target.reader(rows)
        return lambda cell: repr(sorted(map(repr, zip(*objects.values(cell), strict=False))))
    if isinstance(target, QuestionAnsweringTarget):
        return lambda cell: repr(sorted(set(map(repr, answers_in(cell) or ()))))
    if isinstance(target, SegmentationTarget):
        return lambda cell: blake2b(_content(cell)).hexdigest()
    return repr


def _shared(groups: Groups, numbering: Numbering) -> list[str]:
    counts: dict[str, int] = defaultdict(int)
    for group in groups.groups:
        places = numbering.split_of(group)
        for place in places[places > places[0]].tolist():
            counts[numbering.splits[place]] += 1
    order = sorted(counts, key=numbering.splits.index, reverse=True)
    return (
        [f"{format_counts({split: counts[split] for split in order})} also stand in an earlier split"] if counts else []
    )


def _contradictions(groups: Groups, labels: Labels, numbering: Numbering) -> list[str]:
    rows = numbering.rows([number for group in conflicting(groups, labels) for number in group.tolist()])
    counts = {split: len(found) for split, found in rows.items() if found}
    return [f"{format_counts(counts)} have the same input as another row and another label"] if counts else []


def _rare(labels: Labels, numbering: Numbering) -> list[str]:
    counts = class_counts(labels, numbering).get("train", np.empty(0))[: labels.known]
    few = [f"{name} ({count})" for name, count in zip(labels.names, counts, strict=False) if count < FEW]
    return [f"{len(few)} class(es) have fewer than {FEW} training rows: {shorten(few, 6)}"] if few else []


def _image_keys(splits: Splits, column: str, numbering: Numbering) -> Any:
    """Returns a key for each image, equal for equal files; only files of a size that occurs again are read."""
    keys = np.arange(len(numbering)).astype(np.uint64)  # all different
    sizes = np.concatenate([_sizes(rows, column) for rows in splits.values()])
    keys[sizes == 0] = ABSENT
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
                content = _content(image)
                # the top bit keeps hashes apart from the numbers of rows
                keys[number] = int.from_bytes(blake2b(content, digest_size=8).digest(), "little") | 1 << 63
    return keys


def _content(image: Any) -> bytes:
    """Returns the file of a stored image."""
    return Path(image["path"]).read_bytes() if image["bytes"] is None else image["bytes"]


def _sizes(rows: Any, column: str) -> Any:
    """Returns the bytes of each image file [N], 0 where there is none; a few images at a time are in memory."""
    import pyarrow.compute as pc

    sizes: list[int] = []
    if column not in rows.features:  # a held-out split may lack an optional input
        return np.zeros(len(rows), dtype=np.int64)
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
