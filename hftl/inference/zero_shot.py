"""Zero-shot classification and text queries with image-text retrieval models (joint embedding space)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from hftl.errors import DataError
from hftl.models.task_model import TaskModel
from hftl.tasks.task import Task, input_column_types

if TYPE_CHECKING:
    from datasets import Dataset

_BATCH_SIZE = 64
"""Texts per batch."""


@dataclass(frozen=True)
class TextEmbeddings:
    """Embeddings of texts in the joint image-text space of a model.

    Attributes:
        names: Name of each text in the results.
        embeddings: L2-normalized embeddings [texts, D] float64.
        scale: Logit scale of the model (inverse temperature of cosine similarities).
    """

    names: tuple[str, ...]
    embeddings: Any
    scale: float

    def probabilities(self, image: Sequence[float]) -> list[float]:
        """Returns the softmax over texts of the scaled cosine similarities with an image embedding [D].

        Also valid for SigLIP models, whose bias is equal for all texts and cancels in the softmax.
        """
        logits = self.scale * (self.embeddings @ np.asarray(image, np.float64))
        exponentials = np.exp(logits - logits.max())
        return (exponentials / exponentials.sum()).tolist()


def prompts(labels: Sequence[str], template: str | None) -> list[str]:
    """Returns the prompt of each label: the label itself, or the template with `{}` replaced by the label.

    Raises:
        DataError: There are fewer than two labels, a duplicate or empty label, or the template lacks `{}`.
    """
    if template is not None and "{}" not in template:
        raise DataError(f"--template: '{template}' lacks {{}}. Pass a template such as 'a photo of a {{}}'.")
    if len(labels) < 2 or len(set(labels)) < len(labels) or not all(label.strip() for label in labels):
        raise DataError(f"--labels: {list(labels)} is invalid. Pass at least two distinct, non-empty labels.")
    return [label if template is None else template.replace("{}", label) for label in labels]


def embed_texts(
    model: TaskModel, task: Task, texts: Sequence[str], names: Sequence[str], max_length: int | None
) -> TextEmbeddings:
    """Returns text embeddings in the joint image-text space of a model.

    Args:
        model: Model in eval mode.
        task: Task of the model.
        texts: Texts to embed.
        names: Name of each text in the results.
        max_length: `data.max_length` of the training run, in tokens.

    Raises:
        DataError: The model has no joint image-text space.
    """
    import torch
    from accelerate.utils import send_to_device
    from datasets import Dataset

    if not getattr(task, "zero_shot", False):
        raise DataError(
            "predict: labels and queries need an image-text retrieval model; the task of this model is "
            f"{task.name.replace('_', ' ')}."
        )
    column = next(name for name, kind in input_column_types(task).items() if kind == "text")
    rows = task.encode(Dataset.from_dict({column: list(texts)}), model.processor, None, max_length)
    outputs = []
    with torch.no_grad():
        for start in range(0, len(rows), _BATCH_SIZE):
            examples = rows.fetch(list(range(start, min(start + _BATCH_SIZE, len(rows)))), 0)
            inputs: Any = send_to_device(task.collate(examples)["inputs"], next(model.parameters()).device)
            outputs.append({name: value.double().cpu().numpy() for name, value in model(inputs).items()})
    embeddings = np.concatenate([batch["text_embeds"] for batch in outputs])
    return TextEmbeddings(tuple(names), embeddings, float(outputs[0]["logit_scale"][0]))


def select_images(task: Task, rows: Dataset) -> Dataset:
    """Returns rows with the image column only.

    Raises:
        DataError: The rows or the task have no image column.
    """
    column = next((name for name, kind in input_column_types(task).items() if kind == "image"), None)
    if column is None or column not in rows.column_names:
        raise DataError("predict: labels and queries need images as input. Pass images, not texts.")
    return rows.select_columns([column])


class LabelWriter:
    """Writer that replaces image embeddings by the zero-shot prediction."""

    def __init__(self, writer: Any, texts: TextEmbeddings) -> None:
        self.writer, self.texts = writer, texts

    def write(self, rows: list[dict[str, Any]]) -> None:
        """Adds `prediction`, `confidence` and `probabilities` (in the order of the labels) to each row."""
        out = []
        for row in rows:
            probabilities = self.texts.probabilities(row["embedding"])
            best = int(np.argmax(probabilities))
            prediction = {
                "prediction": self.texts.names[best],
                "confidence": probabilities[best],
                "probabilities": probabilities,
            }
            out.append({name: value for name, value in row.items() if name != "embedding"} | prediction)
        self.writer.write(out)

    def close(self) -> None:
        """Closes the underlying writer."""
        self.writer.close()


class RankWriter:
    """Writer that ranks images by cosine similarity to one text."""

    def __init__(self, writer: Any, texts: TextEmbeddings) -> None:
        self.writer, self.texts = writer, texts
        self.rows: list[dict[str, Any]] = []

    def write(self, rows: list[dict[str, Any]]) -> None:
        """Collects rows and the cosine similarity of each image."""
        for row in rows:
            cosine = float(self.texts.embeddings[0] @ np.asarray(row["embedding"], np.float64))
            self.rows.append(
                {name: value for name, value in row.items() if name != "embedding"} | {"similarity": cosine}
            )

    def close(self) -> None:
        """Writes the collected rows by descending similarity, and closes the underlying writer."""
        self.writer.write(sorted(self.rows, key=lambda row: -row["similarity"]))
        self.writer.close()
