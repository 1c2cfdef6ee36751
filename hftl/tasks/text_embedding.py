"""Text embeddings trained on text pairs, with similarity scores or as positive pairs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor

from hftl.data.columns import filled_columns
from hftl.data.splits import Splits
from hftl.loading.loader import Example
from hftl.preprocessing.text_pairs import PAIR, TextPairRows
from hftl.preprocessing.tokenization import token_limit, tokenize
from hftl.tasks.inputs import TextInputs
from hftl.tasks.targets.embedding.target import PositivePairsTarget, ScoredPairsTarget, find_pair_target
from hftl.tasks.task import Batch, Outputs, SupervisedTask

if TYPE_CHECKING:
    from datasets import Dataset
    from typing_extensions import Self


class TextPairs(TextInputs):
    """Two texts per row, encoded separately -> `input_ids`, `attention_mask` [B, T], and `pair_…` for second texts.

    At inference a row may consist of the first text only.
    """

    tokenizer: Any = None

    @property
    def optional(self) -> tuple[str, ...]:
        """Columns that may be missing at inference: the second text."""
        return tuple(self.columns[1:])

    @classmethod
    def find(cls, splits: Splits) -> Self:
        """Detects both text columns, checks for empty texts and collects errors in `problems`."""
        inputs = super().find(splits)
        if len(inputs.columns) < 2 and not inputs.problems:
            columns = ", ".join(splits["train"].features)
            inputs.problems = [
                f"data.text_pair_column: text embedding needs text pairs, but no second text column was detected next "
                f"to '{inputs.columns[0]}'; columns: {columns}. Set data.text_pair_column."
            ]
        return inputs

    def encode(
        self, dataset: Dataset, processor: Any, seed: int | None, max_length: int | None, keep: Sequence[str]
    ) -> TextPairRows:
        """Returns tokenized rows; tokenization is deterministic, so `seed` is ignored."""
        self.tokenizer = processor
        limit = token_limit(processor, max_length)
        first, second = self.columns
        rows = tokenize(dataset, processor, [first], limit, keep)
        has_pairs = second in filled_columns(dataset, self.columns)
        return TextPairRows(rows, tokenize(dataset, processor, [second], limit, ()) if has_pairs else None)

    def collate(self, examples: list[Example]) -> dict[str, Tensor]:
        """Pads first and second texts separately, each to the longest of the batch."""
        inputs: dict[str, Tensor] = {}
        for prefix in ("", PAIR) if PAIR + "input_ids" in examples[0] else ("",):
            ids = {"input_ids": [example[prefix + "input_ids"] for example in examples]}
            padded = self.tokenizer.pad(ids, return_tensors="pt")
            inputs |= {prefix + name: padded[name] for name in ("input_ids", "attention_mask")}
        return inputs


class TextEmbedding(SupervisedTask):
    """Text embedding with any BERT-family model; similar texts have similar embeddings.

    The data determine the target: similarity scores of pairs, or positive pairs.
    """

    name = "text_embedding"
    model_class = "SentenceTransformer"
    pipeline_tag = "sentence-similarity"
    primary_metrics = ("spearman", "pearson", "recall_at_1", "mrr")
    defaults: ClassVar[Mapping[str, Mapping[str, float]]] = {
        "full": {"lr": 2e-5, "head_lr": 2e-5, "num_epochs": 2},
        "lora": {"lr": 1e-3, "head_lr": 1e-3, "num_epochs": 4},
    }
    usage = """
from sentence_transformers import SentenceTransformer

model = SentenceTransformer("{place}")
embeddings = model.encode(["A dog runs.", "An animal is moving."])
print(model.similarity(embeddings, embeddings))"""
    inputs_type = TextPairs
    target_types = (ScoredPairsTarget, PositivePairsTarget)
    target: ScoredPairsTarget | PositivePairsTarget

    def __init__(self, splits: Splits) -> None:
        inputs = TextPairs.find(splits)
        super().__init__(inputs, find_pair_target(splits, inputs.columns))

    def loss(self, outputs: Outputs, batch: Batch) -> Tensor:
        """See `Task.loss`; padding rows (weight 0) are not used as negatives."""
        return self.target.loss(outputs, batch["labels"], batch.get("weight"))

    @classmethod
    def make_target(cls, state: dict[str, Any]) -> ScoredPairsTarget | PositivePairsTarget:
        """See `SupervisedTask.make_target`."""
        return ScoredPairsTarget(**state) if "low" in state else PositivePairsTarget(**state)
