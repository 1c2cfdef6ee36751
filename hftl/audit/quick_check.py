"""Quick data check before every run: leaks, conflicting labels and rare classes."""

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
from hftl.audit.text_normalization import BATCH, key_of, normalize
from hftl.data.columns import arrow_column
from hftl.data.layouts.in_memory import GIVEN
from hftl.data.splits import Splits
from hftl.errors import shorten
from hftl.tasks.targets.detection.target import DetectionTarget
from hftl.tasks.targets.question_answering.target import QuestionAnsweringTarget, answers_in
from hftl.tasks.targets.segmentation.target import SegmentationTarget
from hftl.tasks.task import input_column_types

READ = 64_000_000
"""Maximum bytes of image files that are read."""
_IMAGE_BATCH = 500
"""Images per batch, for file sizes and hashes."""
ABSENT = np.uint64(2**64 - 1)
"""Key of an input missing from a row."""
_REASON = 300
"""Maximum characters of a logged error."""


def quick_check(splits: Splits, task: Any) -> list[str]:
    """Returns messages about leaks, conflicting labels and rare classes; [] without findings.

    Texts are compared after normalization, as in `hftl check`; images by the bytes of their files. Never raises: a
    failed check does not end the run.

    Args:
        splits: All rows.
        task: Task whose `inputs` define the columns. Custom tasks without `inputs` are not checked.

    Returns:
        One message for duplicates and one for rare classes. A failed check returns one message with the reason.
    """
    try:
        return _messages(splits, task)
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        return [f"failed ({reason[:_REASON]}); the run continues without it"]


def _messages(splits: Splits, task: Any) -> list[str]:
    numbering = Numbering({split: len(rows) for split, rows in splits.items()})
    column_types = input_column_types(task)
    columns = getattr(getattr(task, "inputs", None), "key_columns", tuple(column_types))
    if not columns:
        return []
    images = {name: _image_keys(splits, name, numbering) for name in columns if column_types[name] == "image"}

    def group(normalization: Callable[[str], str]) -> Groups:
        keys = [images[name] if name in images else _cell_keys(splits, name, normalization) for name in columns]
        usable = (np.stack(keys) != ABSENT).any(0)
        # indices of distinct rows are exact: no hash over columns is needed
        rows = keys[0] if len(keys) == 1 else np.unique(np.stack(keys, 1), axis=0, return_inverse=True)[1].reshape(-1)
        return Groups(rows, rows, usable, "")

    groups = group(normalize)
    if task.head.problem_type is not None:
        labels, label_groups = read_labels(splits, numbering, task), groups
    else:  # positions of words and answers are valid only for the exact text
        label_groups = group(str)
        labels = _cell_labels(splits, getattr(task, "target", None), column_types, label_groups, numbering)
    messages = [*_leaks(groups, numbering), *_conflicts(label_groups, labels, numbering)]
    source = splits.config.source
    listing = "" if source.startswith(GIVEN) else f"; `hftl check {source}` lists them"
    return [f"{'; '.join(messages)}{listing}"] * bool(messages) + _rare_classes(labels, numbering)


def _cell_keys(splits: Splits, column: str, normalization: Callable[[str], str]) -> Any:
    """Returns a key per cell of a column, [N] uint64; `ABSENT` for empty cells and splits without the column."""
    keys = []
    for split, rows in splits.items():
        if column not in rows.features and split != "train":
            keys.append(np.full(len(rows), ABSENT))
            continue
        for start in range(0, len(rows), BATCH):
            cells = arrow_column(rows.select(range(start, min(start + BATCH, len(rows)))), column).to_pylist()
            texts = [cell if isinstance(cell, str) else _as_text(cell) for cell in cells]
            cell_keys = [key_of(normalization(text)) if text.strip() else ABSENT for text in texts]
            keys.append(np.array(cell_keys, np.uint64))
    return np.concatenate(keys)


def _as_text(cell: Any) -> str:
    if isinstance(cell, (list, tuple)):
        return " ".join(map(str, cell))
    return "" if cell is None else repr(cell)


def _cell_labels(
    splits: Splits, target: Any, column_types: Mapping[str, str], groups: Groups, numbering: Numbering
) -> Labels:
    """Returns label cells as codes, equal for equal labels, for rows with equal inputs; -1 for all other rows."""
    codes, code_of = np.full(len(numbering), -1, np.int64), dict[str, int]()
    columns = [name for name in getattr(target, "columns", ()) if name not in column_types]
    grouped = np.sort(np.concatenate(groups.groups)) if groups.groups and columns else ()
    for split, numbers in numbering.rows(grouped).items():
        rows = splits[split]
        if not numbers or columns[0] not in rows.features:
            continue
        label_key = _label_key(target, rows)
        start = numbering.of_split(split).start
        for number, cell in zip(numbers, arrow_column(rows.select(numbers), columns[0]).to_pylist(), strict=True):
            if cell is not None:
                codes[start + number] = code_of.setdefault(label_key(cell), len(code_of))
    return Labels(codes, [], 0)


def _label_key(target: Any, rows: Any) -> Callable[[Any], str]:
    """Returns a function from a label cell to a string, equal for equal labels."""
    if isinstance(target, DetectionTarget):
        objects = target.reader(rows)
        return lambda cell: repr(sorted(map(repr, zip(*objects.values(cell), strict=False))))
    if isinstance(target, QuestionAnsweringTarget):
        return lambda cell: repr(sorted(set(map(repr, answers_in(cell) or ()))))
    if isinstance(target, SegmentationTarget):
        return lambda cell: blake2b(_content(cell)).hexdigest()
    return repr


def _leaks(groups: Groups, numbering: Numbering) -> list[str]:
    counts: dict[str, int] = defaultdict(int)
    for group in groups.groups:
        split_indices = numbering.split_of(group)
        for index in split_indices[split_indices > split_indices[0]].tolist():
            counts[numbering.splits[index]] += 1
    order = sorted(counts, key=numbering.splits.index, reverse=True)
    return [f"{format_counts({split: counts[split] for split in order})} also in an earlier split"] if counts else []


def _conflicts(groups: Groups, labels: Labels, numbering: Numbering) -> list[str]:
    rows = numbering.rows([number for group in conflicting(groups, labels) for number in group.tolist()])
    counts = {split: len(numbers) for split, numbers in rows.items() if numbers}
    return [f"{format_counts(counts)} with conflicting labels (equal inputs)"] if counts else []


def _rare_classes(labels: Labels, numbering: Numbering) -> list[str]:
    counts = class_counts(labels, numbering).get("train", np.empty(0))[: labels.known]
    rare = [f"{name} ({count})" for name, count in zip(labels.names, counts, strict=False) if count < FEW]
    return [f"{len(rare)} class(es) have fewer than {FEW} training rows: {shorten(rare, 6)}"] if rare else []


def _image_keys(splits: Splits, column: str, numbering: Numbering) -> Any:
    """Returns a key per image, [N] uint64, equal for equal files; reads only files that share their size."""
    keys = np.arange(len(numbering)).astype(np.uint64)  # all distinct
    sizes = np.concatenate([_file_sizes(rows, column) for rows in splits.values()])
    keys[sizes == 0] = ABSENT
    _, group, counts = np.unique(sizes, return_inverse=True, return_counts=True)
    hashed = np.flatnonzero((counts[group] > 1) & (sizes > 0))
    hashed = hashed[np.cumsum(sizes[hashed]) <= READ]
    for split, rows in splits.items():
        span = numbering.of_split(split)
        in_split = hashed[(hashed >= span.start) & (hashed < span.stop)]
        for start in range(0, len(in_split), _IMAGE_BATCH):
            numbers = in_split[start : start + _IMAGE_BATCH]
            images = arrow_column(rows.select(numbers - span.start), column).combine_chunks()
            for number, image in zip(numbers, images.to_pylist(), strict=True):
                content = _content(image)
                # the top bit separates hashes from row numbers
                keys[number] = int.from_bytes(blake2b(content, digest_size=8).digest(), "little") | 1 << 63
    return keys


def _content(image: Any) -> bytes:
    """Returns the file content of a stored image."""
    return Path(image["path"]).read_bytes() if image["bytes"] is None else image["bytes"]


def _file_sizes(rows: Any, column: str) -> Any:
    """Returns the size of each image file in bytes, [N] int64, 0 for missing images; loads `_IMAGE_BATCH` at a time."""
    import pyarrow.compute as pc

    sizes: list[int] = []
    if column not in rows.features:  # a held-out split may lack an optional input
        return np.zeros(len(rows), dtype=np.int64)
    for start in range(0, len(rows), _IMAGE_BATCH):
        for chunk in arrow_column(rows.select(range(start, min(start + _IMAGE_BATCH, len(rows)))), column).chunks:
            embedded = pc.call_function("binary_length", [chunk.field("bytes")]).to_pylist()
            paths = chunk.field("path").to_pylist()
            valid = chunk.is_valid().to_pylist()
            for size, path, is_valid in zip(embedded, paths, valid, strict=True):
                sizes.append(size if size is not None else os.stat(path).st_size if is_valid and path else 0)
    return np.array(sizes, dtype=np.int64)
