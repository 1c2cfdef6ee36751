"""Extractive question answering: answers are spans of a context."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hftl.data.splits import Splits
from hftl.loading.loader import Example, Examples
from hftl.preprocessing.sliding_windows import OFFSETS, stack
from hftl.tasks.targets.question_answering.span_search import allowed_tokens
from hftl.tasks.targets.question_answering.target import QuestionAnsweringTarget, answers_in
from hftl.tasks.task import Batch, Outputs, SupervisedTask
from hftl.tasks.windowed_inputs import PairInputs

_USAGE = """\
import torch, transformers

tokenizer = transformers.AutoTokenizer.from_pretrained("{place}")
model = transformers.AutoModelForQuestionAnswering.from_pretrained("{place}").eval()
question, context = "…", "…"
inputs = tokenizer(question, context, truncation="only_second", return_offsets_mapping=True, return_tensors="pt")
offsets = inputs.pop("offset_mapping")[0]
with torch.no_grad():
    outputs = model(**inputs)
outside = torch.tensor([sequence != 1 for sequence in inputs.sequence_ids(0)])  # tokens outside of the context
first, last = (x[0].masked_fill(outside, -torch.inf) for x in (outputs.start_logits, outputs.end_logits))
scores = first[:, None] + last[None]  # of spans with start <= end and at most 30 tokens
scores += torch.full_like(scores, -torch.inf).triu(30) + torch.full_like(scores, -torch.inf).tril(-1)
start, end = divmod(int(scores.argmax()), len(first))
print(context[offsets[start, 0] : offsets[end, 1]])"""


class QuestionAnswering(SupervisedTask):
    """Extractive question answering with any BERT-family model.

    Contexts longer than the model's maximum length are divided into overlapping windows, each with the full question;
    the prediction is the span with the highest score over all windows. The model predicts that a question has no
    answer only if the training data contain unanswerable questions.
    """

    name = "question_answering"
    model_class = "AutoModelForQuestionAnswering"
    primary_metrics = ("f1", "exact_match")
    usage = _USAGE
    inputs_type = PairInputs
    target_types = (QuestionAnsweringTarget,)
    inputs: PairInputs
    target: QuestionAnsweringTarget

    def __init__(self, splits: Splits) -> None:
        inputs = PairInputs.find(splits)
        context = inputs.columns[1] if len(inputs.columns) == 2 else ""
        super().__init__(
            inputs, QuestionAnsweringTarget.find(splits, context) if context else QuestionAnsweringTarget("", "")
        )

    @classmethod
    def make_target(cls, state: dict[str, Any]) -> QuestionAnsweringTarget:
        """See `SupervisedTask.make_target`."""
        return QuestionAnsweringTarget(**state)

    def encode(self, dataset: Any, processor: Any, seed: int | None, max_length: int | None) -> Examples:
        """See `Task.encode`."""
        self.target.check(dataset)
        return super().encode(dataset, processor, seed, max_length)

    def collate(self, examples: list[Example]) -> Batch:
        """See `Task.collate`; adds `contexts`, token `offsets` [B, W, T, 2], mask of `windows` [B, W] and `answers`."""
        batch = super().collate(examples)
        mask = batch["inputs"]["attention_mask"]
        batch |= {
            "contexts": [example[self.inputs.columns[1]] or "" for example in examples],
            "offsets": stack(examples, OFFSETS, -1).view(*mask.shape, 2),
            "windows": mask.any(-1),
        }
        if "labels" in batch:
            batch["answers"] = [[text for text, _ in answers_in(e[self.target.column]) or ()] for e in examples]
        return batch

    def loss(self, outputs: Outputs, batch: Batch) -> Tensor:
        """See `Task.loss`; the softmax covers context tokens and the first token of each window, without padding."""
        logits = outputs["logits"].float()
        logits = logits.masked_fill(~allowed_tokens(batch["offsets"])[..., None], torch.finfo(logits.dtype).min)
        return self.target.loss({"logits": logits}, batch["labels"])
