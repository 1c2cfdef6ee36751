"""The configuration of a run.

The path of a field is its name everywhere: `run.adapt.lora.r` is `adapt: {lora: {r: 8}}` in YAML and
`--adapt.lora.r 8` on the command line.

Processes, devices and precision are not here: they belong to `accelerate_config.yaml` and the launcher.
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
    validation_fraction: float = 0.1
    """Share of train cut off, stratified by label, when there is no validation split; in [0, 1). 0: no validation."""
    max_train_samples_per_class: int | None = None
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
    max_skipped_fraction: float = 0.05
    """Share of the rows of a split that may be left out before the data are refused all the same, in [0, 1]."""


@dataclass(frozen=True)
class DetectorConfig:
    """RT-DETR's neck and decoder, which a timm backbone gets for object detection; a detector brings its own."""

    d_model: int = 128
    """Channels of neck and decoder; a multiple of 32."""
    num_feature_levels: int = 2
    """Feature maps of the backbone that are used, 1 to 3: of stride 32, then 16, then 8. Each finds smaller objects,
    and has four times as many places."""
    decoder_layers: int = 2
    """Layers that refine the proposals, at least 1."""
    num_queries: int = 100
    """Most objects that can be found in an image; at most (height / stride) x (width / stride) over the levels."""


@dataclass(frozen=True)
class ModelConfig:
    """Which pretrained model."""

    name: str = ""
    """A timm name, `hf-hub:` id, `local-dir:` folder or `embedded:` name (vision); a hub id or folder (text)."""
    pretrained: bool = True
    """False builds the same architecture with random weights, the baseline that shows what transfer gave."""
    pooling: Pooling = "auto"
    """How text features are read. auto believes the checkpoint's `1_Pooling`, else takes the stock class."""
    revision: str | None = None
    """Branch, tag or commit of a text checkpoint on the hub."""
    image_size: int | list[int] | None = None
    """Side of the square input in pixels, or [height, width]; the backbone's own by default."""
    decoder_channels: int = 64
    """Channels of the decoder that segmentation puts on the backbone; its time grows with their square."""
    dropout: float | None = None
    """Dropout probability everywhere in the model, in [0, 1); the checkpoint's own by default."""
    trust_remote_code: bool = False
    """Run code that a hub repository brings along. Needs `revision` as a full commit: code that nobody can change."""
    text_name: str = ""
    """The text encoder, a hub id or folder, where `name` is the image encoder (image and text together); `pooling` and
    `revision` are then this one's."""
    fusion: Fusion = "concat"
    """How image and text are joined. concat: both vectors, their product and difference. gated: a gate chooses between
    them, feature by feature. cross_attention: the words look at the places of the image."""
    fusion_dim: int = 256
    """Width of the fusion, a multiple of 4."""
    modality_dropout: float = 0.0
    """Share of the training rows that lose their image or their text, in [0, 1): either may then be missing later."""
    projection_dim: int = 256
    """Size of the space that images and texts share (retrieval)."""
    detector: DetectorConfig = field(default_factory=DetectorConfig)


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank adaptation (Hu et al. 2021, https://arxiv.org/abs/2106.09685), by peft."""

    r: int = 8
    """Rank of the update, at least 1."""
    alpha: float = 16.0
    """Scale: the update is multiplied by alpha / r."""
    dropout: float = 0.0
    """Dropout before the update, in [0, 1)."""
    target_modules: list[str] | None = None
    """Names, endings or regular expressions of backbone layers. By default every dense linear and convolution
    of the backbone except its first layer."""


@dataclass(frozen=True)
class FrozenConfig:
    """Training of the head alone, on features of the frozen backbone that are computed once."""

    cache: bool = True
    """Compute the features once. False runs the backbone again in every epoch, with new augmentation each time."""
    num_views: int = 0
    """Augmented views of every training image whose features are computed; epoch e learns from view e modulo this.
    0: the images as they are."""
    lr_factors: list[float] = field(default_factory=lambda: [0.1, 0.3, 1.0, 3.0, 10.0])
    """Multiples of train.head_lr that are tried, all in one pass over the features; validation chooses."""
    weight_decays: list[float] | None = None
    """Values of train.weight_decay that are tried with each of them; train.weight_decay, 0 and 0.1 by default."""
    num_seeds: int = 1
    """Heads of each setting that are tried, from as many initialisations and orders (train.seed, train.seed + 1, …)."""


@dataclass(frozen=True)
class ProbeConfig:
    """A classic head on the features of the frozen backbone (scikit-learn); its settings by cross-validation."""

    classifier: ProbeClassifier = "logistic"
    """logistic, linear_svm, ridge and lda are linear and become the stock model's own head; svm, random_forest and knn
    are saved beside the backbone."""
    num_folds: int = 5
    """Parts of the training rows for cross-validation, at least 2."""


@dataclass(frozen=True)
class AdaptConfig:
    """Which parameters learn."""

    method: Method = "full"
    """full: everything. frozen: the new head only. lora: low-rank updates in the backbone, and the head. probe: a
    classic head, fitted to the features."""
    lora: LoraConfig = field(default_factory=LoraConfig)
    frozen: FrozenConfig = field(default_factory=FrozenConfig)
    probe: ProbeConfig = field(default_factory=ProbeConfig)
    batch_norm: BatchNorm = "auto"
    """Batch norms of the backbone in a full run. keep: as the checkpoint has them (statistics, scale and shift), so
    that a step does not depend on how its rows are cut into batches. update: they learn. auto: keep, unless training
    starts from random weights."""
    image_method: EncoderMethod | None = None
    """Way for the image encoder alone, where there is a text encoder too; as `method` by default."""
    text_method: EncoderMethod | None = None
    """Likewise for the text encoder."""


@dataclass(frozen=True)
class TrainConfig:
    """How they learn. A *step* is one optimizer update, everywhere."""

    num_epochs: float | None = None
    """Passes over the training rows; default by method and modality."""
    max_steps: int | None = None
    """Steps in all; takes precedence over num_epochs."""
    lr: float | None = None
    """Peak learning rate of the backbone (or of the adapters); default by method and modality."""
    head_lr: float | None = None
    """Peak learning rate of the head; default by method and modality."""
    freeze_backbone_ratio: float | None = None
    """Share of the steps in which the head learns alone before the backbone joins, in [0, 1): a new head disturbs
    pretrained features (LP-FT, https://arxiv.org/abs/2202.10054). Default by method and modality."""
    weight_decay: float = 0.01
    """AdamW's decay, on matrices only: biases and norms are left alone."""
    batch_size_per_device: int = 32
    """Rows of one micro-batch, at most. Effective batch = this x processes x gradient_accumulation_steps."""
    gradient_accumulation_steps: int = 1
    """Micro-batches per step."""
    max_grad_norm: float = 1.0
    """Gradient norm above which gradients are scaled down; 0 switches it off."""
    warmup_ratio: float = 0.1
    """Share of the steps over which lr rises linearly from 0, in [0, 1]."""
    lr_scheduler_type: SchedulerType = "linear"
    """How lr falls after the warm-up."""
    seed: int = 0
    """Seed of head initialisation, order, dropout and augmentation."""
    eval_steps: int | None = None
    """Steps between evaluations on validation; by default once an epoch."""
    logging_steps: int = 10
    """Steps between log lines."""
    pair_loss: PairLoss = "auto"
    """Loss of pairs. Scored texts: cosine (squared error of the score) or cosent (order of the scores). Positive pairs:
    infonce (in-batch negatives) or, for image-text pairs, siglip. auto: the first of each."""
    metric_for_best_model: str | None = None
    """Metric on validation that chooses the weights to keep, e.g. `macro_f1`; the task's own by default."""
    metrics: list[str] = field(default_factory=list)
    """Further metrics by the name that `evaluate.load` takes (hub id or local script)."""
    early_stopping_patience: int | None = None
    """Evaluations without a better metric_for_best_model after which training stops; never by default."""
    trackers: list[str] = field(default_factory=lambda: ["tensorboard"])
    """Accelerate trackers that receive the history beside history.jsonl."""
    on_nonfinite: OnNonfinite = "stop"
    """Loss or gradient that is NaN or infinite, seen before the optimizer uses it. stop: end with an error. skip: leave
    the weights as they are in this step, at most max_nonfinite_steps times."""
    max_nonfinite_steps: int = 10
    """Steps of a run that may be skipped so."""
    on_oom: OnOutOfMemory = "halve"
    """Out of memory. halve: run the same step again in micro-batches of half the rows (and exchange gradients after the
    backward pass, so that no process waits for one that tries again). raise: end with an error."""
    num_threads: int | None = None
    """CPU threads per process, at least 1. By default those of OMP_NUM_THREADS, or of `accelerate launch
    --num_cpu_threads_per_process`, or the cores that the process may use, divided by the processes on the machine.
    Results are bitwise equal for the same number only."""
    timeout_minutes: float = 10.0
    """Time after which a process that waits for another one ends with an error."""


@dataclass(frozen=True)
class CheckpointConfig:
    """When the full state of training is saved, to go on from after a stop. At its end and on a signal it always is."""

    save_minutes: float | None = 15.0
    """Minutes between saves; null: none by time."""
    save_steps: int | None = None
    """Steps between saves; none by steps by default."""
    total_limit: int = 2
    """Newest states that stay on disk. An older one is deleted when a newer one is complete."""


@dataclass(frozen=True)
class HubConfig:
    """Where the finished model goes, beside its folder."""

    repo_id: str | None = None
    """Hub repository `user/name` that receives the verified model; rights are checked before training."""
    private: bool = False
    """Make the repository private. One that is public already is refused then, not used."""
    verify: bool = True
    """Load the pushed revision back by its id and compare logits."""


@dataclass(frozen=True)
class RunConfig:
    """Everything a recipe is told."""

    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    adapt: AdaptConfig = field(default_factory=AdaptConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    hub: HubConfig = field(default_factory=HubConfig)
    task: str = "auto"
    """What is learnt: the name of a task (`hftl.tasks.registry.TASKS`), or auto: found from the columns and labels
    of the data, and said. A recipe for one task has it already."""
    output_dir: str | None = None
    """The run folder; by default runs/DATA-MODEL-METHOD-sSEED."""
    overwrite: bool = False
    """Replace an existing run folder."""
    resume: Resume = "never"
    """auto: begin, go on from the newest valid checkpoint in the run folder, or say that the run is complete."""
    problems: tuple[str, ...] = field(default=(), repr=False, compare=False)
    """Not an option: what the command line got wrong, kept so that it is reported with everything else."""
    quarantine: tuple[dict[str, Any], ...] = field(default=(), repr=False, compare=False)
    """Not an option: the rows that `prepare` left out, kept until `start` has a folder to write them to."""
    restarts: bool = field(default=False, repr=False, compare=False)
    """Not an option: whether `resume` auto begins at step 0, because the checkpoints were made with rows that
    `prepare` left out."""


NO_OPTIONS = ("problems", "quarantine", "restarts")
"""Fields of `RunConfig` that nobody sets."""


def leaves(config: Any, prefix: str = "") -> dict[str, Any]:
    """Flattens nested dataclasses to `{"train.lr": 3e-4, …}`, the spelling of flags and messages."""
    out: dict[str, Any] = {}
    for item in fields(config):
        value, name = getattr(config, item.name), prefix + item.name
        out |= leaves(value, name + ".") if is_dataclass(value) else {name: value}
    return out if prefix else {name: value for name, value in out.items() if name not in NO_OPTIONS}
