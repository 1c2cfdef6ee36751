"""Entity metrics of token classification: an entity is correct if its type and both boundaries match (seqeval)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from hftl.tasks.targets.tagging.bio_tags import TagScheme

if TYPE_CHECKING:
    from torch import Tensor


class EntityMetrics:
    """Precision, recall and F1 of entities: micro average (`f1`), macro average (`macro_f1`), and per type.

    Definitions are those of seqeval in its default mode (https://github.com/chakki-works/seqeval) with
    `zero_division=0`. Macro averages skip types in neither tags nor predictions. Counts are integers.

    Args:
        tags: Tag names, in the order of the outputs.
        predicted: Function of outputs and batch that returns the tag indices of the words of each row.
    """

    smaller_is_better: tuple[str, ...] = ()

    def __init__(self, tags: Sequence[str], predicted: Any) -> None:
        self.scheme = TagScheme.from_tags(tags)
        self.predicted = predicted
        self.num_true: Counter[str] = Counter()
        self.num_predicted: Counter[str] = Counter()
        self.num_correct: Counter[str] = Counter()
        self.num_words = self.num_correct_words = 0

    def update(self, outputs: Mapping[str, Tensor], batch: Mapping[str, Any]) -> None:
        """Adds the rows of a batch; `batch["tags"]` has the true tag indices of each row."""
        for predicted, true in zip(self.predicted(outputs, batch), batch["tags"], strict=True):
            self.add(true, predicted)

    def add(self, true: Sequence[int], predicted: Sequence[int]) -> None:
        """Adds one row: true and predicted tag indices of its words."""
        true_entities, predicted_entities = self.scheme.entities(true), self.scheme.entities(predicted)
        self.num_true.update(entity.type for entity in true_entities)
        self.num_predicted.update(entity.type for entity in predicted_entities)
        self.num_correct.update(entity.type for entity in set(true_entities) & set(predicted_entities))
        self.num_words += len(true)
        self.num_correct_words += sum(a == b for a, b in zip(true, predicted, strict=True))

    def merge(self, other: EntityMetrics) -> None:
        """Adds the counts of another process."""
        self.num_true.update(other.num_true)
        self.num_predicted.update(other.num_predicted)
        self.num_correct.update(other.num_correct)
        self.num_words += other.num_words
        self.num_correct_words += other.num_correct_words

    def compute(self) -> dict[str, float]:
        """Returns `f1`, `precision`, `recall`, `macro_f1` and so on, `accuracy` of words, and `TYPE_f1` and so on.

        Values are 0 without entities, macro averages also without types.
        """
        types = self.scheme.types
        per_type = {
            name: _scores(self.num_correct[name], self.num_predicted[name], self.num_true[name]) for name in types
        }
        scores = _scores(self.num_correct.total(), self.num_predicted.total(), self.num_true.total())
        present = [per_type[name] for name in types if self.num_true[name] or self.num_predicted[name]]
        for metric in ("f1", "precision", "recall"):
            scores[f"macro_{metric}"] = sum(of_type[metric] for of_type in present) / len(present) if present else 0.0
        scores["accuracy"] = self.num_correct_words / self.num_words if self.num_words else 0.0
        return scores | {
            f"{name}_{metric}": of_type[metric] for name, of_type in per_type.items() for metric in of_type
        }


def _scores(correct: int, predicted: int, true: int) -> dict[str, float]:
    return {
        "f1": 2 * correct / (predicted + true) if predicted + true else 0.0,
        "precision": correct / predicted if predicted else 0.0,
        "recall": correct / true if true else 0.0,
    }
