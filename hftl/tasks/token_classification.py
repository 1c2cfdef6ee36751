"""Token classification: one tag per word (named entities, parts of speech, chunks)."""

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
    """Token classification with any BERT-family model.

    The first token of a word predicts its tag, in training and inference. Texts longer than the model's maximum length
    are divided into overlapping windows; each word is predicted in the window where it has the most context.
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
        """See `Task.encode`; converts tags to the class indices of the model."""
        return super().encode(self.target.numbered(dataset), processor, seed, max_length)

    def collate(self, examples: list[Example]) -> Batch:
        """See `Task.collate`; adds `texts`, word `spans`, token `positions` of N words [B, N] and `tags`.

        Positions are indices of first tokens in the flattened windows [W * T], -1 for padding and for words without
        a token.
        """
        batch = super().collate(examples)
        window_size = batch["inputs"]["input_ids"].shape[2]
        positions = torch.full((len(examples), max(len(example[HOME]) for example in examples)), -1)
        for row, example in enumerate(examples):
            for word, (window, token) in enumerate(example[HOME]):
                if window >= 0:
                    positions[row, word] = window * window_size + token
        texts, spans = zip(*(words_in(example[self.inputs.column]) for example in examples), strict=True)
        batch |= {"positions": positions, "texts": list(texts), "spans": list(spans)}
        return batch | {"tags": [example[self.target.column] for example in examples]} if "labels" in batch else batch
