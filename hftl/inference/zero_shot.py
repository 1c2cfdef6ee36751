"""Images against texts that training never saw: labels in words, or a query; for models with one space for both."""

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

_AT_ONCE = 64
"""Texts that go through the model at once."""


@dataclass(frozen=True)
class Texts:
    """Texts in the space of a model.

    Attributes:
        names: What each is called in the results.
        embeddings: Of length 1 [texts, D] float64.
        scale: What the model multiplies cosines by.
    """

    names: tuple[str, ...]
    embeddings: Any
    scale: float

    def probabilities(self, image: Sequence[float]) -> list[float]:
        """Returns the softmax over the texts of the scaled cosines with an image's embedding [D].

        The same for a model trained by SigLIP: its bias is equal for all texts, so it changes nothing.
        """
        logits = self.scale * (self.embeddings @ np.asarray(image, np.float64))
        shares = np.exp(logits - logits.max())
        return (shares / shares.sum()).tolist()


def prompts(labels: Sequence[str], template: str | None) -> list[str]:
    """Returns the text for each label: the label itself, or the template with it in place of `{}`.

    Raises:
        DataError: There are fewer than two labels, one occurs twice or is empty, or the template has no `{}`.
    """
    if template is not None and "{}" not in template:
        raise DataError(f"--template: '{template}' has no {{}}, where each label goes, such as 'a photo of a {{}}'.")
    if len(labels) < 2 or len(set(labels)) < len(labels) or not all(label.strip() for label in labels):
        raise DataError(f"--labels: give two different labels at least, none of them empty; there are {list(labels)}.")
    return [label if template is None else template.replace("{}", label) for label in labels]


def embed_texts(model: TaskModel, task: Task, texts: Sequence[str], names: Sequence[str], longest: int | None) -> Texts:
    """Returns texts in the space that the model has for images and texts.

    Args:
        model: In eval mode.
        task: The model's.
        texts: What is compared with images.
        names: What each is called.
        longest: `data.max_length` of the run that trained the model.

    Raises:
        DataError: The model has no such space.
    """
    import torch
    from accelerate.utils import send_to_device
    from datasets import Dataset

    if not getattr(task, "zero_shot", False):
        named = task.name.replace("_", " ")
        raise DataError(
            f"labels and queries are for models that compare images with texts (image text retrieval); this one is for "
            f"{named}."
        )
    column = next(name for name, kind in input_column_types(task).items() if kind == "text")
    rows = task.encode(Dataset.from_dict({column: list(texts)}), model.processor, None, longest)
    found = []
    with torch.no_grad():
        for start in range(0, len(rows), _AT_ONCE):
            examples = rows.fetch(list(range(start, min(start + _AT_ONCE, len(rows)))), 0)
            inputs: Any = send_to_device(task.collate(examples)["inputs"], next(model.parameters()).device)
            found.append({name: value.double().cpu().numpy() for name, value in model(inputs).items()})
    embeddings = np.concatenate([part["text_embeds"] for part in found])
    return Texts(tuple(names), embeddings, float(found[0]["logit_scale"][0]))


def images_alone(task: Task, rows: Dataset) -> Dataset:
    """Returns the images of some rows without what else the model could read.

    Raises:
        DataError: There are none.
    """
    column = next((name for name, kind in input_column_types(task).items() if kind == "image"), None)
    if column is None or column not in rows.column_names:
        raise DataError("labels and queries are compared with images; give images, not texts.")
    return rows.select_columns([column])


class Labelled:
    """Passes on rows with the nearest label of each image in place of its embedding."""

    def __init__(self, writer: Any, texts: Texts) -> None:
        self.writer, self.texts = writer, texts

    def write(self, rows: list[dict[str, Any]]) -> None:
        """Adds `prediction`, `confidence` and `probabilities`, in the order of the labels."""
        out = []
        for row in rows:
            shares = self.texts.probabilities(row["embedding"])
            best = int(np.argmax(shares))
            said = {"prediction": self.texts.names[best], "confidence": shares[best], "probabilities": shares}
            out.append({name: value for name, value in row.items() if name != "embedding"} | said)
        self.writer.write(out)

    def close(self) -> None:
        """Finishes the table."""
        self.writer.close()


class Ranked:
    """Passes on rows in the order of their images' cosine with one text, when all have come."""

    def __init__(self, writer: Any, texts: Texts) -> None:
        self.writer, self.texts = writer, texts
        self.rows: list[dict[str, Any]] = []

    def write(self, rows: list[dict[str, Any]]) -> None:
        """Takes the cosine of each image."""
        for row in rows:
            cosine = float(self.texts.embeddings[0] @ np.asarray(row["embedding"], np.float64))
            self.rows.append(
                {name: value for name, value in row.items() if name != "embedding"} | {"similarity": cosine}
            )

    def close(self) -> None:
        """Writes the rows, the nearest first."""
        self.writer.write(sorted(self.rows, key=lambda row: -row["similarity"]))
        self.writer.close()
