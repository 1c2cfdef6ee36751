"""Models of images and texts together: a timm network and a BERT-family checkpoint under one new head."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hftl.config.schema import AugmentConfig, ModelConfig, RunConfig
from hftl.errors import ArtifactError, ModelError, shorten
from hftl.models.checkpoint_metadata import read_json, source_of
from hftl.models.image_text_encoders import (
    configuration,
    has_inputs,
    name_problem,
    spec_problem,
    text_config,
    text_encoder,
)
from hftl.models.remote_code import check_files, check_own_code
from hftl.models.suppress_warnings import quiet
from hftl.models.task_model import HeadSpec, ReloadedModel, Source, TaskModel, compared_outputs
from hftl.models.timm_files import data_config_of, origin, timm_name
from hftl.models.timm_model import create_network
from hftl.preprocessing.image_transforms import ImageProcessor
from hftl.preprocessing.tokenization import token_limit

__all__ = ["build", "name_problem", "open_saved", "spec_problem"]

_NOT_ARGUMENTS = ("checkpoint_path", "pretrained_cfg", "pretrained_cfg_overlay", "cache_dir")
"""Of timm's factory: these name files. A saved architecture needs none."""


@dataclass(frozen=True)
class ImageTextProcessors:
    """What turns images and texts into inputs; None where the model takes none.

    Attributes:
        image: The image encoder's preprocessing.
        tokenizer: The text encoder's.
        optional: Whether a row may lack one of the two: the model has learnt to do without.
    """

    image: ImageProcessor | None
    tokenizer: Any
    optional: bool = False


class ImageTextModel(TaskModel):
    """Two pretrained encoders, and a fusion or a projection that is new."""

    modality = "image_text"
    config: ModelConfig | None = None
    """What it was built from; None where a folder was opened."""
    max_length: int | None = None
    """Tokens that texts are cut to, as the saved processor will do it."""

    def forward(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """Returns the network's outputs by name; scalars (temperature) as [B]."""
        if "pixel_values" in inputs:  # the layout that convolutions are fastest in
            pixels = inputs["pixel_values"].contiguous(memory_format=torch.channels_last)
            inputs = inputs | {"pixel_values": pixels}
        rows = len(next(iter(inputs.values())))
        return {name: value.expand(rows) if value.ndim == 0 else value for name, value in self.net(**inputs).items()}

    @property
    def encoders(self) -> dict[str, str]:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The encoders that there are, where there are both."""
        found = {"image": "image_encoder", "text": "text_encoder"}
        return found if self.net.config.vision and self.net.config.text else {}

    @property
    def joins_vectors(self) -> bool:
        """Whether the head takes one vector of each encoder."""
        return self.spec.model_class == "ImageTextDualEncoder" or self.net.config.fusion != "cross_attention"

    def vectors(self, inputs: dict[str, Tensor]) -> Tensor:
        """Returns the vectors of both encoders side by side [B, D]; any where a row has no such input."""
        return self.net.encode(**inputs)

    def _saved_processor(self) -> Any:
        from hftl.models.processing_image_text import ImageTextProcessor

        config, processors = self.net.config, self.processor
        limit = token_limit(processors.tokenizer, self.max_length) if processors.tokenizer is not None else None
        data = config.vision["data"] if config.vision else None
        return ImageTextProcessor(processors.tokenizer, data, limit, config.numbers["names"], config.categories)

    def save(self, folder: Path) -> None:
        """Writes weights, config, processor and the files that define both."""
        with quiet():
            self.net.save_pretrained(folder)
            self._saved_processor().save_pretrained(folder)

    def loaders(self, place: str | Path, revision: str | None = None) -> dict[str, ReloadedModel]:
        """Opens with `AutoModel`, by the file that was saved with the weights."""
        from transformers import AutoModel

        options: dict[str, Any] = {"revision": revision, "code_revision": revision} if revision else {}
        if not Path(place).is_dir():
            from hftl.models import image_text_heads, modeling_image_text

            files = (Path(str(module.__file__)) for module in (modeling_image_text, image_text_heads))
            check_own_code(str(place), revision or "main", *files)
        with quiet():
            # the folder's own file, not the class in this process: that is what a reader elsewhere will run
            net = AutoModel.from_pretrained(place, trust_remote_code=True, use_safetensors=True, **options).eval()
        return {"transformers": lambda inputs: compared_outputs(net(**inputs), self.compared)}

    def original_labels(self) -> list[str]:
        """Returns transformers' `id2label` in order."""
        named = self.net.config.id2label
        return [named[position] for position in sorted(named)] if self.spec.labels else []

    @property
    def stem(self) -> tuple[str, ...]:
        """The image encoder's first layer."""
        first = (getattr(self.net.image_encoder, "pretrained_cfg", None) or {}).get("first_conv") or ()
        return tuple(f"image_encoder.{name}" for name in ((first,) if isinstance(first, str) else first))

    @property
    def compared(self) -> tuple[str, ...]:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The logits, or both embeddings."""
        return ("image_embeds", "text_embeds") if self.spec.model_class == "ImageTextDualEncoder" else ("logits",)

    def build_untrained(self) -> nn.Module:
        """Returns the same class with the checkpoints' weights and an untrained head."""
        net = self.net.get_base_model() if self.adapted else self.net
        if self.config is None:
            raise ModelError("the checkpoints that this model was built from are not known here")
        with quiet():
            fresh = type(net)(net.config)
            if net.image_encoder is not None:
                fresh.image_encoder = create_network(self.config, 0)
            if net.text_encoder is not None:
                fresh.text_encoder = text_encoder(self.config)[0]
        return fresh


def build(run: RunConfig, spec: HeadSpec) -> ImageTextModel:
    """Returns `run.model.name` (timm) and `run.model.text_name` (BERT family) under the head that `spec` asks for.

    Args:
        run: Uses `run.model`, `run.data.augment` and `run.data.max_length`.
        spec: `stock` is a class of `modeling_image_text`. `options` may hold `image` and `text` (False: there are none
            in the data), `numbers` and `categories` as `ImageTextConfig` has them, and `objective`.

    Raises:
        ModelError: A checkpoint cannot be found or built.
    """
    from hftl.models import modeling_image_text

    config, kind = run.model, getattr(modeling_image_text, spec.model_class)
    problem = spec_problem(config, spec)
    if problem:
        raise ModelError(problem)
    has_image, has_text = has_inputs(spec)
    image = create_network(config, 0) if has_image else None
    with quiet():
        text, pooling = text_encoder(config) if has_text else (None, "mean")
        net = kind(configuration(run, spec, image, text, pooling))
        net.image_encoder, net.text_encoder = image, text  # with their weights
    return _task_model(run, spec, net.float(), image)


def open_saved(folder: Path, spec: HeadSpec) -> ImageTextModel:
    """Returns the model in a folder written by `ImageTextModel.save`, its head as trained. No code in the folder runs.

    Raises:
        ModelError: Its configuration asks for other files or for code.
    """
    from transformers import AutoTokenizer

    from hftl.models import modeling_image_text

    kind = getattr(modeling_image_text, spec.model_class)
    check_files(ModelConfig(name=str(folder)), lambda file: _astext_encoder(folder, file))
    with quiet():
        config = kind.config_class.from_pretrained(folder)
        _check_architecture(config.vision, folder)
        net = kind.from_pretrained(folder, config=config, use_safetensors=True)
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False) if config.text else None
    image = None
    if config.vision:
        data = {key: tuple(value) if isinstance(value, list) else value for key, value in config.vision["data"].items()}
        image = ImageProcessor(data, AugmentConfig())
    source = Source(str(folder), None, True, "transformers")
    processors = ImageTextProcessors(image, tokenizer, config.modality_dropout > 0)
    return ImageTextModel(net, processors, source, spec, _head(net))


def _astext_encoder(folder: Path, file: str) -> dict[str, Any] | None:
    """Returns a JSON file of the folder as that of its text encoder: our own class needs no code of the folder's."""
    found = read_json(ModelConfig(name=str(folder)), file)
    if file != "config.json" or found is None:
        return found
    text = found.get("text") or {"model_type": "bert"}
    return {key: value for key, value in found.items() if key != "auto_map"} | {"model_type": text.get("model_type")}


def _check_architecture(vision: dict[str, Any] | None, folder: Path) -> None:
    """A name such as hf-hub:… would be fetched, and some arguments name files."""
    import timm

    if vision is None:
        return
    named = [name for name in vision.get("arguments", {}) if name in _NOT_ARGUMENTS]
    if named or not timm.is_model(vision.get("architecture", "")):
        wrong = f"argument(s) {shorten(named)}" if named else f"architecture {vision.get('architecture')!r}"
        raise ArtifactError(f"{folder}: config.json names the {wrong}, which is not part of a timm architecture.")


def _head(net: nn.Module) -> list[str]:
    """Returns the one module beside the two encoders."""
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
        of_text = text_config(config)
        sources.append(source_of(of_text))
        with quiet():
            tokenizer = AutoTokenizer.from_pretrained(of_text.name, revision=of_text.revision, trust_remote_code=False)
    source = replace(sources[0], text_source=sources[1]) if len(sources) == 2 else sources[0]
    processor = None
    if image is not None:
        processor = ImageProcessor(data_config_of(image, config.image_size), run.data.augment)
    processors = ImageTextProcessors(processor, tokenizer, config.modality_dropout > 0)
    model = ImageTextModel(net, processors, source, spec, _head(net))
    model.config, model.max_length = config, run.data.max_length
    return model
