"""One tag for each word: named entities, parts of speech, chunks."""

from __future__ import annotations

from typing import Any

import torch

from hftl.data.splits import Splits
from hftl.loading.loader import Example, Examples
from hftl.preprocessing.sliding_windows import HOME, words_in
from hftl.tasks.targets.tagging.target import TaggingTarget
from hftl.tasks.task import Batch, SupervisedTask
from hftl.tasks.windowed_inputs import WordInputs


class TokenClassification(SupervisedTask):
    """Lists of words with a tag each, on any BERT-family model.

    A word is judged by its first token, in training as in use. A text longer than the model is read in windows that
    overlap, and each word counts in the one window where it has most context.
    """

    name = "token_classification"
    model_class = "AutoModelForTokenClassification"
    primary_metrics = ("f1", "precision", "recall", "macro_f1", "accuracy")
    defaults = {"full": {"lr": 3e-4, "head_lr": 1e-3, "num_epochs": 3}}
    inputs_type = WordInputs
    target_types = (TaggingTarget,)
    inputs: WordInputs
    target: TaggingTarget

    def __init__(self, splits: Splits) -> None:
        inputs = WordInputs.find(splits)
        super().__init__(inputs, TaggingTarget.find(splits, inputs.column))

    @classmethod
    def make_target(cls, state: dict[str, Any]) -> TaggingTarget:
        """See `SupervisedTask.make_target`."""
        return TaggingTarget(**state)

    def encode(self, dataset: Any, processor: Any, seed: int | None, max_length: int | None) -> Examples:
        """See `Task.encode`. Tags are turned into the model's numbers, whatever the data have."""
        return super().encode(self.target.numbered(dataset), processor, seed, max_length)

    def collate(self, examples: list[Example]) -> Batch:
        """Adds `texts`, the `spans` of their words, the `positions` [B, N] of these among the tokens, and `tags`."""
        batch = super().collate(examples)
        tokens = batch["inputs"]["input_ids"].shape[2]
        positions = torch.full((len(examples), max(len(example[HOME]) for example in examples)), -1)
        for row, example in enumerate(examples):
            for word, (window, place) in enumerate(example[HOME]):
                if window >= 0:
                    positions[row, word] = window * tokens + place
        texts, spans = zip(*(words_in(example[self.inputs.column]) for example in examples), strict=True)
        batch |= {"positions": positions, "texts": list(texts), "spans": list(spans)}
        return batch | {"tags": [example[self.target.column] for example in examples]} if "labels" in batch else batch
