"""Image-text retrieval: images and captions in one space, learnt from pairs."""

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

    Of a list of captions training draws one a row and epoch, and evaluation takes all: [B, W, T]. To a trained model a
    row may give an image or a text alone.

    Args:
        image: The image column.
        text: The column of captions, texts or lists of texts.
        match: A column of 1 and 0; rows with 0 are no pairs and not used. None: all are.
        max_pixels: Largest image that is decoded, width x height.
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
        """The image column and the text column."""
        return {self.image: "image", self.text: "text"}

    @property
    def optional(self) -> tuple[str, ...]:
        """Either column may be lacking when the model is used."""
        return self.image, self.text

    @property
    def key_columns(self) -> tuple[str, ...]:
        """Columns that tell one row from another in checks: an image may have many captions, a row each."""
        return (self.image,)

    @classmethod
    def find(cls, splits: Splits) -> CaptionedImages:
        """Detects the columns, reads the header of every image and looks for captions that are missing."""
        config, train = splits.config, splits["train"]
        found, problems = cls("image", "text", None, config.max_pixels), []
        try:
            image = find_column("image", train.features, config.image_column)
            found.image = image.name
            log(f"data: images from column '{image.name}' ({image.why})")
        except DataError as error:
            problems += error.problems
        try:
            text = find_captions(train.features, config.text_column)
            found.text, found.match = text.name, find_match(train, config.label_column)
            log(f"data: captions from column '{text.name}' ({text.why})")
        except DataError as error:
            problems += error.problems
        found.problems = problems or found._problems(splits)
        found.split_of = {matching(rows, found.match)._fingerprint: split for split, rows in splits.items()}
        return found

    def _problems(self, splits: Splits) -> list[str]:
        """Returns what is wrong with the rows, and says how many are pairs."""
        problems = []
        for split, rows in splits.items():
            pairs = matching(rows, self.match)
            if self.match is not None:
                log(f"data: {len(pairs)} of {len(rows)} {split} rows are pairs ('{self.match}' 1); others are not used")
            if len(pairs) < 2:
                problems.append(
                    f"data.source: {split} has {len(pairs)} pair(s) of image and caption; two are needed at least, "
                    "since each is compared with the others."
                )
            if splits.lenient:
                continue
            problems += unreadable_images(pairs, self.image, split, self.max_pixels)
            empty = without_caption(pairs, self.text)
            if empty:
                where = shorten([str(row) for row in empty], 8)
                problems.append(
                    f"data.source: {split} column '{self.text}' has {len(empty)} row(s) with an empty or missing "
                    f"caption, at pair {where}. Write them, or leave them out with --data.on_error skip."
                )
        return problems

    def encode(
        self, dataset: Dataset, processor: Any, seed: int | None, max_length: int | None, keep: Sequence[str]
    ) -> CaptionedRows:
        """Returns the pairs of a split; rows that `match` calls none are left out."""
        rows = matching(dataset, self.match)
        split = self.split_of.get(rows._fingerprint, "")
        columns = filled_columns(rows, self.column_types)
        self.tokenizer, self.limit = processor.tokenizer, token_limit(processor.tokenizer, max_length)
        image, text = (name if name in columns else None for name in self.column_types)
        return captioned_rows(rows.select_columns(columns), image, text, processor.image, seed, self.max_pixels, split)

    def collate(self, examples: list[Example]) -> dict[str, Tensor]:
        """Stacks images, and pads texts to the longest of the batch."""
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
            several = examples[0]["several"]
            inputs[name] = _by_row(tokens[name], counts) if several else tokens[name]
        return inputs

    def invalid_rows(self, splits: Splits) -> InvalidRows:
        """Returns the pairs without a caption, and those whose image cannot be decoded."""
        found: dict[str, dict[int, BadRow]] = {}
        for split, rows in splits.items():
            broken = broken_images(rows, self.image, split, self.max_pixels)
            empty = {row: BadRow("no text", self.text) for row in without_caption(rows, self.text)}
            found[split] = empty | broken
        return found

    def state(self) -> dict[str, Any]:
        """Returns the arguments."""
        return {"image": self.image, "text": self.text, "match": self.match, "max_pixels": self.max_pixels}


class MatchedPairs:
    """That image and caption of a row belong together, and others of a batch do not.

    Args:
        columns: The image column and the text column: a pair is known by what is in them.
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
        """Returns the target with the loss that `train.pair_loss` names, infonce by default."""
        wanted = splits.pair_loss
        found = cls(columns, "infonce" if wanted == "auto" else wanted)
        if found.pair_loss not in LOSSES:
            allowed = ", ".join(LOSSES)
            found.problems = [f"train.pair_loss: '{wanted}' is for texts with scores; images and texts: {allowed}."]
        return found

    def head(self, model_class: str) -> HeadSpec:
        """Returns two projections into one space."""
        return HeadSpec(model_class, 2, problem_type=None, options={"objective": self.pair_loss})

    def labels(self, examples: list[Example]) -> Tensor | None:
        """Returns what image and (first) caption of each pair are [B, 2] int64, or None where one is missing."""
        if any("image_key" not in example or "captions" not in example for example in examples):
            return None
        return torch.tensor([[content_id(row["image_key"]), content_id(row["captions"][0])] for row in examples])

    def loss(self, outputs: Outputs, labels: Tensor, weight: Tensor | None = None) -> Tensor:
        """Returns the loss of each pair [B]; of several captions the first one counts."""
        images, texts = outputs["image_embeds"], outputs["text_embeds"]
        texts = texts[:, 0] if texts.ndim == 3 else texts
        pairs = Pairs(images, texts, labels[:, 0], labels[:, 1], weight)
        scale = outputs["logit_scale"][0]
        if self.pair_loss == "siglip":
            return sigmoid_loss(pairs, scale, outputs["logit_bias"][0])
        return info_nce(pairs, scale)

    def metrics(self) -> list[Metric]:
        """Returns recall both ways."""
        return [ImageTextRecall()]

    def decode(self, outputs: Outputs, batch: Batch) -> list[dict[str, Any]]:
        """Returns the cosine of image and caption (a list, for a list of captions), or the embedding of one alone."""
        both = [outputs[name].double() for name in ("image_embeds", "text_embeds") if name in outputs]
        if len(both) == 1:
            return [{"embedding": row} for row in both[0].tolist()]
        images, texts = both
        if texts.ndim == 2:
            return [{"similarity": cosine} for cosine in (images * texts).sum(-1).tolist()]
        cosines = (images[:, None] * texts).sum(-1).tolist()
        return [{"similarities": row[:count]} for row, count in zip(cosines, batch["texts"].tolist(), strict=True)]

    def state(self) -> dict[str, Any]:
        """Returns the arguments."""
        return {"columns": self.columns, "pair_loss": self.pair_loss}


class ImageTextRetrieval(SupervisedTask):
    """Images and their captions, on any timm model beside any BERT-family model: a dual encoder.

    Rows hold an image and a caption, an image and a list of captions, or pairs of which a label says whether they
    belong together: then those with 1 are used.
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
    """Whether images can be compared with texts that training never saw (`hftl.inference.zero_shot`)."""
    inputs_type = CaptionedImages
    target_types = (MatchedPairs,)
    target: MatchedPairs

    def __init__(self, splits: Splits) -> None:
        inputs = CaptionedImages.find(splits)
        super().__init__(inputs, MatchedPairs.find(splits, list(inputs.column_types)))

    def collate(self, examples: list[Example]) -> Batch:
        """See `Task.collate`; `texts` [B] counts the captions of each row, where the data have lists of them."""
        batch = super().collate(examples)
        several = examples[0].get("several", False)
        return batch | ({"texts": torch.tensor([len(row["captions"]) for row in examples])} if several else {})

    def loss(self, outputs: Outputs, batch: Batch) -> Tensor:
        """See `Task.loss`; rows that count nothing are compared with none."""
        return self.target.loss(outputs, batch["labels"], batch.get("weight"))

    @classmethod
    def make_target(cls, state: dict[str, Any]) -> MatchedPairs:
        """See `SupervisedTask.make_target`."""
        return MatchedPairs(**state)


def _by_row(tokens: Tensor, counts: Sequence[int]) -> Tensor:
    """Returns the tokens [texts, T] of all rows as [B, W, T], zeros where a row has fewer than W texts."""
    out = tokens.new_zeros(len(counts), max(counts), tokens.shape[-1])
    for row, part in enumerate(tokens.split(list(counts))):
        out[row, : len(part)] = part
    return out
