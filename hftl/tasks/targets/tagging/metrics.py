"""Entities found in tagged words, as seqeval counts them: an entity is right when its type and both of its ends are."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from hftl.tasks.targets.tagging.bio_tags import TagReader

if TYPE_CHECKING:
    from torch import Tensor


class EntityMetrics:
    """Precision, recall and F1 of entities over all types (`f1`), as the mean of types (`macro_f1`), and of each type.

    As seqeval in its default mode (https://github.com/chakki-works/seqeval) with `zero_division=0`: types that neither
    the tags nor the predictions hold are left out of macro averages. Counts are integers.

    Args:
        tags: Names of the tags, in the order of the outputs.
        predicted: Outputs and batch -> the number of each word's tag, a list for each row.
    """

    smaller_is_better: tuple[str, ...] = ()

    def __init__(self, tags: Sequence[str], predicted: Any) -> None:
        self.reader = TagReader.of(tags)
        self.predicted = predicted
        self.true: Counter[str] = Counter()
        self.said: Counter[str] = Counter()
        self.right: Counter[str] = Counter()
        self.words = self.words_right = 0

    def update(self, outputs: Mapping[str, Tensor], batch: Mapping[str, Any]) -> None:
        """Adds the rows of a batch; `batch["tags"]` has the true numbers, a list for each row."""
        for found, true in zip(self.predicted(outputs, batch), batch["tags"], strict=True):
            self.add(true, found)

    def add(self, true: Sequence[int], said: Sequence[int]) -> None:
        """Adds one row: the numbers of the true and of the predicted tags of its words."""
        entities, guesses = self.reader.entities(true), self.reader.entities(said)
        self.true.update(entity.kind for entity in entities)
        self.said.update(entity.kind for entity in guesses)
        self.right.update(entity.kind for entity in set(entities) & set(guesses))
        self.words += len(true)
        self.words_right += sum(a == b for a, b in zip(true, said, strict=True))

    def merge(self, other: EntityMetrics) -> None:
        """Adds the counts of another process."""
        for mine, theirs in ((self.true, other.true), (self.said, other.said), (self.right, other.right)):
            mine.update(theirs)
        self.words += other.words
        self.words_right += other.words_right

    def compute(self) -> dict[str, float]:
        """Returns `f1`, `precision`, `recall`, the same with `macro_`, `accuracy` of words, and `TYPE_f1` of each type.

        Without entities, or without any type to average over, they are 0.
        """
        scores = {kind: _scores(self.right[kind], self.said[kind], self.true[kind]) for kind in self.reader.kinds}
        out = _scores(self.right.total(), self.said.total(), self.true.total())
        seen = [scores[kind] for kind in self.reader.kinds if self.true[kind] or self.said[kind]]
        for name in ("f1", "precision", "recall"):
            out[f"macro_{name}"] = sum(each[name] for each in seen) / len(seen) if seen else 0.0
        out["accuracy"] = self.words_right / self.words if self.words else 0.0
        return out | {f"{kind}_{name}": each[name] for kind, each in scores.items() for name in each}


def _scores(right: int, said: int, true: int) -> dict[str, float]:
    return {
        "f1": 2 * right / (said + true) if said + true else 0.0,
        "precision": right / said if said else 0.0,
        "recall": right / true if true else 0.0,
    }
