"""Run configuration.

Names are equal in Python, YAML and on the command line: `run.adapt.lora.r` is `adapt: {lora: {r: 8}}` in YAML
and `--adapt.lora.r 8` as a flag.

Processes, devices and precision are set in `accelerate_config.yaml` and by the launcher.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any, Literal

Pooling = Literal["auto", "default", "cls", "mean"]
Method = Literal["full", "frozen", "lora", "probe"]
EncoderMethod = Literal["full", "frozen", "lora"]
ProbeClassifier = Literal["logistic", "linear_svm", "svm", "random_forest", "knn", "ridge", "lda"]
Fusion = Literal["concat", "gated", "cross_attention"]
SchedulerType = Literal["linear", "cosine", "constant"]
BatchNorm = Literal["auto", "frozen", "train"]
OnNonfinite = Literal["stop", "skip"]
OnOutOfMemory = Literal["halve", "raise"]
Resume = Literal["never", "auto"]
ProblemType = Literal["single_label_classification", "multi_label_classification", "regression"]
AnyProblem = Literal["auto", "single_label_classification", "multi_label_classification", "regression"]
PairLoss = Literal["auto", "cosine", "cosent", "infonce", "siglip"]
OnError = Literal["raise", "skip"]


@dataclass(frozen=True)
class AugmentConfig:
    """Augmentation of training images. The backbone (timm) defines size, normalization and interpolation."""

    crop_scale: float = 0.6
    """Smallest fraction of the image area in a random resized crop, in (0, 1]; 1 disables the crop."""
    hflip: float = 0.5
    """Probability of a horizontal flip, in [0, 1]. Set 0 for images with a direction (digits, letters)."""
    color_jitter: float = 0.2
    """Strength of brightness, contrast and saturation jitter, at least 0; 0 disables it."""
    auto_augment: str | None = None
    """timm policy such as `rand-m9-mstd0.5-inc1`; default: none."""

    @property
    def any(self) -> bool:
        """Whether any random augmentation is enabled."""
        return self.crop_scale < 1 or self.hflip > 0 or self.color_jitter > 0 or self.auto_augment is not None


@dataclass(frozen=True)
class DataConfig:
    """Dataset, columns and splits."""

    source: str = ""
    """Hub repo id, folder of class folders, CSV/Parquet/JSONL file or a folder of them, or `embedded:digits`."""
    subset: str | None = None
    """Configuration name of a Hub dataset with several configurations."""
    revision: str | None = None
    """Branch, tag or commit of a Hub dataset."""
    image_column: str | None = None
    """Image column; detected automatically if there is one candidate."""
    text_column: str | None = None
    """Text column; detected automatically if there is one candidate."""
    text_pair_column: str | None = None
    """Column with the second text of a pair of texts."""
    label_column: str | None = None
    """Label column: classes, lists of labels, or numbers; detected automatically if there is one candidate."""
    label_columns: list[str] | None = None
    """Several label columns instead of one: 0 and 1 for multi-label classification, or regression targets."""
    label_separator: str | None = None
    """Separator of the labels in a column of strings (multi-label classification), such as `|`."""
    problem_type: AnyProblem = "auto"
    """Type of the labels. auto: strings and few distinct integers are classes, lists are multi-label, fractional
    numbers are regression targets; the choice is logged."""
    ignore_index: int | None = None
    """Mask value of pixels without a class; -1: none. Default: 255 and classes named void."""
    text_template: str | None = None
    """Template that joins several text columns, such as `{title}. {body}`; default: each column after its name."""
    numeric_columns: list[str] | None = None
    """Numeric columns in addition to images and texts; default: all remaining ones; []: none."""
    categorical_columns: list[str] | None = None
    """Categorical columns in addition to images and texts; default: strings with few distinct values in train."""
    ignore_columns: list[str] = field(default_factory=list)
    """Columns that models of images and texts ignore."""
    validation_fraction: float = 0.1
    """Fraction of train split off for validation if the data have no validation split, in [0, 1); stratified by
    label. 0: no validation."""
    max_train_samples_per_class: int | None = None
    """Maximum training rows per class (few-shot experiments)."""
    seed: int = 0
    """Seed of the splits above. Independent of `train.seed`: all training seeds use the same split."""
    max_length: int | None = None
    """Maximum tokens per text; longer texts are truncated. Default: the limit of the tokenizer. For token
    classification and question answering: tokens per window; longer texts are split into overlapping windows."""
    stride: int | None = None
    """Minimum tokens that adjacent windows of a long text share; default: a quarter of a window."""
    max_answer_length: int = 30
    """Maximum tokens of a predicted answer (question answering)."""
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    num_workers: int | None = None
    """Data loader workers per process; default: 0 on CPU and for text, up to 8 for images on an accelerator."""
    worker_timeout: float = 300.0
    """Seconds without a batch after which a worker counts as hung and the run stops; 0: no limit."""
    max_pixels: int = 64_000_000
    """Maximum image size in pixels (width x height); read from the image header, before memory is allocated."""
    on_error: OnError = "raise"
    """Invalid rows (image, text or label). raise: stop with an error. skip: validate all rows first, skip the invalid
    ones and write them to quarantine.jsonl with the reason."""
    max_skipped_fraction: float = 0.05
    """Maximum fraction of skipped rows per split, in [0, 1]; more raise an error."""


@dataclass(frozen=True)
class DetectorConfig:
    """RT-DETR neck and decoder on a timm backbone (object detection). Detector checkpoints have their own."""

    d_model: int = 128
    """Channels of neck and decoder; a multiple of 32."""
    num_feature_levels: int = 2
    """Number of backbone feature maps, 1 to 3: stride 32, then 16, then 8. Each adds smaller objects and four times
    as many spatial positions."""
    decoder_layers: int = 2
    """Decoder layers that refine the proposals, at least 1."""
    num_queries: int = 100
    """Maximum detected objects per image; at most (height / stride) x (width / stride), summed over the levels."""


@dataclass(frozen=True)
class ModelConfig:
    """Pretrained model."""

    name: str = ""
    """timm name, `hf-hub:` repo id, `local-dir:` folder or `embedded:` name (vision); Hub repo id or folder (text)."""
    pretrained: bool = True
    """Load pretrained weights. False: the same architecture with random weights (baseline of transfer learning)."""
    pooling: Pooling = "auto"
    """Pooling of text features. auto: `1_Pooling` of the checkpoint, else default (the transformers class)."""
    revision: str | None = None
    """Branch, tag or commit of a text checkpoint on the Hub."""
    image_size: int | list[int] | None = None
    """Side of the square input in pixels, or [height, width]; default: that of the backbone."""
    decoder_channels: int = 64
    """Channels of the segmentation decoder; its compute grows quadratically with them."""
    dropout: float | None = None
    """Dropout probability in the whole model, in [0, 1); default: that of the checkpoint."""
    trust_remote_code: bool = False
    """Run code of the Hub repository. Requires `revision` as a full commit hash, so that the code cannot change."""
    text_name: str = ""
    """Text encoder of image-text models, a Hub repo id or folder; `name` is the image encoder. `pooling` and `revision`
    then apply to the text encoder."""
    fusion: Fusion = "concat"
    """Fusion of image and text. concat: both vectors, their product and difference. gated: a gate per feature mixes
    both. cross_attention: text tokens attend to the spatial positions of the image."""
    fusion_dim: int = 256
    """Hidden size of the fusion, a multiple of 4."""
    modality_dropout: float = 0.0
    """Fraction of training rows without image or text, in [0, 1); allows a missing modality in prediction."""
    projection_dim: int = 256
    """Dimension of the joint embedding space of images and texts (retrieval)."""
    detector: DetectorConfig = field(default_factory=DetectorConfig)


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank adaptation with peft (Hu et al. 2021, https://arxiv.org/abs/2106.09685)."""

    r: int = 8
    """Rank of the low-rank update, at least 1."""
    alpha: float = 16.0
    """Scaling of the update by alpha / r; above 0."""
    dropout: float = 0.0
    """Dropout probability of the update's input, in [0, 1)."""
    target_modules: list[str] | None = None
    """Names, suffixes or regular expressions of backbone layers. Default: all dense linear and convolution layers of
    the backbone except its first layer."""


@dataclass(frozen=True)
class FrozenConfig:
    """Training of the head on cached features of the frozen backbone."""

    cache: bool = True
    """Compute the features once. False: run the backbone in every epoch, with new augmentation."""
    num_views: int = 0
    """Augmented views per training image with cached features; epoch e uses view e modulo num_views. 0: images
    without augmentation."""
    lr_factors: list[float] = field(default_factory=lambda: [0.1, 0.3, 1.0, 3.0, 10.0])
    """Candidate multiples of train.head_lr, trained in parallel; the best on validation is selected."""
    weight_decays: list[float] | None = None
    """Candidate values of train.weight_decay for each lr factor; default: train.weight_decay, 0 and 0.1."""
    num_seeds: int = 1
    """Heads per candidate, with different initialization and data order (train.seed, train.seed + 1, …)."""


@dataclass(frozen=True)
class ProbeConfig:
    """scikit-learn classifier on features of the frozen backbone; cross-validation selects its hyperparameters."""

    classifier: ProbeClassifier = "logistic"
    """scikit-learn classifier. logistic, linear_svm, ridge and lda are linear and become the head of the timm or
    transformers model; svm, random_forest and knn are saved in addition to the backbone."""
    num_folds: int = 5
    """Folds of cross-validation on the training rows, at least 2."""


@dataclass(frozen=True)
class AdaptConfig:
    """Adaptation method."""

    method: Method = "full"
    """Adaptation method. full: all parameters. frozen: the head only. lora: LoRA adapters in the backbone and the head.
    probe: a scikit-learn classifier on backbone features."""
    lora: LoraConfig = field(default_factory=LoraConfig)
    frozen: FrozenConfig = field(default_factory=FrozenConfig)
    probe: ProbeConfig = field(default_factory=ProbeConfig)
    batch_norm: BatchNorm = "auto"
    """Batch normalization of the backbone with `full`. frozen: statistics, scale and shift of the checkpoint; a step
    then does not depend on the micro-batch size. train: updated. auto: frozen, or train with random weights."""
    image_method: EncoderMethod | None = None
    """Adaptation method of the image encoder in image-text models; default: `method`."""
    text_method: EncoderMethod | None = None
    """Adaptation method of the text encoder in image-text models; default: `method`."""


@dataclass(frozen=True)
class TrainConfig:
    """Training loop. A step is one optimizer update."""

    num_epochs: float | None = None
    """Epochs; default by method and modality."""
    max_steps: int | None = None
    """Total steps; takes precedence over num_epochs."""
    lr: float | None = None
    """Peak learning rate of the backbone (or the adapters); default by method and modality."""
    head_lr: float | None = None
    """Peak learning rate of the head; default by method and modality."""
    freeze_backbone_ratio: float | None = None
    """Fraction of steps with the backbone frozen, in [0, 1); protects pretrained features from a new head (LP-FT,
    https://arxiv.org/abs/2202.10054). Default by method and modality."""
    weight_decay: float = 0.01
    """Weight decay of AdamW, on matrices only (not on biases and normalization layers)."""
    batch_size_per_device: int = 32
    """Maximum examples per micro-batch and device. Effective batch = this x processes x gradient_accumulation_steps."""
    gradient_accumulation_steps: int = 1
    """Micro-batches per step."""
    max_grad_norm: float = 1.0
    """Maximum gradient norm; larger gradients are clipped. 0 disables clipping."""
    warmup_ratio: float = 0.1
    """Fraction of steps with linear warmup from 0, in [0, 1]."""
    lr_scheduler_type: SchedulerType = "linear"
    """Learning rate schedule after the warmup."""
    seed: int = 0
    """Seed of head initialization, data order, dropout and augmentation."""
    eval_steps: int | None = None
    """Steps between evaluations on validation; default: once per epoch."""
    logging_steps: int = 10
    """Steps between log lines."""
    pair_loss: PairLoss = "auto"
    """Loss of pair tasks. Text pairs with scores: cosine (squared error of the score) or cosent (order of the scores).
    Positive pairs: infonce (in-batch negatives) or, for image-text pairs, siglip. auto: the first of each."""
    metric_for_best_model: str | None = None
    """Validation metric that selects the best checkpoint, such as `macro_f1`; default: that of the task."""
    metrics: list[str] = field(default_factory=list)
    """Additional metrics: names for `evaluate.load` (Hub repo id or local script)."""
    early_stopping_patience: int | None = None
    """Evaluations without improvement of metric_for_best_model before training stops; default: no early stopping."""
    trackers: list[str] = field(default_factory=lambda: ["tensorboard"])
    """Accelerate trackers that receive the history, in addition to history.jsonl."""
    on_nonfinite: OnNonfinite = "stop"
    """NaN or infinite loss or gradient, detected before the optimizer step. stop: end with an error. skip: skip the
    optimizer step, at most max_nonfinite_steps times."""
    max_nonfinite_steps: int = 10
    """Maximum skipped optimizer steps per run with `on_nonfinite: skip`, at least 1."""
    on_oom: OnOutOfMemory = "halve"
    """Out of memory (OOM). halve: repeat the step with half the micro-batch size (gradients are then reduced after the
    backward pass, so that no process waits for a repeating one). raise: end with an error."""
    num_threads: int | None = None
    """CPU threads per process, at least 1. Default: OMP_NUM_THREADS, or `accelerate launch
    --num_cpu_threads_per_process`, or the available cores divided by the processes on the machine. Results are bitwise
    identical only for the same number."""
    timeout_minutes: float = 10.0
    """Minutes that a process waits for another process before it ends with an error."""


@dataclass(frozen=True)
class CheckpointConfig:
    """Checkpoints of the full training state, for resuming. Also saved at the end of training and on a stop signal."""

    save_minutes: float | None = 15.0
    """Minutes between checkpoints; null: none by time."""
    save_steps: int | None = None
    """Steps between checkpoints; default: none by steps."""
    total_limit: int = 2
    """Maximum checkpoints on disk. The oldest is deleted after a newer one is complete."""


@dataclass(frozen=True)
class HubConfig:
    """Upload of the trained model to the Hub."""

    repo_id: str | None = None
    """Hub repository `user/name` for the verified model; write access is checked before training."""
    private: bool = False
    """Create a private repository. An existing public repository is rejected."""
    verify: bool = True
    """Reload the pushed revision from the Hub and compare logits."""


@dataclass(frozen=True)
class RunConfig:
    """Run configuration."""

    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    adapt: AdaptConfig = field(default_factory=AdaptConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    hub: HubConfig = field(default_factory=HubConfig)
    task: str = "auto"
    """Name of a task (`hftl.tasks.registry.TASKS`). auto: detected from columns and labels; the choice is logged.
    Recipes for one task set it."""
    output_dir: str | None = None
    """Run folder; default: runs/DATA-MODEL-METHOD-sSEED."""
    overwrite: bool = False
    """Replace an existing run folder."""
    resume: Resume = "never"
    """auto: start the run, resume from its newest valid checkpoint, or exit if the run is complete. never: start it."""
    problems: tuple[str, ...] = field(default=(), repr=False, compare=False)
    """Not an option: errors of the command line, reported later together with all other errors."""
    quarantine: tuple[dict[str, Any], ...] = field(default=(), repr=False, compare=False)
    """Not an option: rows that `setup_run` skipped, until `create_accelerator` writes them to the run folder."""
    restarts: bool = field(default=False, repr=False, compare=False)
    """Not an option: whether `resume: auto` restarts at step 0, because the checkpoints used rows that `setup_run`
    skipped."""


NO_OPTIONS = ("problems", "quarantine", "restarts")
"""Internal fields of `RunConfig`, not settable by users."""


def leaves(config: Any, prefix: str = "") -> dict[str, Any]:
    """Flattens nested dataclasses to `{"train.lr": 3e-4, …}`, with the names of flags and error messages."""
    values: dict[str, Any] = {}
    for item in fields(config):
        value, name = getattr(config, item.name), prefix + item.name
        values |= leaves(value, name + ".") if is_dataclass(value) else {name: value}
    return values if prefix else {name: value for name, value in values.items() if name not in NO_OPTIONS}
