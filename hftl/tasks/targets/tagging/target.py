"""Token classification: cross entropy on the first token of each word."""

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
from hftl.tasks.targets.tagging.bio_tags import OUTSIDE, TagScheme, find_tags, tag_names
from hftl.tasks.targets.tagging.metrics import EntityMetrics
from hftl.tasks.task import Outputs

if TYPE_CHECKING:
    from datasets import Dataset

IGNORED = -100
"""Label of tokens without loss, as in torch and transformers."""


class TaggingTarget:
    """Tags 0..K-1, one per word.

    Args:
        column: The tag column: lists of tags, or strings of whitespace-separated tags.
        tags: Tag names, in the order of the outputs.
        words: The word column; rows have one tag per word.
    """

    info = TargetInfo("word tags")

    def __init__(self, column: str, tags: Sequence[str], words: str) -> None:
        self.column = column
        self.columns = [column]
        self.tags = list(tags)
        self.words = words
        self.scheme = TagScheme.from_tags(self.tags)
        self.best_metric = "f1" if OUTSIDE in self.tags else "accuracy"
        self.problems: list[str] = []

    @classmethod
    def find(cls, splits: Splits, words: str) -> TaggingTarget:
        """Detects the tag column and the tags, logs their scheme, and collects errors in `problems`.

        Args:
            splits: All rows.
            words: The word column.
        """
        train = splits["train"]
        try:
            column = find_tags(train.features, splits.config.label_column)
            tags, origin = tag_names(splits, column.name)
        except DataError as error:
            target = cls("tags", [], words)
            target.problems = error.problems
            return target
        target = cls(column.name, tags, words)
        counts: dict[str, Counter[int]] = {}
        for split, rows in splits.items():
            counts[split] = Counter()
            invalid = []
            for row, tag_ids in enumerate(target._read(rows)):
                if isinstance(tag_ids, BadRow):
                    invalid.append((row, tag_ids))
                else:
                    counts[split].update(tag_ids)
            if invalid and not splits.lenient:
                problem = _invalid_rows_problem(split, invalid)
                target.problems.append(f"{problem} Correct them, or set --data.on_error skip.")
        target.problems += target._tag_problems(counts, splits)
        log(f"data: tags from column '{column.name}' ({column.why}); {len(tags)} tags {origin}: {shorten(tags)}")
        if not target.problems:
            target._log_scheme(train, counts["train"])
        return target

    def _tag_problems(self, counts: Mapping[str, Counter[int]], splits: Splits) -> Iterator[str]:
        """Yields errors about tags that cannot be learned."""
        present = {tag_id for split in splits.labelled_by_source for tag_id, count in counts[split].items() if count}
        for split, of_split in counts.items():
            missing = sorted(set(of_split) - present)
            if missing and not splits.lenient:
                names = shorten([f"'{self.tags[tag_id]}'" for tag_id in missing])
                yield (
                    f"data.source: {split} has {sum(of_split[tag_id] for tag_id in missing)} word(s) with tag {names}, "
                    "missing from train. Move rows into train or remove the tag."
                )
        if len(present) < 2:
            only = f" ('{self.tags[next(iter(present))]}')" if present else ""
            yield f"data.label_column: train has only one tag{only} in column '{self.column}'; two are needed."

    def _log_scheme(self, train: Dataset, counts: Counter[int]) -> None:
        """Logs the tag scheme, unused tags, and the number of invalid transitions."""
        scheme, begin_tags, after_same_type, invalid = self.scheme, 0, 0, 0
        for tag_ids in self._read(train):
            if not isinstance(tag_ids, BadRow):
                invalid += scheme.count_invalid_transitions(tag_ids)
                row_counts = scheme.count_begin_tags(tag_ids)
                begin_tags, after_same_type = begin_tags + row_counts[0], after_same_type + row_counts[1]
        unused = [tag for tag_id, tag in enumerate(self.tags) if not counts[tag_id]]
        if unused:
            log(f"data: tags without training words, which the model does not learn: {shorten(unused)}")
        if scheme.scheme == "plain":
            rule = (
                "adjacent words with equal tags are one entity" if OUTSIDE in self.tags else "each word is one entity"
            )
            log(f"data: tags have no prefix (B-, I-); {rule}")
        elif scheme.scheme == "BIO" and invalid and begin_tags == after_same_type:
            log("data: tags are IOB1: entities start with I-, and with B- only after an entity of the same type")
        else:
            log(f"data: tags are {scheme.scheme}; {len(scheme.types)} entity types: {shorten(scheme.types)}")
            if invalid:
                log(
                    f"data: {invalid} training word(s) have I- (or M-, E-, L-) without an entity to continue; each "
                    "starts a new entity, as in conlleval and seqeval"
                )

    def _read(self, rows: Dataset) -> Iterator[list[int] | BadRow]:
        """Yields the tag indices of each row, or the reason why its tags are invalid."""
        if self.column not in rows.features:
            yield from [BadRow("no tags", self.column)] * len(rows)
            return
        names = getattr(getattr(rows.features[self.column], "feature", None), "names", None)
        ids: dict[Any, int] = {tag: tag_id for tag_id, tag in enumerate(self.tags)}
        ids = {number: ids[name] for number, name in enumerate(names) if name in ids} if names else ids
        numbers: dict[Any, int] = {number: number for number in range(len(self.tags))}
        words = arrow_column(rows, self.words).to_pylist() if self.words in rows.features else [[]] * len(rows)
        for text, value in zip(words, arrow_column(rows, self.column).to_pylist(), strict=True):
            tags: list[Any] = value.split() if isinstance(value, str) else value
            num_words = len(words_in(text)[1])
            if not tags or None in tags:
                yield BadRow("no tags", self.column)
                continue
            known = ids if names or isinstance(tags[0], str) else numbers
            unknown = [tag for tag in tags if tag not in known]
            if unknown:
                yield BadRow("unknown tag", self.column, str(unknown[0]))
            elif len(tags) != num_words:
                yield BadRow(f"unequal numbers of words and tags: {num_words} and {len(tags)}", self.column)
            else:
                yield [known[tag] for tag in tags]

    def numbered(self, rows: Dataset) -> Dataset:
        """Returns the rows with tags as indices of `tags`; rows without the tag column are returned unchanged.

        Raises:
            DataError: Rows have unknown tags, no tags, or another number of tags than words.
        """
        from datasets import List, Value

        if self.column not in rows.features:
            return rows
        tag_ids = list(self._read(rows))
        invalid = [(row, read) for row, read in enumerate(tag_ids) if isinstance(read, BadRow)]
        if invalid:
            problem = _invalid_rows_problem("the dataset", invalid)
            raise DataError(f"{problem} Tags of the model: {shorten(self.tags)}.")
        inner = getattr(rows.features[self.column], "feature", None)
        if inner == Value("int64"):
            return rows
        from datasets.fingerprint import Hasher

        key = Hasher.hash([rows._fingerprint, self.column, self.tags, "hftl tags 1"])
        features = rows.features.copy()
        features[self.column] = List(Value("int64"))

        def encode(row: dict[str, Any], index: int) -> dict[str, Any]:
            return {self.column: tag_ids[index]}

        return rows.map(encode, with_indices=True, features=features, new_fingerprint=key, desc="encode tags")

    def head(self, model_class: str) -> HeadSpec:
        """Returns a head with one output per tag."""
        return HeadSpec(model_class, len(self.tags), tuple(self.tags), None)

    def labels(self, examples: list[Example]) -> Tensor | None:
        """Returns the tag index of each word at its first token [B, W, T] int64, `IGNORED` elsewhere.

        Returns None if a row has no tags.
        """
        if any(example.get(self.column) is None for example in examples):
            return None
        windows, tokens = (max(sizes) for sizes in zip(*map(_size, examples), strict=True))
        labels = torch.full((len(examples), windows, tokens), IGNORED)
        for row, example in enumerate(examples):
            for (window, position), tag_id in zip(example[HOME], example[self.column], strict=True):
                if window >= 0:
                    labels[row, window, position] = tag_id
        return labels

    def loss(self, outputs: Outputs, labels: Tensor) -> Tensor:
        """Returns the mean cross entropy over the words of each example [B], in float32; 0 without words."""
        logits = outputs["logits"].float().flatten(1, 2).transpose(1, 2)
        labels = labels.flatten(1)
        losses = functional.cross_entropy(logits, labels, reduction="none", ignore_index=IGNORED)
        return losses.sum(1) / (labels != IGNORED).sum(1).clamp(min=1)

    @property
    def default_tag(self) -> int:
        """Tag index of words without tokens."""
        return self.tags.index(OUTSIDE) if OUTSIDE in self.tags else 0

    def metrics(self) -> list[Metric]:
        """Returns precision, recall and F1 of entities, and the accuracy of tags."""
        return [EntityMetrics(self.tags, partial(_predicted_tags, default_tag=self.default_tag))]

    def decode(self, outputs: Outputs, batch: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Returns words, their tags, the probability of each tag, and the entities with their position in the text.

        Lists of words are joined with spaces. With true tags, rows also have `label`.
        """
        rows = []
        predictions = zip(batch["texts"], batch["spans"], *_predict_tags(outputs, batch, self.default_tag), strict=True)
        for text, spans, tag_ids, scores in predictions:
            words, tags = [text[start:end] for start, end in spans], [self.tags[tag_id] for tag_id in tag_ids]
            entities = self._entities(text, spans, tag_ids, scores)
            rows.append({"words": words, "tags": tags, "scores": scores, "entities": entities})
        if "tags" in batch:
            rows = [
                row | {"label": [self.tags[tag_id] for tag_id in true]}
                for row, true in zip(rows, batch["tags"], strict=True)
            ]
        return rows

    def _entities(
        self, text: str, spans: Sequence[Sequence[int]], tag_ids: Sequence[int], scores: Sequence[float]
    ) -> list[dict[str, Any]]:
        entities = []
        for entity in self.scheme.entities(tag_ids):
            start, end = spans[entity.first][0], spans[entity.end - 1][1]
            word_scores = scores[entity.first : entity.end]
            entities.append(
                {
                    "type": entity.type,
                    "text": text[start:end],
                    "score": sum(word_scores) / len(word_scores),
                    "start": start,
                    "end": end,
                    "first_word": entity.first,
                    "end_word": entity.end,
                }
            )
        return entities

    def invalid_rows(self, splits: Splits) -> InvalidRows:
        """Returns the rows without tags, with another number of tags than words, or with tags missing from train."""
        read = {split: list(self._read(rows)) for split, rows in splits.items()}
        known = {tag_id for tag_ids in read["train"] if not isinstance(tag_ids, BadRow) for tag_id in tag_ids}
        return {
            split: {
                row: tag_ids if isinstance(tag_ids, BadRow) else self._missing_tag(tag_ids, known)
                for row, tag_ids in enumerate(rows)
                if isinstance(tag_ids, BadRow) or not known.issuperset(tag_ids)
            }
            for split, rows in read.items()
        }

    def _missing_tag(self, tag_ids: Sequence[int], known: set[int]) -> BadRow:
        first = next(tag_id for tag_id in tag_ids if tag_id not in known)
        return BadRow("tag missing from train", self.column, self.tags[first])

    def state(self) -> dict[str, Any]:
        """Returns the constructor's arguments."""
        return {"column": self.column, "tags": self.tags, "words": self.words}


def _predict_tags(
    outputs: Outputs, batch: Mapping[str, Any], default_tag: int
) -> tuple[list[list[int]], list[list[float]]]:
    """Returns the most probable tag of each word and its probability, as one list per row.

    Args:
        outputs: `logits` [B, W, T, K].
        batch: `positions` [B, N] of the first token of each word among W x T tokens, -1 for words without tokens;
            `spans` with one entry per word.
        default_tag: Tag index of words without tokens; their probability is 0.
    """
    positions = batch["positions"]
    probabilities = outputs["logits"].float().flatten(1, 2).softmax(-1)
    of_words = probabilities.gather(1, positions.clamp(min=0)[..., None].expand(-1, -1, probabilities.shape[-1]))
    scores, tag_ids = of_words.max(-1)
    scores, tag_ids = scores.masked_fill(positions < 0, 0.0), tag_ids.masked_fill(positions < 0, default_tag)
    counts = [len(spans) for spans in batch["spans"]]
    return (
        [row[:count] for row, count in zip(tag_ids.tolist(), counts, strict=True)],
        [row[:count] for row, count in zip(scores.tolist(), counts, strict=True)],
    )


def _predicted_tags(outputs: Outputs, batch: Mapping[str, Any], default_tag: int) -> list[list[int]]:
    return _predict_tags(outputs, batch, default_tag)[0]


def _size(example: Example) -> tuple[int, int]:
    """Returns the number of windows of an example and the number of tokens of the longest window."""
    windows = example["input_ids"]
    return len(windows), max(map(len, windows))


def _invalid_rows_problem(split: str, invalid: Sequence[tuple[int, BadRow]]) -> str:
    kinds = Counter(bad.kind for _, bad in invalid)
    counts = ", ".join(f"{count} x {kind}" for kind, count in kinds.items())
    first = [f"row {row}: {bad.reason}{f' {bad.value!r}' if bad.value else ''}" for row, bad in invalid[:5]]
    return f"data.source: {split} has {len(invalid)} row(s) with invalid tags ({counts}); {shorten(first, 5)}."
