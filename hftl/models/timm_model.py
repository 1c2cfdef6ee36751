"""Vision models: any timm name, `hf-hub:` id or `local-dir:` folder, saved so that timm and transformers open them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hftl.config.schema import AugmentConfig, ModelConfig, RunConfig
from hftl.errors import ModelError
from hftl.logging import log
from hftl.models.suppress_warnings import quiet
from hftl.models.task_model import HeadSpec, ReloadedModel, Source, TaskModel
from hftl.models.timm_files import (
    create,
    data_config_of,
    hub_name,
    name_problem,
    origin,
    recorded_args,
    takes_image_size,
    timm_name,
)
from hftl.preprocessing.image_transforms import ImageProcessor

__all__ = ["build", "name_problem", "open_saved"]


class TimmModel(TaskModel):
    """A timm network with a new classifier."""

    modality = "image"

    def forward(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """Returns `logits` [B, K] from `pixel_values` [B, C, H, W]."""
        # convolutions in this layout take about half the time on CPUs and on GPUs in bf16
        return {"logits": self.net(inputs["pixel_values"].contiguous(memory_format=torch.channels_last))}

    def save(self, folder: Path) -> None:
        """Writes timm's own layout, mended so that transformers' TimmWrapper opens the same folder."""
        from timm.models import save_for_hf

        labels = self._label_names()
        # timm >= 1.0.2x records num_classes here as well, and TimmWrapper then passes it twice
        save_for_hf(self.net, str(folder), model_config=labels, model_args=self.build_args, safe_serialization=True)
        path = folder / "config.json"
        config = json.loads(path.read_text())
        config.setdefault("model_args", {}).pop("num_classes", None)
        if not config["model_args"]:
            del config["model_args"]
        config["pretrained_cfg"] |= self._preprocessing()
        if self.spec.problem_type != "single_label_classification":
            config["problem_type"] = self.spec.problem_type  # transformers' pipeline reads it, timm does not
        if self.sklearn_head is not None:  # timm's way of saying that there is no classifier
            config["num_classes"] = config["pretrained_cfg"]["num_classes"] = 0
        if not self.source.pretrained:
            for claim in ("tag", "license", "origin_url", "paper_ids", "paper_name"):
                config["pretrained_cfg"].pop(claim, None)  # these describe weights that were not used
        path.write_text(json.dumps(config, indent=2))

    def original_labels(self) -> list[str]:
        """Returns timm's `label_names`."""
        return list(self.net.pretrained_cfg.get("label_names") or [])

    def _label_names(self) -> dict[str, Any]:
        """Returns timm's config entries for the labels."""
        return {"label_names": list(self.spec.labels)} if self.spec.labels and self.sklearn_head is None else {}

    def _preprocessing(self) -> dict[str, Any]:
        config = self.processor.data_config
        keys = ("input_size", "interpolation", "mean", "std", "crop_pct", "crop_mode")
        return {key: list(config[key]) if isinstance(config[key], tuple) else config[key] for key in keys}

    @property
    def build_args(self) -> dict[str, Any]:
        """Arguments beside the name that rebuild the same architecture."""
        return self.net.hftl_build_args

    def loaders(self, place: str | Path, revision: str | None = None) -> dict[str, ReloadedModel]:
        """Opens with timm's `local-dir:` or `hf-hub:`, and transformers' `AutoModelForImageClassification`."""
        import timm
        from transformers import AutoModel, AutoModelForImageClassification

        name = f"local-dir:{place}" if Path(place).is_dir() else hub_name(str(place), revision)
        try:
            by_timm = timm.create_model(name, pretrained=True).eval()
        except Exception:
            if not Path(place).is_dir():
                raise
            log(f"publish: timm {timm.__version__} does not read safetensors from local-dir: folders; newer ones do")
            by_timm = create(name, pretrained=True).eval()
        with quiet():
            auto, output = (AutoModelForImageClassification, "logits")
            if self.sklearn_head is not None:
                auto, output = (AutoModel, "pooler_output")
            by_transformers = auto.from_pretrained(
                place, revision=revision, trust_remote_code=False, use_safetensors=True
            ).eval()
        return {
            "timm": lambda inputs: by_timm(inputs["pixel_values"]),
            "transformers": lambda inputs: by_transformers(**inputs)[output],
        }

    def build_untrained(self) -> nn.Module:
        """Returns the same architecture with the checkpoint's weights and an untrained classifier."""
        name = self.source.name
        net = create(name, pretrained=self.source.pretrained, num_classes=self.spec.num_outputs, **self.build_args)
        if net.num_classes != self.spec.num_outputs:
            net.reset_classifier(self.spec.num_outputs)
        return net


def build(run: RunConfig, spec: HeadSpec) -> TimmModel:
    """Returns the timm network `run.model.name` with a classifier of `spec.num_outputs` outputs.

    Raises:
        ModelError: The name is unknown or the weights cannot be loaded.
    """
    config = run.model
    name = timm_name(config.name)
    net = create_network(config, spec.num_outputs)
    data_config = data_config_of(net, config.image_size)
    license = net.pretrained_cfg.get("license") if config.pretrained else None
    hub_id, revision = origin(name, net)
    source = Source(name, revision, config.pretrained, "timm", hub_id, license)
    net.to(memory_format=torch.channels_last)
    return TimmModel(net, ImageProcessor(data_config, run.data.augment), source, spec, _classifier_names(net))


def open_saved(folder: Path, spec: HeadSpec) -> TimmModel:
    """Returns the model in a folder written by `TimmModel.save`, its classifier as trained.

    One that was saved under a classic head has none: its place is where features come out.
    """
    name = f"local-dir:{folder}"
    net = create(name, pretrained=True)
    net.hftl_build_args = recorded_args(name)
    source = Source(name, None, True, "timm")
    head = _classifier_names(net) if net.num_classes else [net.pretrained_cfg["classifier"]]
    return TimmModel(net, ImageProcessor(data_config_of(net, None), AugmentConfig()), source, spec, head)


def create_network(config: ModelConfig, num_outputs: int) -> Any:
    """Returns the timm network itself, freshly headed, or without a classifier where `num_outputs` is 0.

    Raises:
        ModelError: As `build`.
    """
    problem = name_problem(config)
    if problem:
        raise ModelError(problem)
    name = timm_name(config.name)
    args = recorded_args(name)
    if config.dropout is not None:
        args["drop_rate"] = config.dropout
    if config.image_size is not None and takes_image_size(name, config.image_size):
        args["img_size"] = config.image_size
    try:
        net = create(name, pretrained=config.pretrained, num_classes=num_outputs, **args)
    except ModelError:
        raise
    except Exception as error:
        raise ModelError(
            f"model.name: '{config.name}' cannot be built"
            f"{' with its pretrained weights' if config.pretrained else ''}: {type(error).__name__}: {error}. "
            "Without a network, name a folder: local-dir:PATH (config.json and model.safetensors)."
        ) from error
    if config.pretrained and num_outputs:
        _fresh_head(net)
    net.hftl_build_args = args
    return net


def load_original(config: ModelConfig) -> Any:
    """Returns the network with the classifier that its checkpoint came with."""
    name = timm_name(config.name)
    return create(name, pretrained=True, **recorded_args(name))


def _fresh_head(net: Any) -> None:
    """Draws the classifier's weights anew, small.

    A checkpoint with as many classes would silently keep the old ones' weights, and several families draw new ones
    for 1,000 classes: 1 / sqrt(K) per weight (EfficientNets) starts two classes at logits of ten.
    """
    for name in _classifier_names(net):
        for module in net.get_submodule(name).modules():
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                nn.init.trunc_normal_(module.weight, std=0.01)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)


def _classifier_names(net: Any) -> list[str]:
    """Returns the dotted names of timm's classifier module(s)."""
    classifier = net.get_classifier()
    wanted = classifier if isinstance(classifier, (tuple, list)) else [classifier]
    names = [name for name, module in net.named_modules() if any(module is each for each in wanted)]
    if not names or not any(True for each in wanted for _ in each.parameters()):
        raise ModelError(f"model.name: {type(net).__name__} has no classifier that timm's get_classifier() can name.")
    return names
