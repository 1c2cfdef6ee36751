"""The configuration of a run.

The path of a field is its name everywhere: `run.adapt.lora.r` is `adapt: {lora: {r: 8}}` in YAML and
`--adapt.lora.r 8` on the command line.

Processes, devices and precision are not here: they belong to `accelerate_config.yaml` and the launcher.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any, Literal

from hftl.config.data_schema import AugmentConfig as AugmentConfig
from hftl.config.data_schema import DataConfig as DataConfig
from hftl.config.data_schema import ProblemType as ProblemType

Pooling = Literal["auto", "stock", "cls", "mean"]
Method = Literal["full", "frozen", "lora", "probe"]
EncoderMethod = Literal["full", "frozen", "lora"]
ProbeHead = Literal["logistic", "linear_svm", "svm", "random_forest", "knn", "ridge", "lda"]
Fusion = Literal["concat", "gated", "cross_attention"]
Schedule = Literal["linear", "cosine", "constant"]
BatchNorm = Literal["auto", "keep", "update"]
OnNonfinite = Literal["stop", "skip"]
OnOutOfMemory = Literal["halve", "raise"]
Resume = Literal["never", "auto"]


@dataclass(frozen=True)
class DetectorConfig:
    """RT-DETR's neck and decoder, which a timm backbone gets for object detection; a detector brings its own."""

    width: int = 128
    """Channels of neck and decoder; a multiple of 32."""
    levels: int = 2
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
    decoder_size: int = 64
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
    fusion_size: int = 256
    """Width of the fusion, a multiple of 4."""
    modality_dropout: float = 0.0
    """Share of the training rows that lose their image or their text, in [0, 1): either may then be missing later."""
    projection_size: int = 256
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
    views: int = 0
    """Augmented views of every training image whose features are computed; epoch e learns from view e modulo this.
    0: the images as they are."""
    lr_factors: list[float] = field(default_factory=lambda: [0.1, 0.3, 1.0, 3.0, 10.0])
    """Multiples of train.head_lr that are tried, all in one pass over the features; validation chooses."""
    weight_decays: list[float] | None = None
    """Values of train.weight_decay that are tried with each of them; train.weight_decay, 0 and 0.1 by default."""
    seeds: int = 1
    """Heads of each setting that are tried, from as many initialisations and orders (train.seed, train.seed + 1, …)."""


@dataclass(frozen=True)
class ProbeConfig:
    """A classic head on the features of the frozen backbone (scikit-learn); its settings by cross-validation."""

    head: ProbeHead = "logistic"
    """logistic, linear_svm, ridge and lda are linear and become the stock model's own head; svm, random_forest and knn
    are saved beside the backbone."""
    folds: int = 5
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
    image: EncoderMethod | None = None
    """Way for the image encoder alone, where there is a text encoder too; as `method` by default."""
    text: EncoderMethod | None = None
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
    head_first: float | None = None
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
    schedule: Schedule = "linear"
    """How lr falls after the warm-up."""
    seed: int = 0
    """Seed of head initialisation, order, dropout and augmentation."""
    eval_every: int | None = None
    """Steps between evaluations on validation; by default once an epoch."""
    log_every: int = 10
    """Steps between log lines."""
    best_metric: str | None = None
    """Metric on validation that chooses the weights to keep, e.g. `macro_f1`; the task's own by default."""
    metrics: list[str] = field(default_factory=list)
    """Further metrics by the name that `evaluate.load` takes (hub id or local script)."""
    early_stopping_patience: int | None = None
    """Evaluations without a better best_metric after which training stops; never by default."""
    trackers: list[str] = field(default_factory=lambda: ["tensorboard"])
    """Accelerate trackers that receive the history beside history.jsonl."""
    on_nonfinite: OnNonfinite = "stop"
    """Loss or gradient that is NaN or infinite, seen before the optimizer uses it. stop: end with an error. skip: leave
    the weights as they are in this step, at most max_nonfinite times."""
    max_nonfinite: int = 10
    """Steps of a run that may be skipped so."""
    on_oom: OnOutOfMemory = "halve"
    """Out of memory. halve: run the same step again in micro-batches of half the rows (and exchange gradients after the
    backward pass, so that no process waits for one that tries again). raise: end with an error."""
    timeout_minutes: float = 10.0
    """Time after which a process that waits for another one ends with an error."""


@dataclass(frozen=True)
class CheckpointConfig:
    """When the full state of training is saved, to go on from after a stop. At its end and on a signal it always is."""

    every_minutes: float | None = 15.0
    """Minutes between saves; null: none by time."""
    every_steps: int | None = None
    """Steps between saves; none by steps by default."""
    keep: int = 2
    """Newest states that stay on disk. An older one is deleted when a newer one is complete."""


@dataclass(frozen=True)
class PublishConfig:
    """Where the finished model goes, beside its folder."""

    push_to_hub: str | None = None
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
    publish: PublishConfig = field(default_factory=PublishConfig)
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


NO_OPTIONS = ("problems", "quarantine")
"""Fields of `RunConfig` that nobody sets."""


def leaves(config: Any, prefix: str = "") -> dict[str, Any]:
    """Flattens nested dataclasses to `{"train.lr": 3e-4, …}`, the spelling of flags and messages."""
    out: dict[str, Any] = {}
    for item in fields(config):
        value, name = getattr(config, item.name), prefix + item.name
        out |= leaves(value, name + ".") if is_dataclass(value) else {name: value}
    return out if prefix else {name: value for name, value in out.items() if name not in NO_OPTIONS}
