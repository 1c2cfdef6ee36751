"""The least that is said about data before every run: a look that costs less than opening them."""

from __future__ import annotations

import os
from collections import defaultdict
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np

from hftl.audit.copies import Groups, conflicting
from hftl.audit.finding import Numbering, spoken
from hftl.audit.labels import FEW, Labels, class_counts, read_labels
from hftl.audit.text_keys import text_keys
from hftl.data.given import GIVEN
from hftl.data.source import Splits
from hftl.errors import shorten
from hftl.tasks.inputs import ImageInputs, TextInputs

READ = 64_000_000
"""Bytes of images that are read at most."""


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
    labels = read_labels(splits, numbering)
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
    from datasets import Image

    keys = np.arange(len(numbering)).astype(np.uint64)  # all different
    same_size: dict[int, list[tuple[int, Any]]] = defaultdict(list)
    for split, rows in splits.items():
        images: Any = rows.select_columns([column]).cast_column(column, Image(decode=False))
        number = numbering.of_split(split).start
        for start in range(0, len(rows), 1_000):
            for stored in images[start : start + 1_000][column]:
                content, path = (stored or {}).get("bytes"), (stored or {}).get("path")
                size = len(content) if content is not None else os.stat(path).st_size if path else 0
                if size:
                    same_size[size].append((number, path if content is None else content))
                number += 1
    left = READ
    for size, images in same_size.items():
        left -= size * len(images) if len(images) > 1 else 0
        if left < 0:
            break
        for number, image in images if len(images) > 1 else ():
            content = image if isinstance(image, bytes) else Path(image).read_bytes()
            # the top bit keeps hashes apart from the numbers of rows
            keys[number] = int.from_bytes(blake2b(content, digest_size=8).digest(), "little") | 1 << 63
    return keys
