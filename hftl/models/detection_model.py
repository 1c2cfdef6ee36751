"""Object detectors: RT-DETR with a timm backbone, or any transformers detector by repo id or folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hftl.config.schema import ModelConfig, RunConfig
from hftl.errors import ModelError, first_line
from hftl.models.checkpoint_metadata import checkpoint_source, read_checkpoint_json
from hftl.models.checkpoint_metadata import name_problem as checkpoint_problem
from hftl.models.remote_code import check_files
from hftl.models.rt_detr import build_rt_detr, label_mappings
from hftl.models.suppress_warnings import quiet
from hftl.models.task_model import HeadSpec, ReloadedModel, Source, TaskModel, compared_outputs
from hftl.models.timm_files import name_problem as timm_problem
from hftl.preprocessing.joint_transforms import GeometryProcessor

SORTED_OUTPUTS = ("ordered_logits", "ordered_boxes")


class DetectionModel(TaskModel):
    """Detector that predicts a set of boxes.

    Args:
        *parts: Arguments of `TaskModel`.
        make: Returns the transformers network as built before training.
    """

    modality = "image"
    compared = SORTED_OUTPUTS

    def __init__(self, *parts: Any, make: Callable[[], nn.Module]) -> None:
        super().__init__(*parts)
        self.make = make

    def forward(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """Returns `logits` [B, Q, K] (or K + 1, the last for no object) and `pred_boxes` [B, Q, 4].

        Boxes are normalized (center x, center y, width, height) in [0, 1]. Also returns the outputs of `compared`, and
        `layer_logits` [B, L, Q, K] and `layer_boxes` [B, L, Q, 4] of the layers before the last, if the transformers
        class returns them.
        """
        pixels = inputs["pixel_values"]
        outputs = self.net(pixel_values=pixels.contiguous(memory_format=_memory_format(self.net)))
        predictions = {"logits": outputs.logits, "pred_boxes": outputs.pred_boxes}
        logits, boxes = outputs.get("intermediate_logits"), outputs.get("intermediate_reference_points")
        if logits is not None and boxes is not None and outputs.get("enc_topk_logits") is not None:
            predictions["layer_logits"] = torch.cat([outputs.enc_topk_logits[:, None], logits[:, :-1]], 1)
            predictions["layer_boxes"] = torch.cat([outputs.enc_topk_bboxes[:, None], boxes[:, :-1]], 1)
        return predictions | sort_outputs(outputs)

    def save(self, folder: Path) -> None:
        """Writes weights, config and image processor."""
        with quiet():
            self.net.save_pretrained(folder)
            self.processor.save(folder)

    def loaders(self, path_or_repo_id: str | Path, revision: str | None = None) -> dict[str, ReloadedModel]:
        """Loads with `AutoModelForObjectDetection`."""
        from transformers import AutoModelForObjectDetection

        options = {"revision": revision, "trust_remote_code": False, "use_safetensors": True}
        with quiet():
            net = AutoModelForObjectDetection.from_pretrained(path_or_repo_id, **options).eval()
        return {"transformers": lambda inputs: compared_outputs(sort_outputs(net(**inputs)), SORTED_OUTPUTS)}

    def original_labels(self) -> list[str]:
        """Returns transformers' `id2label` in order."""
        return [label for _, label in sorted(self.net.config.id2label.items())]

    def build_untrained(self) -> nn.Module:
        """Builds the same class with the checkpoint's weights and untrained new layers."""
        with quiet():
            return self.make()


def sort_outputs(outputs: Any) -> dict[str, Tensor]:
    """Returns `logits` and `pred_boxes`, each sorted in ascending order along the queries Q, independently per column.

    The order of queries follows candidate scores, so rounding can swap queries with nearly equal scores. Sorted outputs
    are equal for equal detections in any order.
    """
    return dict(zip(SORTED_OUTPUTS, (outputs[name].sort(1).values for name in ("logits", "pred_boxes")), strict=True))


def build(run: RunConfig, spec: HeadSpec) -> DetectionModel:
    """Builds the detector `run.model.name` for the classes `spec.labels`.

    A timm name (or `hf-hub:` id, or `local-dir:` folder) selects RT-DETR with that backbone: all other layers are new.
    A repo id or folder of transformers selects a pretrained detector: only its class layers are new.

    Raises:
        ModelError: The name is unknown, the weights cannot be loaded, or the model does not support detection.
    """
    config = run.model
    problem = name_problem(config)
    if problem:
        raise ModelError(problem)
    if is_checkpoint(config.name):
        return _from_checkpoint(run, spec)
    detector = build_rt_detr(config, spec)
    processor = GeometryProcessor(detector.data_config, run.data.augment, "RTDetrImageProcessor")
    detector.net.to(memory_format=torch.channels_last)
    parts = (detector.net, processor, detector.source, spec, detector.head, detector.root)
    return DetectionModel(*parts, make=lambda: build_rt_detr(config, spec).net)


def open_saved(folder: Path, spec: HeadSpec) -> DetectionModel:
    """Loads a model saved by `DetectionModel.save`. Runs no code from the folder."""
    from transformers import AutoModelForObjectDetection

    check_files(ModelConfig(name=str(folder)), lambda file: read_checkpoint_json(ModelConfig(name=str(folder)), file))

    def make() -> nn.Module:
        options = {"trust_remote_code": False, "use_safetensors": True}
        return AutoModelForObjectDetection.from_pretrained(folder, **options)

    with quiet():
        net = make()
    source = Source(str(folder), None, True, "transformers")
    return DetectionModel(net, GeometryProcessor.open(folder), source, spec, class_layers(net), make=make)


def name_problem(config: ModelConfig) -> str | None:
    """Returns an error message if the name is invalid, else None. Builds nothing and uses no network."""
    if not is_checkpoint(config.name):
        return timm_problem(config)
    problem = checkpoint_problem(config)
    if problem or not Path(config.name).expanduser().is_dir():
        return problem
    from transformers.models.auto.modeling_auto import MODEL_FOR_OBJECT_DETECTION_MAPPING_NAMES as DETECTORS

    model_type = (read_checkpoint_json(config, "config.json") or {}).get("model_type")
    if model_type in DETECTORS:
        return None
    return f"model.name: model type '{model_type}' of '{config.name}' has no object detector in transformers."


def is_checkpoint(name: str) -> bool:
    """Whether a name refers to a transformers detector rather than a timm backbone."""
    return ":" not in name and not name.startswith("timm/") and ("/" in name or Path(name).is_dir())


def _from_checkpoint(run: RunConfig, spec: HeadSpec) -> DetectionModel:
    """Builds the pretrained detector `run.model.name` with new class layers."""
    config = run.model
    check_files(config, lambda file: read_checkpoint_json(config, file))

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
    return DetectionModel(net.float(), processor, checkpoint_source(config), spec, class_layers(net), make=make)


def _load(config: ModelConfig, spec: HeadSpec) -> Any:
    from transformers import AutoConfig, AutoModelForObjectDetection

    options: dict[str, Any] = {"revision": config.revision, "trust_remote_code": False}
    net_config = AutoConfig.from_pretrained(config.name, **options)
    for key, value in label_mappings(spec).items():
        setattr(net_config, key, value)
    if hasattr(net_config, "num_denoising"):
        net_config.num_denoising = 0  # denoising queries need labels in the forward pass
    if not config.pretrained:
        return AutoModelForObjectDetection.from_config(net_config, trust_remote_code=False)
    options |= {"config": net_config, "ignore_mismatched_sizes": True, "use_safetensors": True}
    net = AutoModelForObjectDetection.from_pretrained(config.name, **options)
    for name in class_layers(net):  # also if the number of classes matches: the classes differ
        for module in net.get_submodule(name).modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.01)
                # initial scores near 0.01: confident background would dominate focal losses (RetinaNet, section 4.1)
                nn.init.constant_(module.bias, 0.0 if module.out_features > spec.num_outputs else -4.6)
    return net


def class_layers(net: Any) -> list[str]:
    """Returns the names of the layers whose shape depends on the number of classes: the head of a detector."""
    from copy import deepcopy

    shapes = []
    for extra_classes in (0, 1):
        config = deepcopy(net.config)
        config.id2label = dict(enumerate(map(str, range(len(net.config.id2label) + extra_classes))))
        with torch.device("meta"):
            shapes.append({name: value.shape for name, value in type(net)(config).named_parameters()})
    return sorted({name.rpartition(".")[0] for name, shape in shapes[0].items() if shapes[1].get(name) != shape})


def _processor(run: RunConfig) -> GeometryProcessor:
    """Returns the preprocessing of the checkpoint, with one input size for all images."""
    from transformers import AutoImageProcessor

    image_processor: Any = AutoImageProcessor.from_pretrained(run.model.name, revision=run.model.revision)
    size = dict(image_processor.size)
    edge = size.get("shortest_edge") or size.get("height")
    input_size = run.model.image_size or [size.get("height") or edge, size.get("width") or edge]
    sides = [input_size, input_size] if isinstance(input_size, int) else input_size
    normalizes = bool(image_processor.do_normalize)
    config = {
        "input_size": (3, *sides),
        "interpolation": "bilinear",
        "mean": tuple(image_processor.image_mean) if normalizes else (0.0, 0.0, 0.0),
        "std": tuple(image_processor.image_std) if normalizes else (1.0, 1.0, 1.0),
    }
    class_name = type(image_processor).__name__.removesuffix("Fast").removesuffix("Pil")
    return GeometryProcessor(config, run.data.augment, class_name, {"do_pad": False})


def _memory_format(net: nn.Module) -> torch.memory_format:
    """Returns the memory format of the convolution weights; inputs in another one are converted at every layer."""
    weight = next((weight for weight in net.parameters() if weight.ndim == 4 and weight.shape[-1] > 1), None)
    if weight is not None and weight.is_contiguous(memory_format=torch.channels_last) and not weight.is_contiguous():
        return torch.channels_last
    return torch.contiguous_format
