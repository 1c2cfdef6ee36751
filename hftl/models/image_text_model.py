"""Image-text models: a timm image encoder and a BERT-family text encoder with one new head."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hftl.config.schema import AugmentConfig, ModelConfig, RunConfig
from hftl.errors import ArtifactError, ModelError, shorten
from hftl.models.checkpoint_metadata import checkpoint_source, read_checkpoint_json
from hftl.models.image_text_encoders import (
    build_config,
    build_text_encoder,
    has_inputs,
    name_problem,
    spec_problem,
    text_config,
)
from hftl.models.remote_code import check_files, check_own_code
from hftl.models.suppress_warnings import quiet
from hftl.models.task_model import HeadSpec, ReloadedModel, Source, TaskModel, compared_outputs
from hftl.models.timm_files import data_config_of, origin, timm_name
from hftl.models.timm_model import create_network
from hftl.preprocessing.image_transforms import ImageProcessor
from hftl.preprocessing.tokenization import token_limit

__all__ = ["build", "name_problem", "open_saved", "spec_problem"]

_FILE_ARGUMENTS = ("checkpoint_path", "pretrained_cfg", "pretrained_cfg_overlay", "cache_dir")
"""Arguments of `timm.create_model` that name files; rejected in a saved architecture, which needs none."""


@dataclass(frozen=True)
class ImageTextProcessors:
    """Preprocessing of images and texts.

    Attributes:
        image: Preprocessing of the image encoder; None without images.
        tokenizer: Tokenizer of the text encoder; None without texts.
        optional: Whether a row may lack its image or its text: the model was trained with modality dropout.
    """

    image: ImageProcessor | None
    tokenizer: Any
    optional: bool = False


class ImageTextModel(TaskModel):
    """Two pretrained encoders with a new fusion head or projection."""

    modality = "image_text"
    config: ModelConfig | None = None
    """Configuration that it was built from; None for a saved model."""
    max_length: int | None = None
    """Tokens that the saved processor truncates texts to; None: the tokenizer's limit."""

    def forward(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """Returns the network's outputs by name; scalars (temperature) as [B]."""
        if "pixel_values" in inputs:  # fastest memory format for convolutions
            pixels = inputs["pixel_values"].contiguous(memory_format=torch.channels_last)
            inputs = inputs | {"pixel_values": pixels}
        rows = len(next(iter(inputs.values())))
        return {name: value.expand(rows) if value.ndim == 0 else value for name, value in self.net(**inputs).items()}

    @property
    def encoders(self) -> dict[str, str]:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Module names of the encoders if the model has both, else {}."""
        names = {"image": "image_encoder", "text": "text_encoder"}
        return names if self.net.config.vision and self.net.config.text else {}

    @property
    def joins_vectors(self) -> bool:
        """Whether the head takes one vector from each encoder."""
        return self.spec.model_class == "ImageTextDualEncoder" or self.net.config.fusion != "cross_attention"

    def vectors(self, inputs: dict[str, Tensor]) -> Tensor:
        """Returns the concatenated vectors of both encoders [B, D]; arbitrary values for a missing input."""
        return self.net.encode(**inputs)

    def save(self, folder: Path) -> None:
        """Writes weights, config, processor and the modeling files."""
        from hftl.models.processing_image_text import ImageTextProcessor

        config, tokenizer = self.net.config, self.processor.tokenizer
        max_length = token_limit(tokenizer, self.max_length) if tokenizer is not None else None
        data_config = config.vision["data"] if config.vision else None
        names, categories = config.numbers["names"], config.categories
        with quiet():
            self.net.save_pretrained(folder)
            ImageTextProcessor(tokenizer, data_config, max_length, names, categories).save_pretrained(folder)

    def loaders(self, path_or_repo_id: str | Path, revision: str | None = None) -> dict[str, ReloadedModel]:
        """Loads with `AutoModel` and the modeling file saved with the weights."""
        from transformers import AutoModel

        options: dict[str, Any] = {"revision": revision, "code_revision": revision} if revision else {}
        if not Path(path_or_repo_id).is_dir():
            from hftl.models import image_text_heads, modeling_image_text

            files = (Path(str(module.__file__)) for module in (modeling_image_text, image_text_heads))
            check_own_code(str(path_or_repo_id), revision or "main", *files)
        with quiet():
            # loads the saved modeling file instead of the class in this process, as users without hftl do
            net = AutoModel.from_pretrained(
                path_or_repo_id, trust_remote_code=True, use_safetensors=True, **options
            ).eval()
        return {"transformers": lambda inputs: compared_outputs(net(**inputs), self.compared)}

    def original_labels(self) -> list[str]:
        """Returns transformers' `id2label` in order."""
        id2label = self.net.config.id2label
        return [id2label[position] for position in sorted(id2label)] if self.spec.labels else []

    @property
    def stem(self) -> tuple[str, ...]:
        """Names of the first layers of the image encoder."""
        first = (getattr(self.net.image_encoder, "pretrained_cfg", None) or {}).get("first_conv") or ()
        return tuple(f"image_encoder.{name}" for name in ((first,) if isinstance(first, str) else first))

    @property
    def compared(self) -> tuple[str, ...]:  # pyright: ignore[reportIncompatibleVariableOverride]
        """`logits` of a classifier, both embeddings of a dual encoder."""
        return ("image_embeds", "text_embeds") if self.spec.model_class == "ImageTextDualEncoder" else ("logits",)

    def build_untrained(self) -> nn.Module:
        """Builds the same class with the checkpoints' weights and an untrained head.

        Raises:
            ModelError: The model was loaded from a folder, so its checkpoints are unknown.
        """
        net = self.net.get_base_model() if self.adapted else self.net
        if self.config is None:
            raise ModelError("the checkpoints of a saved image-text model are unknown. Build it with build_model().")
        with quiet():
            untrained = type(net)(net.config)
            if net.image_encoder is not None:
                untrained.image_encoder = create_network(self.config, 0)
            if net.text_encoder is not None:
                untrained.text_encoder = build_text_encoder(self.config)[0]
        return untrained


def build(run: RunConfig, spec: HeadSpec) -> ImageTextModel:
    """Builds an image-text model from `run.model.name` (timm) and `run.model.text_name` (BERT family) with a new head.

    Args:
        run: Uses `run.model`, `run.data.augment` and `run.data.max_length`.
        spec: `model_class` is a class of `modeling_image_text`. `options` may contain `image` and `text` (False:
            absent from the data), `numbers`, `categories` and `objective` as in `ImageTextConfig`.

    Raises:
        ModelError: A checkpoint is missing or cannot be built.
    """
    from hftl.models import modeling_image_text

    config, model_class = run.model, getattr(modeling_image_text, spec.model_class)
    problem = spec_problem(config, spec)
    if problem:
        raise ModelError(problem)
    has_image, has_text = has_inputs(spec)
    image = create_network(config, 0) if has_image else None
    with quiet():
        text, pooling = build_text_encoder(config) if has_text else (None, "mean")
        net = model_class(build_config(run, spec, image, text, pooling))
        net.image_encoder, net.text_encoder = image, text  # pretrained weights
    return _task_model(run, spec, net.float(), image)


def open_saved(folder: Path, spec: HeadSpec) -> ImageTextModel:
    """Loads a model saved by `ImageTextModel.save`, with its trained head. Runs no code from the folder.

    Raises:
        ModelError: config.json refers to untrusted code.
        ArtifactError: config.json names files, or an architecture that is not a timm model.
    """
    from transformers import AutoTokenizer

    from hftl.models import modeling_image_text

    model_class = getattr(modeling_image_text, spec.model_class)
    check_files(ModelConfig(name=str(folder)), lambda file: _text_encoder_json(folder, file))
    with quiet():
        config = model_class.config_class.from_pretrained(folder)
        _check_architecture(config.vision, folder)
        net = model_class.from_pretrained(folder, config=config, use_safetensors=True)
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False) if config.text else None
    image = None
    if config.vision:
        saved = config.vision["data"].items()
        data_config = {key: tuple(value) if isinstance(value, list) else value for key, value in saved}
        image = ImageProcessor(data_config, AugmentConfig())
    source = Source(str(folder), None, True, "transformers")
    processors = ImageTextProcessors(image, tokenizer, config.modality_dropout > 0)
    return ImageTextModel(net, processors, source, spec, _head(net))


def _text_encoder_json(folder: Path, file: str) -> dict[str, Any] | None:
    """Returns a JSON file of a saved model as if it were its text encoder's, without `auto_map`.

    The image-text classes of hftl are loaded from hftl, so the modeling files in the folder need no trust.
    """
    content = read_checkpoint_json(ModelConfig(name=str(folder)), file)
    if file != "config.json" or content is None:
        return content
    text = content.get("text") or {"model_type": "bert"}
    return {key: value for key, value in content.items() if key != "auto_map"} | {"model_type": text.get("model_type")}


def _check_architecture(vision: dict[str, Any] | None, folder: Path) -> None:
    """Raises ArtifactError if the architecture is not a timm name (`hf-hub:` downloads) or arguments name files."""
    import timm

    if vision is None:
        return
    rejected = [name for name in vision.get("arguments", {}) if name in _FILE_ARGUMENTS]
    if rejected or not timm.is_model(vision.get("architecture", "")):
        entry = f"argument(s) {shorten(rejected)}" if rejected else f"architecture {vision.get('architecture')!r}"
        raise ArtifactError(f"{folder}: config.json: {entry} is not part of a timm architecture.")


def _head(net: nn.Module) -> list[str]:
    """Returns the name of the head: the one module other than the encoders."""
    return [name for name, _ in net.named_children() if name not in ("image_encoder", "text_encoder")]


def _task_model(run: RunConfig, spec: HeadSpec, net: Any, image: Any) -> ImageTextModel:
    from transformers import AutoTokenizer

    config = run.model
    sources = []
    if image is not None:
        name = timm_name(config.name)
        hub_id, revision = origin(name, image)
        license = image.pretrained_cfg.get("license") if config.pretrained else None
        sources.append(Source(name, revision, config.pretrained, "timm", hub_id, license))
        net.image_encoder.to(memory_format=torch.channels_last)
    tokenizer = None
    if net.config.text:
        text = text_config(config)
        sources.append(checkpoint_source(text))
        with quiet():
            tokenizer = AutoTokenizer.from_pretrained(text.name, revision=text.revision, trust_remote_code=False)
    source = replace(sources[0], text_source=sources[1]) if len(sources) == 2 else sources[0]
    processor = None
    if image is not None:
        processor = ImageProcessor(data_config_of(image, config.image_size), run.data.augment)
    processors = ImageTextProcessors(processor, tokenizer, config.modality_dropout > 0)
    model = ImageTextModel(net, processors, source, spec, _head(net))
    model.config, model.max_length = config, run.data.max_length
    return model
