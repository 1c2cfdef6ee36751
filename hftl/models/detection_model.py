"""Object detectors: RT-DETR over a timm backbone, or any detector that transformers has, by hub id or folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hftl.config.schema import ModelConfig, RunConfig
from hftl.errors import ModelError, first_line
from hftl.models.checkpoint_metadata import name_problem as checkpoint_problem
from hftl.models.checkpoint_metadata import read_json, source_of
from hftl.models.remote_code import check_files
from hftl.models.rt_detr import build_rt_detr, label_names
from hftl.models.suppress_warnings import quiet
from hftl.models.task_model import HeadSpec, ReloadedModel, Source, TaskModel, compared_outputs
from hftl.models.timm_files import name_problem as timm_problem
from hftl.preprocessing.joint_transforms import GeometryProcessor

ORDERED = ("ordered_logits", "ordered_boxes")


class DetectionModel(TaskModel):
    """A network that predicts a set of boxes.

    Args:
        make: Returns the stock network as built before training.
    """

    modality = "image"
    compared = ORDERED

    def __init__(self, *parts: Any, make: Callable[[], nn.Module]) -> None:
        super().__init__(*parts)
        self.make = make

    def forward(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """Returns `logits` [B, Q, K] (or K + 1, the last for no object) and `pred_boxes` [B, Q, 4].

        Boxes are centre, width and height in shares of the image. Also `layer_logits` [B, L, Q, K] and `layer_boxes`
        [B, L, Q, 4] of the layers before the last, where the stock class gives them; and what is `compared`.
        """
        pixels = inputs["pixel_values"]
        outputs = self.net(pixel_values=pixels.contiguous(memory_format=_layout(self.net)))
        found = {"logits": outputs.logits, "pred_boxes": outputs.pred_boxes}
        logits, boxes = outputs.get("intermediate_logits"), outputs.get("intermediate_reference_points")
        if logits is not None and boxes is not None and outputs.get("enc_topk_logits") is not None:
            found["layer_logits"] = torch.cat([outputs.enc_topk_logits[:, None], logits[:, :-1]], 1)
            found["layer_boxes"] = torch.cat([outputs.enc_topk_bboxes[:, None], boxes[:, :-1]], 1)
        return found | ordered(outputs)

    def save(self, folder: Path) -> None:
        """Writes weights, config and image processor."""
        with quiet():
            self.net.save_pretrained(folder)
            self.processor.save(folder)

    def loaders(self, place: str | Path, revision: str | None = None) -> dict[str, ReloadedModel]:
        """Opens with `AutoModelForObjectDetection`."""
        from transformers import AutoModelForObjectDetection

        options = {"revision": revision, "trust_remote_code": False, "use_safetensors": True}
        with quiet():
            net = AutoModelForObjectDetection.from_pretrained(place, **options).eval()
        return {"transformers": lambda inputs: compared_outputs(ordered(net(**inputs)), ORDERED)}

    def original_labels(self) -> list[str]:
        """Returns transformers' `id2label` in order."""
        return [label for _, label in sorted(self.net.config.id2label.items())]

    def build_untrained(self) -> nn.Module:
        """Returns the same class with the checkpoint's weights and untrained new parts."""
        with quiet():
            return self.make()


def ordered(outputs: Any) -> dict[str, Tensor]:
    """Returns `logits` and `pred_boxes` with each column [Q] in ascending order.

    Which query comes first is decided by scores of candidates, and where two of them are equal but for rounding, by
    that: the same detections in another order are the same.
    """
    return dict(zip(ORDERED, (outputs[name].sort(1).values for name in ("logits", "pred_boxes")), strict=True))


def build(run: RunConfig, spec: HeadSpec) -> DetectionModel:
    """Returns the detector that `run.model.name` says, for `spec.labels`.

    A timm name (or `hf-hub:` id, or `local-dir:` folder) gives RT-DETR over that backbone: everything but the backbone
    is new. A hub id or folder of transformers is fine-tuned: its class layers alone are new.

    Raises:
        ModelError: The name is unknown, the weights cannot be loaded, or the model does not fit detection.
    """
    config = run.model
    problem = name_problem(config)
    if problem:
        raise ModelError(problem)
    if is_checkpoint(config.name):
        return _from_checkpoint(run, spec)
    made = build_rt_detr(config, spec)
    processor = GeometryProcessor(made.data_config, run.data.augment, "RTDetrImageProcessor")
    made.net.to(memory_format=torch.channels_last)
    parts = (made.net, processor, made.source, spec, made.head, made.root)
    return DetectionModel(*parts, make=lambda: build_rt_detr(config, spec).net)


def open_saved(folder: Path, spec: HeadSpec) -> DetectionModel:
    """Returns the model in a folder written by `DetectionModel.save`. No code in the folder runs."""
    from transformers import AutoModelForObjectDetection

    check_files(ModelConfig(name=str(folder)), lambda file: read_json(ModelConfig(name=str(folder)), file))

    def make() -> nn.Module:
        options = {"trust_remote_code": False, "use_safetensors": True}
        return AutoModelForObjectDetection.from_pretrained(folder, **options)

    with quiet():
        net = make()
    source = Source(str(folder), None, True, "transformers")
    return DetectionModel(net, GeometryProcessor.open(folder), source, spec, class_layers(net), make=make)


def name_problem(config: ModelConfig) -> str | None:
    """Returns what is wrong with the name, without building anything or using a network; None if nothing."""
    if not is_checkpoint(config.name):
        return timm_problem(config)
    problem = checkpoint_problem(config)
    if problem or not Path(config.name).expanduser().is_dir():
        return problem
    from transformers.models.auto.modeling_auto import MODEL_FOR_OBJECT_DETECTION_MAPPING_NAMES as DETECTORS

    kind = (read_json(config, "config.json") or {}).get("model_type")
    if kind in DETECTORS:
        return None
    return f"model.name: '{config.name}' is a '{kind}', and transformers has no object detector of that kind."


def is_checkpoint(name: str) -> bool:
    """Whether a name means a detector of transformers rather than a backbone of timm."""
    return ":" not in name and not name.startswith("timm/") and ("/" in name or Path(name).is_dir())


def _from_checkpoint(run: RunConfig, spec: HeadSpec) -> DetectionModel:
    """Returns the detector `run.model.name` with new class layers."""
    config = run.model
    check_files(config, lambda file: read_json(config, file))

    def make() -> Any:
        return _load(config, spec)

    try:
        with quiet():
            net = make()
            processor = _processor(run)
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise ModelError(
            f"model.name: '{config.name}' cannot be built as an object detector: {type(error).__name__}: "
            f"{first_line(error)}"
        ) from error
    return DetectionModel(net.float(), processor, source_of(config), spec, class_layers(net), make=make)


def _load(config: ModelConfig, spec: HeadSpec) -> Any:
    from transformers import AutoConfig, AutoModelForObjectDetection

    options: dict[str, Any] = {"revision": config.revision, "trust_remote_code": False}
    described = AutoConfig.from_pretrained(config.name, **options)
    for key, value in label_names(spec).items():
        setattr(described, key, value)
    if hasattr(described, "num_denoising"):
        described.num_denoising = 0  # its queries would need the labels in the forward pass
    if not config.pretrained:
        return AutoModelForObjectDetection.from_config(described, trust_remote_code=False)
    options |= {"config": described, "ignore_mismatched_sizes": True, "use_safetensors": True}
    net = AutoModelForObjectDetection.from_pretrained(config.name, **options)
    for name in class_layers(net):  # also where the checkpoint has as many classes: they are others
        for module in net.get_submodule(name).modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.01)
                # scores begin near 0.01: focal losses would drown in confident background (RetinaNet, section 4.1)
                nn.init.constant_(module.bias, 0.0 if module.out_features > spec.num_outputs else -4.6)
    return net


def class_layers(net: Any) -> list[str]:
    """Returns the layers of a detector whose size is given by the number of classes: they are the head."""
    from copy import deepcopy

    shapes = []
    for more in (0, 1):
        config = deepcopy(net.config)
        config.id2label = dict(enumerate(map(str, range(len(net.config.id2label) + more))))
        with torch.device("meta"):
            shapes.append({name: value.shape for name, value in type(net)(config).named_parameters()})
    return sorted({name.rpartition(".")[0] for name, shape in shapes[0].items() if shapes[1].get(name) != shape})


def _processor(run: RunConfig) -> GeometryProcessor:
    """Returns how the checkpoint takes images, at one size for all."""
    from transformers import AutoImageProcessor

    model_class: Any = AutoImageProcessor.from_pretrained(run.model.name, revision=run.model.revision)
    size = dict(model_class.size)
    edge = size.get("shortest_edge") or size.get("height")
    wanted = run.model.image_size or [size.get("height") or edge, size.get("width") or edge]
    sides = [wanted, wanted] if isinstance(wanted, int) else wanted
    normalised = bool(model_class.do_normalize)
    config = {
        "input_size": (3, *sides),
        "interpolation": "bilinear",
        "mean": tuple(model_class.image_mean) if normalised else (0.0, 0.0, 0.0),
        "std": tuple(model_class.image_std) if normalised else (1.0, 1.0, 1.0),
    }
    kind = type(model_class).__name__.removesuffix("Fast").removesuffix("Pil")
    return GeometryProcessor(config, run.data.augment, kind, {"do_pad": False})


def _layout(net: nn.Module) -> torch.memory_format:
    """Returns the layout of the network's convolutions: images in another one would be turned at every layer."""
    weight = next((weight for weight in net.parameters() if weight.ndim == 4 and weight.shape[-1] > 1), None)
    if weight is not None and weight.is_contiguous(memory_format=torch.channels_last) and not weight.is_contiguous():
        return torch.channels_last
    return torch.contiguous_format
