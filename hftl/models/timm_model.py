"""Vision models: any timm name, `hf-hub:` repo id or `local-dir:` folder; saved for timm and transformers."""

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
    """timm network with a new classifier."""

    modality = "image"

    def forward(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """Returns `logits` [B, K] from `pixel_values` [B, C, H, W]."""
        # channels_last halves the time of convolutions on CPUs and on GPUs in bf16
        return {"logits": self.net(inputs["pixel_values"].contiguous(memory_format=torch.channels_last))}

    def save(self, folder: Path) -> None:
        """Writes timm's format, with changes that let transformers' TimmWrapper load the same folder."""
        from timm.models import save_for_hf

        labels = self._label_names()
        # timm >= 1.0.2x also records num_classes in model_args, and TimmWrapper then passes it twice
        save_for_hf(self.net, str(folder), model_config=labels, model_args=self.build_args, safe_serialization=True)
        path = folder / "config.json"
        config = json.loads(path.read_text())
        config.setdefault("model_args", {}).pop("num_classes", None)
        if not config["model_args"]:
            del config["model_args"]
        config["pretrained_cfg"] |= self._preprocessing()
        if self.spec.problem_type != "single_label_classification":
            config["problem_type"] = self.spec.problem_type  # read by transformers' pipeline, ignored by timm
        if self.sklearn_head is not None:  # timm's convention for networks without a classifier
            config["num_classes"] = config["pretrained_cfg"]["num_classes"] = 0
        if not self.source.pretrained:
            for key in ("tag", "license", "origin_url", "paper_ids", "paper_name"):
                config["pretrained_cfg"].pop(key, None)  # these describe pretrained weights, which were not used
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
        """Arguments that rebuild the same architecture, in addition to its name."""
        return self.net.hftl_build_args

    def loaders(self, path_or_repo_id: str | Path, revision: str | None = None) -> dict[str, ReloadedModel]:
        """Loads with timm's `local-dir:` or `hf-hub:`, and transformers' `AutoModelForImageClassification`."""
        import timm
        from transformers import AutoModel, AutoModelForImageClassification

        name = (
            f"local-dir:{path_or_repo_id}"
            if Path(path_or_repo_id).is_dir()
            else hub_name(str(path_or_repo_id), revision)
        )
        try:
            timm_net = timm.create_model(name, pretrained=True).eval()
        except Exception:
            if not Path(path_or_repo_id).is_dir():
                raise
            log(f"save: timm {timm.__version__} cannot load safetensors from local-dir: folders; newer versions can")
            timm_net = create(name, pretrained=True).eval()
        with quiet():
            auto, output = (AutoModelForImageClassification, "logits")
            if self.sklearn_head is not None:
                auto, output = (AutoModel, "pooler_output")
            options = {"revision": revision, "trust_remote_code": False, "use_safetensors": True}
            transformers_net = auto.from_pretrained(path_or_repo_id, **options).eval()
        return {
            "timm": lambda inputs: timm_net(inputs["pixel_values"]),
            "transformers": lambda inputs: transformers_net(**inputs)[output],
        }

    def build_untrained(self) -> nn.Module:
        """Builds the same architecture with the checkpoint's weights and an untrained classifier."""
        name = self.source.name
        net = create(name, pretrained=self.source.pretrained, num_classes=self.spec.num_outputs, **self.build_args)
        if net.num_classes != self.spec.num_outputs:
            net.reset_classifier(self.spec.num_outputs)
        return net


def build(run: RunConfig, spec: HeadSpec) -> TimmModel:
    """Builds the timm network `run.model.name` with a new classifier of `spec.num_outputs` outputs.

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
    """Loads a model saved by `TimmModel.save`, with its trained classifier.

    A model saved with a scikit-learn head has no classifier; its head module is then the one that returns features.
    """
    name = f"local-dir:{folder}"
    net = create(name, pretrained=True)
    net.hftl_build_args = recorded_args(name)
    source = Source(name, None, True, "timm")
    head = _classifier_names(net) if net.num_classes else [net.pretrained_cfg["classifier"]]
    return TimmModel(net, ImageProcessor(data_config_of(net, None), AugmentConfig()), source, spec, head)


def create_network(config: ModelConfig, num_outputs: int) -> Any:
    """Builds the timm network with a new classifier, or without a classifier if `num_outputs` is 0.

    Raises:
        ModelError: The name is unknown or the weights cannot be loaded.
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
            f"{' with pretrained weights' if config.pretrained else ''}: {type(error).__name__}: {error}. "
            "Without network access, set local-dir:PATH, a folder with config.json and model.safetensors."
        ) from error
    if config.pretrained and num_outputs:
        _reset_classifier(net)
    net.hftl_build_args = args
    return net


def load_original(config: ModelConfig) -> Any:
    """Loads the network with the pretrained classifier of its checkpoint."""
    name = timm_name(config.name)
    return create(name, pretrained=True, **recorded_args(name))


def _reset_classifier(net: Any) -> None:
    """Initializes the classifier with small random weights.

    timm keeps the pretrained classifier if the number of classes matches. Several families also initialize it for 1,000
    classes: with 1 / sqrt(K) per weight (EfficientNets), two classes start at logits of ten.
    """
    for name in _classifier_names(net):
        for module in net.get_submodule(name).modules():
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                nn.init.trunc_normal_(module.weight, std=0.01)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)


def _classifier_names(net: Any) -> list[str]:
    """Returns the dotted names of the classifier modules returned by timm's `get_classifier()`."""
    classifier = net.get_classifier()
    modules = classifier if isinstance(classifier, (tuple, list)) else [classifier]
    names = [name for name, module in net.named_modules() if any(module is each for each in modules)]
    if not names or not any(True for module in modules for _ in module.parameters()):
        raise ModelError(
            f"model.name: timm's get_classifier() returns no classifier of {type(net).__name__}. Choose another model."
        )
    return names
