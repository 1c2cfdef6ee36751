"""One tag a word: softmax and cross entropy on the first token of each word."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional

from hftl.data.columns import arrow_column
from hftl.data.splits import Splits
from hftl.data.validation import BadRow, InvalidRows
from hftl.errors import DataError, shorten
from hftl.loading.loader import Example
from hftl.logging import log
from hftl.models.task_model import HeadSpec
from hftl.preprocessing.sliding_windows import HOME, words_in
from hftl.tasks.capabilities import TargetInfo
from hftl.tasks.metrics import Metric
from hftl.tasks.targets.tagging.bio_tags import OUTSIDE, TagReader, find_tags, tag_names
from hftl.tasks.targets.tagging.metrics import EntityMetrics
from hftl.tasks.task import Outputs

if TYPE_CHECKING:
    from datasets import Dataset

IGNORED = -100
"""What a label is where no loss is taken, as torch and transformers have it."""


class TaggingTarget:
    """Tags as classes 0..K-1, one for each word.

    Args:
        column: The column of tags: a list for each row, or a text whose words are tags.
        tags: Names of the tags, in the order of the outputs.
        words: The column of words, which must be as many.
    """

    info = TargetInfo("word tags")

    def __init__(self, column: str, tags: Sequence[str], words: str) -> None:
        self.column = column
        self.columns = [column]
        self.tags = list(tags)
        self.words = words
        self.reader = TagReader.of(self.tags)
        self.best_metric = "f1" if OUTSIDE in self.tags else "accuracy"
        self.problems: list[str] = []

    @classmethod
    def find(cls, splits: Splits, words: str) -> TaggingTarget:
        """Detects the column and its tags, and says how they are read; what is wrong goes into `problems`.

        Args:
            splits: All rows.
            words: The column of words.
        """
        train = splits["train"]
        try:
            column = find_tags(train.features, splits.config.label_column)
            tags, origin = tag_names(splits, column.name)
        except DataError as error:
            found = cls("tags", [], words)
            found.problems = error.problems
            return found
        found = cls(column.name, tags, words)
        seen: dict[str, Counter[int]] = {}
        for split, rows in splits.items():
            seen[split] = Counter()
            bad = []
            for row, read in enumerate(found._read(rows)):
                if isinstance(read, BadRow):
                    bad.append((row, read))
                else:
                    seen[split].update(read)
            if bad and not splits.lenient:
                found.problems.append(_bad_sentence(split, bad))
        found.problems += found._unfit(seen, splits)
        log(f"data: tags from column '{column.name}' ({column.why}); {len(tags)} tags {origin}: {shorten(tags)}")
        if not found.problems:
            found._say_scheme(train, seen["train"])
        return found

    def _unfit(self, seen: Mapping[str, Counter[int]], splits: Splits) -> Iterator[str]:
        """Yields what makes it impossible to learn the tags."""
        present = {number for split in splits.labelled_by_source for number, count in seen[split].items() if count}
        for split, counts in seen.items():
            unseen = sorted(set(counts) - present)
            if unseen and not splits.lenient:
                names = shorten([self.tags[number] for number in unseen])
                yield (
                    f"data.source: {split} has {sum(counts[number] for number in unseen)} word(s) with the tag "
                    f"{names}, which train lacks: no model can learn it. Move rows into train or drop the tag."
                )
        if len(present) < 2:
            only = f" ('{self.tags[next(iter(present))]}')" if present else ""
            yield f"data.label_column: train has only one tag{only} in column '{self.column}'; two are needed."

    def _say_scheme(self, train: Dataset, counts: Counter[int]) -> None:
        """Says by which rule tags are read, which tags never occur, and how many are out of order."""
        reader, opening, following, stray = self.reader, 0, 0, 0
        for numbers in self._read(train):
            if not isinstance(numbers, BadRow):
                stray += sum(1 for _ in reader.out_of_order(numbers))
                found = reader.opens(numbers)
                opening, following = opening + found[0], following + found[1]
        unused = [tag for number, tag in enumerate(self.tags) if not counts[number]]
        if unused:
            log(f"data: tags that no word of train has, and that the model will not learn: {shorten(unused)}")
        if reader.scheme == "plain":
            each = "words with one tag in a row are one entity" if OUTSIDE in self.tags else "each word counts alone"
            log(f"data: tags have no prefix (B-, I-): {each}")
        elif reader.scheme == "BIO" and stray and opening == following:
            log("data: tags are IOB1: an entity begins with I-, and with B- only right after another of its type")
        else:
            log(f"data: tags are {reader.scheme}; {len(reader.kinds)} types of entities: {shorten(reader.kinds)}")
            if stray:
                log(
                    f"data: {stray} word(s) of train go on with an entity that the word before is not part of (I- "
                    "without B-, or of another type); each is read as the beginning of one, as conlleval and seqeval do"
                )

    def _read(self, rows: Dataset) -> Iterator[list[int] | BadRow]:
        """Yields the numbers of the tags of each row, or why there are none."""
        if self.column not in rows.features:
            yield from [BadRow("no tags", self.column)] * len(rows)
            return
        names = getattr(getattr(rows.features[self.column], "feature", None), "names", None)
        ids: dict[Any, int] = {tag: number for number, tag in enumerate(self.tags)}
        ids = {number: ids[name] for number, name in enumerate(names) if name in ids} if names else ids
        numbers: dict[Any, int] = {number: number for number in range(len(self.tags))}
        words = arrow_column(rows, self.words).to_pylist() if self.words in rows.features else [[]] * len(rows)
        for text, value in zip(words, arrow_column(rows, self.column).to_pylist(), strict=True):
            tags: list[Any] = value.split() if isinstance(value, str) else value
            count = len(words_in(text)[1])
            if not tags or None in tags:
                yield BadRow("no tags", self.column)
                continue
            known = ids if names or isinstance(tags[0], str) else numbers
            strange = [tag for tag in tags if tag not in known]
            if strange:
                yield BadRow("unknown tag", self.column, str(strange[0]))
            elif len(tags) != count:
                yield BadRow(f"words and tags differ in number: {count} and {len(tags)}", self.column)
            else:
                yield [known[tag] for tag in tags]

    def numbered(self, rows: Dataset) -> Dataset:
        """Returns rows whose tags are numbers as the model has them; rows without the column as they are.

        Raises:
            DataError: Some rows have tags that the model does not know, none, or more or fewer than words.
        """
        from datasets import List, Value

        if self.column not in rows.features:
            return rows
        read = list(self._read(rows))
        bad = [(row, found) for row, found in enumerate(read) if isinstance(found, BadRow)]
        if bad:
            raise DataError(_bad_sentence("the data", bad) + f" Tags of the model: {shorten(self.tags)}.")
        inner = getattr(rows.features[self.column], "feature", None)
        if inner == Value("int64"):
            return rows
        from datasets.fingerprint import Hasher

        key = Hasher.hash([rows._fingerprint, self.column, self.tags, "hftl tags 1"])
        features = rows.features.copy()
        features[self.column] = List(Value("int64"))

        def number(row: dict[str, Any], index: int) -> dict[str, Any]:
            return {self.column: read[index]}

        return rows.map(number, with_indices=True, features=features, new_fingerprint=key, desc="number the tags")

    def head(self, model_class: str) -> HeadSpec:
        """Returns a head with one output per tag."""
        return HeadSpec(model_class, len(self.tags), tuple(self.tags), None)

    def labels(self, examples: list[Example]) -> Tensor | None:
        """Returns the number of each word's tag at its first token [B, W, T] int64, `IGNORED` elsewhere.

        None where rows have no tags.
        """
        if any(example.get(self.column) is None for example in examples):
            return None
        windows, tokens = (max(sizes) for sizes in zip(*map(_size, examples), strict=True))
        labels = torch.full((len(examples), windows, tokens), IGNORED)
        for row, example in enumerate(examples):
            for (window, place), tag in zip(example[HOME], example[self.column], strict=True):
                if window >= 0:
                    labels[row, window, place] = tag
        return labels

    def loss(self, outputs: Outputs, labels: Tensor) -> Tensor:
        """Returns the mean cross entropy over the words of each example [B], in float32; 0 where it has none."""
        logits = outputs["logits"].float().flatten(1, 2).transpose(1, 2)
        labels = labels.flatten(1)
        losses = functional.cross_entropy(logits, labels, reduction="none", ignore_index=IGNORED)
        return losses.sum(1) / (labels != IGNORED).sum(1).clamp(min=1)

    @property
    def other(self) -> int:
        """The tag of words that a tokenizer makes nothing of."""
        return self.tags.index(OUTSIDE) if OUTSIDE in self.tags else 0

    def metrics(self) -> list[Metric]:
        """Returns precision, recall and F1 of entities, and the accuracy of tags."""
        return [EntityMetrics(self.tags, partial(_numbers, other=self.other))]

    def decode(self, outputs: Outputs, batch: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Returns words, their tags, the probability of each tag, and the entities with their place in the text.

        A list of words is joined by blanks to be a text. Where words have true tags, they are `label`.
        """
        rows = []
        tagged = zip(batch["texts"], batch["spans"], *tagged_words(outputs, batch, self.other), strict=True)
        for text, spans, numbers, scores in tagged:
            words, tags = [text[start:end] for start, end in spans], [self.tags[number] for number in numbers]
            entities = self._entities(text, spans, numbers, scores)
            rows.append({"words": words, "tags": tags, "scores": scores, "entities": entities})
        if "tags" in batch:
            rows = [
                row | {"label": [self.tags[n] for n in true]} for row, true in zip(rows, batch["tags"], strict=True)
            ]
        return rows

    def _entities(
        self, text: str, spans: Sequence[Sequence[int]], numbers: Sequence[int], scores: Sequence[float]
    ) -> list[dict[str, Any]]:
        found = []
        for entity in self.reader.entities(numbers):
            start, end = spans[entity.first][0], spans[entity.end - 1][1]
            within = scores[entity.first : entity.end]
            found.append(
                {
                    "type": entity.kind,
                    "text": text[start:end],
                    "score": sum(within) / len(within),
                    "start": start,
                    "end": end,
                    "first_word": entity.first,
                    "end_word": entity.end,
                }
            )
        return found

    def invalid_rows(self, splits: Splits) -> InvalidRows:
        """Returns rows without tags, with more or fewer of them than words, or with tags that train lacks."""
        read = {split: list(self._read(rows)) for split, rows in splits.items()}
        known = {tag for tags in read["train"] if not isinstance(tags, BadRow) for tag in tags}
        return {
            split: {
                row: tags if isinstance(tags, BadRow) else self._unknown(tags, known)
                for row, tags in enumerate(found)
                if isinstance(tags, BadRow) or not known.issuperset(tags)
            }
            for split, found in read.items()
        }

    def _unknown(self, tags: Sequence[int], known: set[int]) -> BadRow:
        first = next(tag for tag in tags if tag not in known)
        return BadRow("tag that train lacks", self.column, self.tags[first])

    def state(self) -> dict[str, Any]:
        """Returns columns and tags."""
        return {"column": self.column, "tags": self.tags, "words": self.words}


def tagged_words(outputs: Outputs, batch: Mapping[str, Any], other: int) -> tuple[list[list[int]], list[list[float]]]:
    """Returns the most likely tag of each word and its probability, a list for each row.

    Args:
        outputs: `logits` [B, W, T, K].
        batch: `positions` [B, N], where among the W x T tokens each word has its first one, -1 where it has none; and
            `spans`, as many as there are words.
        other: The tag of words without tokens; their probability is 0.
    """
    positions = batch["positions"]
    shares = outputs["logits"].float().flatten(1, 2).softmax(-1)
    of_words = shares.gather(1, positions.clamp(min=0)[..., None].expand(-1, -1, shares.shape[-1]))
    scores, numbers = of_words.max(-1)
    scores, numbers = scores.masked_fill(positions < 0, 0.0), numbers.masked_fill(positions < 0, other)
    counts = [len(spans) for spans in batch["spans"]]
    return (
        [row[:count] for row, count in zip(numbers.tolist(), counts, strict=True)],
        [row[:count] for row, count in zip(scores.tolist(), counts, strict=True)],
    )


def _numbers(outputs: Outputs, batch: Mapping[str, Any], other: int) -> list[list[int]]:
    return tagged_words(outputs, batch, other)[0]


def _size(example: Example) -> tuple[int, int]:
    """Returns the windows of an example, and the tokens of the longest."""
    windows = example["input_ids"]
    return len(windows), max(map(len, windows))


def _bad_sentence(split: str, bad: Sequence[tuple[int, BadRow]]) -> str:
    kinds = Counter(why.kind for _, why in bad)
    counted = ", ".join(f"{count} x {kind}" for kind, count in kinds.items())
    first = [f"row {row}: {why.reason}{f' {why.value!r}' if why.value else ''}" for row, why in bad[:5]]
    return f"data.source: {split} has {len(bad)} row(s) whose tags cannot be used ({counted}); {shorten(first, 5)}."
