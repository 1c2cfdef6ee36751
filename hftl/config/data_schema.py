"""The data section of a configuration."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

ProblemType = Literal["single_label_classification", "multi_label_classification", "regression"]
AnyProblem = Literal["auto", "single_label_classification", "multi_label_classification", "regression"]
PairLoss = Literal["auto", "cosine", "cosent", "infonce", "siglip"]
OnError = Literal["raise", "skip"]


@dataclass(frozen=True)
class AugmentConfig:
    """Random changes to training images. Size, normalisation and interpolation are the backbone's own (timm)."""

    crop_scale: float = 0.6
    """Smallest share of the image area that the random crop keeps, in (0, 1]; 1 switches the crop off."""
    hflip: float = 0.5
    """Probability of a horizontal flip. Set 0 where left and right matter (digits, letters)."""
    color_jitter: float = 0.2
    """Strength of brightness, contrast and saturation jitter, at least 0; 0 switches it off."""
    auto_augment: str | None = None
    """A timm policy such as `rand-m9-mstd0.5-inc1`; none by default."""

    @property
    def any(self) -> bool:
        """Whether anything is changed at random."""
        return self.crop_scale < 1 or self.hflip > 0 or self.color_jitter > 0 or self.auto_augment is not None


@dataclass(frozen=True)
class DataConfig:
    """Which rows, and which of their columns."""

    source: str = ""
    """Hub id, folder of class folders, CSV/Parquet/JSONL file or a folder of them, or `embedded:digits`."""
    subset: str | None = None
    """Configuration name of a hub data set that has several."""
    revision: str | None = None
    """Branch, tag or commit of a hub data set."""
    image_column: str | None = None
    """Column with images; found by itself when there is one candidate."""
    text_column: str | None = None
    """Column with texts; found by itself when there is one candidate."""
    text_pair_column: str | None = None
    """Column with the second text of a pair."""
    label_column: str | None = None
    """Column with labels: classes, lists of labels, or numbers; found by itself when there is one candidate."""
    label_columns: list[str] | None = None
    """Several columns with labels instead: zeros and ones for any number of labels a row, or numbers to predict."""
    label_separator: str | None = None
    """What stands between the labels of a row in a column of texts, e.g. `|`."""
    problem_type: AnyProblem = "auto"
    """What labels are. auto: texts and few whole numbers are classes, lists are any number of labels, numbers with
    fractions a regression; what was chosen is said, and why."""
    ignore_index: int | None = None
    """Value of pixels in masks that belong to no class; -1: there is none. By default 255, and classes named void."""
    text_template: str | None = None
    """How several text columns become one text, such as `{title}. {body}`; by default each after its name."""
    numeric_columns: list[str] | None = None
    """Columns with numbers that a model of images and texts takes too; by default all that are left, [] for none."""
    categorical_columns: list[str] | None = None
    """Likewise columns with categories: by default texts of which train has few different ones."""
    ignore_columns: list[str] = field(default_factory=list)
    """Columns that a model of images and texts does not read."""
    pair_loss: PairLoss = "auto"
    """What pairs teach. Scored texts: cosine (the score itself) or cosent (the order of scores). Pairs that belong
    together: infonce (each against the rest of the batch) or, for images and texts, siglip. auto: the first of each."""
    validation_fraction: float = 0.1
    """Share of train cut off, stratified by label, when there is no validation split; in [0, 1). 0: no validation."""
    train_per_class: int | None = None
    """Keep only this many training rows of each class (few-label experiments)."""
    seed: int = 0
    """Seed of the cuts above. Apart from `train.seed`, so that several training seeds see the same split."""
    max_length: int | None = None
    """Longest text in tokens, cut beyond; the tokenizer's own limit by default. Where words are tagged or answers
    looked for: tokens of a window, of which a longer text has several."""
    stride: int | None = None
    """Tokens that neighbouring windows of a long text share, at least; by default a quarter of a window."""
    max_answer_length: int = 30
    """Longest answer that is looked for in a context, in tokens."""
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    num_workers: int | None = None
    """Processes that prepare batches; by default 0 on CPU and for text, up to 8 for images on an accelerator."""
    worker_timeout: float = 300.0
    """Seconds without a batch after which such a process is taken for hung and the run ends; 0 waits for ever."""
    max_pixels: int = 64_000_000
    """Largest image, width x height, that is decoded; read from the header, before any memory is taken."""
    on_error: OnError = "raise"
    """Rows that cannot be used (image, text or label). raise: refuse the data. skip: look at every row first, leave
    the bad ones out and write them to quarantine.jsonl with the reason."""
    max_skipped: float = 0.05
    """Share of the rows of a split that may be left out before the data are refused all the same, in [0, 1]."""
