"""Text embeddings: learnt from pairs of texts, with a score of how alike they are or without one."""

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
    """Two texts a row, each by itself -> `input_ids`, `attention_mask` [B, T], and `pair_…` of second texts.

    To a trained model a row may give its first text alone.
    """

    tokenizer: Any = None

    @property
    def optional(self) -> tuple[str, ...]:
        """The second text, which a row may lack when the model is used."""
        return tuple(self.columns[1:])

    @classmethod
    def find(cls, splits: Splits) -> Self:
        """Detects both text columns and looks for empty texts; what is wrong goes into `problems`."""
        found = super().find(splits)
        if len(found.columns) < 2 and not found.problems:
            columns = ", ".join(splits["train"].features)
            found.problems = [
                f"data.text_pair_column: embeddings are learnt from pairs of texts, and beside '{found.columns[0]}' no "
                f"second column was found. Columns: {columns}. Say --data.text_pair_column NAME."
            ]
        return found

    def encode(
        self, dataset: Dataset, processor: Any, seed: int | None, max_length: int | None, keep: Sequence[str]
    ) -> TextPairRows:
        """Returns rows of token ids. Nothing is random here, so `seed` does not apply."""
        self.tokenizer = processor
        limit = token_limit(processor, max_length)
        first, second = self.columns
        rows = tokenize(dataset, processor, [first], limit, keep)
        alone = second not in filled_columns(dataset, self.columns)
        return TextPairRows(rows, None if alone else tokenize(dataset, processor, [second], limit, ()))

    def collate(self, examples: list[Example]) -> dict[str, Tensor]:
        """Pads each side to its longest text."""
        inputs: dict[str, Tensor] = {}
        for prefix in ("", PAIR) if PAIR + "input_ids" in examples[0] else ("",):
            ids = {"input_ids": [example[prefix + "input_ids"] for example in examples]}
            padded = self.tokenizer.pad(ids, return_tensors="pt")
            inputs |= {prefix + name: padded[name] for name in ("input_ids", "attention_mask")}
        return inputs


class TextEmbedding(SupervisedTask):
    """Pairs of texts, on any BERT-family model: texts that belong together come to lie near each other.

    What is learnt follows from the data: scores (how alike a pair is), or pairs that belong together.
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
        """See `Task.loss`; rows that count nothing are compared with none."""
        return self.target.loss(outputs, batch["labels"], batch.get("weight"))

    @classmethod
    def make_target(cls, state: dict[str, Any]) -> ScoredPairsTarget | PositivePairsTarget:
        """See `SupervisedTask.make_target`."""
        return ScoredPairsTarget(**state) if "low" in state else PositivePairsTarget(**state)
