"""Image-text retrieval: a joint embedding space of images and captions, trained on pairs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from hftl.config.schema import DataConfig
from hftl.data.columns import filled_columns, find_column
from hftl.data.splits import Splits
from hftl.data.validation import BadRow, InvalidRows
from hftl.errors import DataError, shorten
from hftl.loading.loader import Example
from hftl.logging import log
from hftl.models.task_model import HeadSpec
from hftl.preprocessing.captions import (
    CaptionedRows,
    captioned_rows,
    find_captions,
    find_match,
    matching,
    without_caption,
)
from hftl.preprocessing.image_transforms import broken_images, unreadable_images
from hftl.preprocessing.multimodal import VECTORS
from hftl.preprocessing.tokenization import token_limit
from hftl.tasks.capabilities import TargetInfo
from hftl.tasks.metrics import Metric
from hftl.tasks.targets.embedding.contrastive_losses import Pairs, content_id, info_nce, sigmoid_loss
from hftl.tasks.targets.embedding.metrics import ImageTextRecall
from hftl.tasks.task import Batch, Outputs, SupervisedTask

if TYPE_CHECKING:
    from datasets import Dataset

LOSSES = ("infonce", "siglip")


class CaptionedImages:
    """An image and its captions -> `pixel_values` [B, C, H, W], `input_ids` and `attention_mask` [B, T].

    For lists of captions, training samples one caption per row and epoch, and evaluation uses all of them: tokens are
    [B, W, T] for up to W captions. At inference a row may consist of an image or a text only.

    Args:
        image: Image column.
        text: Caption column: texts or lists of texts.
        match: Column of 0 and 1; rows with 0 are excluded. None: all rows are pairs.
        max_pixels: Maximum width x height of decoded images.
    """

    modality = "image_text"

    def __init__(self, image: str, text: str, match: str | None, max_pixels: int = DataConfig.max_pixels) -> None:
        self.image, self.text, self.match = image, text, match
        self.max_pixels = max_pixels
        self.problems: list[str] = []
        self.split_of: dict[str, str] = {}
        self.tokenizer: Any = None
        self.limit = 0

    @property
    def column_types(self) -> dict[str, str]:
        """See `Inputs.column_types`."""
        return {self.image: "image", self.text: "text"}

    @property
    def optional(self) -> tuple[str, ...]:
        """Columns that may be missing at inference."""
        return self.image, self.text

    @property
    def key_columns(self) -> tuple[str, ...]:
        """Columns that identify an example in data checks; several rows may have the same image."""
        return (self.image,)

    @classmethod
    def find(cls, splits: Splits) -> CaptionedImages:
        """Detects the columns, checks image headers and captions, and collects errors in `problems`."""
        config, train = splits.config, splits["train"]
        inputs, problems = cls("image", "text", None, config.max_pixels), []
        try:
            image = find_column("image", train.features, config.image_column)
            inputs.image = image.name
            log(f"data: images from column '{image.name}' ({image.why})")
        except DataError as error:
            problems += error.problems
        try:
            text = find_captions(train.features, config.text_column)
            inputs.text, inputs.match = text.name, find_match(train, config.label_column)
            log(f"data: captions from column '{text.name}' ({text.why})")
        except DataError as error:
            problems += error.problems
        inputs.problems = problems or inputs._row_problems(splits)
        inputs.split_of = {matching(rows, inputs.match)._fingerprint: split for split, rows in splits.items()}
        return inputs

    def _row_problems(self, splits: Splits) -> list[str]:
        """Logs the number of pairs per split and returns one error message per problem."""
        problems = []
        for split, rows in splits.items():
            pairs = matching(rows, self.match)
            if self.match is not None:
                log(f"data: {len(pairs)} of {len(rows)} {split} rows are pairs ('{self.match}' is 1), others excluded")
            if len(pairs) < 2:
                problems.append(
                    f"data.source: {split} has {len(pairs)} pair(s) of image and caption; contrastive training and "
                    "evaluation need at least 2. Add pairs."
                )
            if splits.lenient:
                continue
            problems += unreadable_images(pairs, self.image, split, self.max_pixels)
            empty = without_caption(pairs, self.text)
            if empty:
                where = shorten([str(row) for row in empty], 8)
                problems.append(
                    f"data.source: {split} column '{self.text}' has {len(empty)} row(s) with an empty or missing "
                    f"caption, at pair {where}. Set data.on_error skip to exclude them."
                )
        return problems

    def encode(
        self, dataset: Dataset, processor: Any, seed: int | None, max_length: int | None, keep: Sequence[str]
    ) -> CaptionedRows:
        """Returns the pairs of a split; rows that are not pairs by column `match` are excluded."""
        rows = matching(dataset, self.match)
        split = self.split_of.get(rows._fingerprint, "")
        columns = filled_columns(rows, self.column_types)
        self.tokenizer, self.limit = processor.tokenizer, token_limit(processor.tokenizer, max_length)
        image, text = (name if name in columns else None for name in self.column_types)
        return captioned_rows(rows.select_columns(columns), image, text, processor.image, seed, self.max_pixels, split)

    def collate(self, examples: list[Example]) -> dict[str, Tensor]:
        """Stacks images and pads texts to the longest of the batch."""
        if VECTORS in examples[0]:
            return {VECTORS: torch.stack([torch.tensor(example[VECTORS]) for example in examples])}
        inputs: dict[str, Tensor] = {}
        if "pixel_values" in examples[0]:
            inputs["pixel_values"] = torch.stack([example["pixel_values"] for example in examples])
        if "captions" not in examples[0]:
            return inputs
        counts = [len(example["captions"]) for example in examples]
        texts = [text for example in examples for text in example["captions"]]
        tokens = self.tokenizer(texts, padding=True, truncation=True, max_length=self.limit, return_tensors="pt")
        for name in ("input_ids", "attention_mask"):
            inputs[name] = _group_by_row(tokens[name], counts) if examples[0]["several"] else tokens[name]
        return inputs

    def invalid_rows(self, splits: Splits) -> InvalidRows:
        """Returns the rows without a caption, and those with an unreadable image."""
        invalid: dict[str, dict[int, BadRow]] = {}
        for split, rows in splits.items():
            broken = broken_images(rows, self.image, split, self.max_pixels)
            empty = {row: BadRow("no text", self.text) for row in without_caption(rows, self.text)}
            invalid[split] = empty | broken
        return invalid

    def state(self) -> dict[str, Any]:
        """Returns the constructor's arguments."""
        return {"image": self.image, "text": self.text, "match": self.match, "max_pixels": self.max_pixels}


class MatchedPairs:
    """Contrastive target: image and caption of a row are a positive pair, all other pairs of a batch are negatives.

    Args:
        columns: Image column and text column; their contents identify equal images and captions.
        pair_loss: `infonce` or `siglip`.
    """

    best_metric = "mean_recall"
    info = TargetInfo("captions")
    depends_on_batch = True

    def __init__(self, columns: Sequence[str], pair_loss: str) -> None:
        self.columns = list(columns)
        self.pair_loss = pair_loss
        self.problems: list[str] = []

    @classmethod
    def find(cls, splits: Splits, columns: Sequence[str]) -> MatchedPairs:
        """Returns the target with the loss of `train.pair_loss`; `auto` selects infonce."""
        target = cls(columns, "infonce" if splits.pair_loss == "auto" else splits.pair_loss)
        if target.pair_loss not in LOSSES:
            target.problems = [
                f"train.pair_loss: '{splits.pair_loss}' is invalid for image-text pairs; allowed: {', '.join(LOSSES)}."
            ]
        return target

    def head(self, model_class: str) -> HeadSpec:
        """Returns the specification of one projection per encoder."""
        return HeadSpec(model_class, 2, problem_type=None, options={"objective": self.pair_loss})

    def labels(self, examples: list[Example]) -> Tensor | None:
        """Returns ids of the contents of image and first caption per pair [B, 2] int64; None if one is missing."""
        if any("image_key" not in example or "captions" not in example for example in examples):
            return None
        return torch.tensor([[content_id(row["image_key"]), content_id(row["captions"][0])] for row in examples])

    def loss(self, outputs: Outputs, labels: Tensor, weight: Tensor | None = None) -> Tensor:
        """Returns the loss per pair [B]; with several captions per image, that of the first one.

        Args:
            outputs: `image_embeds` [B, D], `text_embeds` [B, D] or [B, W, D], `logit_scale`; siglip: `logit_bias`.
            labels: Content ids of images and captions [B, 2]; pairs with equal contents are not negatives.
            weight: Weight of each pair [B]; pairs of weight 0 are padding and not used as negatives.
        """
        images, texts = outputs["image_embeds"], outputs["text_embeds"]
        texts = texts[:, 0] if texts.ndim == 3 else texts
        pairs = Pairs(images, texts, labels[:, 0], labels[:, 1], weight)
        scale = outputs["logit_scale"][0]
        if self.pair_loss == "siglip":
            return sigmoid_loss(pairs, scale, outputs["logit_bias"][0])
        return info_nce(pairs, scale)

    def metrics(self) -> list[Metric]:
        """Returns recall in both directions."""
        return [ImageTextRecall()]

    def decode(self, outputs: Outputs, batch: Batch) -> list[dict[str, Any]]:
        """Returns the cosine similarity of image and caption (a list per list of captions), or a single embedding."""
        embeddings = [outputs[name].double() for name in ("image_embeds", "text_embeds") if name in outputs]
        if len(embeddings) == 1:
            return [{"embedding": row} for row in embeddings[0].tolist()]
        images, texts = embeddings
        if texts.ndim == 2:
            return [{"similarity": cosine} for cosine in (images * texts).sum(-1).tolist()]
        cosines = (images[:, None] * texts).sum(-1).tolist()
        return [{"similarities": row[:count]} for row, count in zip(cosines, batch["texts"].tolist(), strict=True)]

    def state(self) -> dict[str, Any]:
        """Returns the constructor's arguments."""
        return {"columns": self.columns, "pair_loss": self.pair_loss}


class ImageTextRetrieval(SupervisedTask):
    """Dual encoder of any timm model and any BERT-family model, trained on images with captions.

    Rows contain an image with a caption, an image with a list of captions, or a pair with a label; of labeled pairs
    only those with label 1 are used.
    """

    name = "image_text_retrieval"
    model_class = "ImageTextDualEncoder"
    pipeline_tag = "zero-shot-image-classification"
    primary_metrics = ("mean_recall", "recall_at_5_image_to_text", "recall_at_5_text_to_image")
    defaults: ClassVar[Mapping[str, Mapping[str, float]]] = {
        "full": {"lr": 5e-5, "head_lr": 1e-3, "num_epochs": 8},
        "frozen": {"lr": 0.0, "head_lr": 1e-3, "num_epochs": 5},
        "lora": {"lr": 5e-4, "head_lr": 1e-3, "num_epochs": 8},
        "scratch": {"lr": 1e-3, "head_lr": 1e-3, "num_epochs": 8},
    }
    usage = """
import torch
from PIL import Image
from transformers import AutoModel, AutoProcessor

model = AutoModel.from_pretrained("{place}", trust_remote_code=True).eval()
processor = AutoProcessor.from_pretrained("{place}", trust_remote_code=True)
inputs = processor(images=[Image.open("photo.jpg")])
texts = processor(text=["a photo of a dog", "a photo of a cat"])
with torch.no_grad():
    image = model.get_image_features(inputs["pixel_values"])
    text = model.get_text_features(texts["input_ids"], texts["attention_mask"])
    print((model(**texts).logit_scale * image @ text.T).softmax(-1))"""
    zero_shot = True
    """Whether images can be classified by texts that are not in the training data (`hftl.inference.zero_shot`)."""
    inputs_type = CaptionedImages
    target_types = (MatchedPairs,)
    target: MatchedPairs

    def __init__(self, splits: Splits) -> None:
        inputs = CaptionedImages.find(splits)
        super().__init__(inputs, MatchedPairs.find(splits, list(inputs.column_types)))

    def collate(self, examples: list[Example]) -> Batch:
        """See `Task.collate`; adds `texts`, the number of captions per row [B], if rows have lists of captions."""
        batch = super().collate(examples)
        has_lists = examples[0].get("several", False)
        return batch | ({"texts": torch.tensor([len(row["captions"]) for row in examples])} if has_lists else {})

    def loss(self, outputs: Outputs, batch: Batch) -> Tensor:
        """See `Task.loss`; padding rows (weight 0) are not used as negatives."""
        return self.target.loss(outputs, batch["labels"], batch.get("weight"))

    @classmethod
    def make_target(cls, state: dict[str, Any]) -> MatchedPairs:
        """See `SupervisedTask.make_target`."""
        return MatchedPairs(**state)


def _group_by_row(tokens: Tensor, counts: Sequence[int]) -> Tensor:
    """Returns the tokens [texts, T] of all rows as [B, W, T], padded with zeros for rows with fewer than W texts."""
    grouped = tokens.new_zeros(len(counts), max(counts), tokens.shape[-1])
    for row, row_tokens in enumerate(tokens.split(list(counts))):
        grouped[row, : len(row_tokens)] = row_tokens
    return grouped
