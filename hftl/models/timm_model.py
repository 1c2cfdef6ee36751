"""Vision models: any timm name, `hf-hub:` id or `local-dir:` folder, saved so that timm and transformers open them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hftl.config.schema import AugmentConfig, ModelConfig
from hftl.console import say
from hftl.data.image import ImageProcessor
from hftl.errors import ModelError, nearest
from hftl.hub import cached_commit
from hftl.models.parts import HeadSpec, Reader, Source, TaskModel
from hftl.models.quiet import quiet
from hftl.models.remote_code import only_pickled


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
        if self.classic is not None:  # timm's way of saying that there is no classifier
            config["num_classes"] = config["pretrained_cfg"]["num_classes"] = 0
        if not self.source.pretrained:
            for claim in ("tag", "license", "origin_url", "paper_ids", "paper_name"):
                config["pretrained_cfg"].pop(claim, None)  # these describe weights that were not used
        path.write_text(json.dumps(config, indent=2))

    def stock_labels(self) -> list[str]:
        """Returns timm's `label_names`."""
        return list(self.net.pretrained_cfg.get("label_names") or [])

    def _label_names(self) -> dict[str, Any]:
        """Returns timm's config entries for the labels."""
        return {"label_names": list(self.spec.labels)} if self.spec.labels and self.classic is None else {}

    def _preprocessing(self) -> dict[str, Any]:
        config = self.processor.data_config
        keys = ("input_size", "interpolation", "mean", "std", "crop_pct", "crop_mode")
        return {key: list(config[key]) if isinstance(config[key], tuple) else config[key] for key in keys}

    @property
    def build_args(self) -> dict[str, Any]:
        """Arguments beside the name that rebuild the same architecture."""
        return self.net.hftl_build_args

    def readers(self, place: str | Path, revision: str | None = None) -> dict[str, Reader]:
        """Opens with timm's `local-dir:` or `hf-hub:`, and transformers' `AutoModelForImageClassification`."""
        import timm
        from transformers import AutoModel, AutoModelForImageClassification

        name = f"local-dir:{place}" if Path(place).is_dir() else hub_name(str(place), revision)
        try:
            by_timm = timm.create_model(name, pretrained=True).eval()
        except Exception:
            if not Path(place).is_dir():
                raise
            say(f"publish: timm {timm.__version__} does not read safetensors from local-dir: folders; newer ones do")
            by_timm = _create(name, pretrained=True).eval()
        with quiet():
            auto, output = (AutoModelForImageClassification, "logits")
            if self.classic is not None:
                auto, output = (AutoModel, "pooler_output")
            by_transformers = auto.from_pretrained(
                place, revision=revision, trust_remote_code=False, use_safetensors=True
            ).eval()
        return {
            "timm": lambda inputs: by_timm(inputs["pixel_values"]),
            "transformers": lambda inputs: by_transformers(**inputs)[output],
        }

    def fresh(self) -> nn.Module:
        """Returns the same architecture with the checkpoint's weights and an untrained classifier."""
        name = self.source.name
        net = _create(name, pretrained=self.source.pretrained, num_classes=self.spec.num_outputs, **self.build_args)
        if net.num_classes != self.spec.num_outputs:
            net.reset_classifier(self.spec.num_outputs)
        return net


def build_timm(config: ModelConfig, spec: HeadSpec, augment: AugmentConfig) -> TimmModel:
    """Returns the timm network `config.name` with a classifier of `spec.num_outputs` outputs.

    Raises:
        ModelError: The name is unknown or the weights cannot be loaded.
    """
    name = timm_name(config.name)
    net = create_network(config, spec.num_outputs)
    data_config = _data_config(net, config.image_size)
    licence = net.pretrained_cfg.get("license") if config.pretrained else None
    hub_id, revision = _origin(name, net)
    source = Source(name, revision, config.pretrained, "timm", hub_id, licence)
    net.to(memory_format=torch.channels_last)
    return TimmModel(net, ImageProcessor(data_config, augment), source, spec, _classifier_names(net))


def open_timm(folder: Path, spec: HeadSpec) -> TimmModel:
    """Returns the model in a folder written by `TimmModel.save`, its classifier as trained.

    One that was saved under a classic head has none: its place is where features come out.
    """
    name = f"local-dir:{folder}"
    net = _create(name, pretrained=True)
    net.hftl_build_args = _recorded_args(name)
    source = Source(name, None, True, "timm")
    head = _classifier_names(net) if net.num_classes else [net.pretrained_cfg["classifier"]]
    return TimmModel(net, ImageProcessor(_data_config(net, None), AugmentConfig()), source, spec, head)


def create_network(config: ModelConfig, num_outputs: int) -> Any:
    """Returns the timm network itself, freshly headed.

    Raises:
        ModelError: As `build_timm`.
    """
    problem = timm_name_problem(config.name)
    if problem:
        raise ModelError(problem)
    name = timm_name(config.name)
    args = _recorded_args(name)
    if config.dropout is not None:
        args["drop_rate"] = config.dropout
    if config.image_size is not None and _takes_image_size(name, config.image_size):
        args["img_size"] = config.image_size
    try:
        net = _create(name, pretrained=config.pretrained, num_classes=num_outputs, **args)
    except ModelError:
        raise
    except Exception as error:
        raise ModelError(
            f"model.name: '{config.name}' cannot be built"
            f"{' with its pretrained weights' if config.pretrained else ''}: {type(error).__name__}: {error}. "
            "Without a network, name a folder: local-dir:PATH (config.json and model.safetensors)."
        ) from error
    if config.pretrained:
        _fresh_head(net)
    net.hftl_build_args = args
    return net


def load_original(config: ModelConfig) -> Any:
    """Returns the network with the classifier that its checkpoint came with."""
    name = timm_name(config.name)
    return _create(name, pretrained=True, **_recorded_args(name))


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


def timm_name(name: str) -> str:
    """Returns the name as timm takes it: embedded models are folders, `timm/x` is a hub id."""
    if name.startswith("embedded:"):
        from hftl.embedded import model_folder

        return f"local-dir:{model_folder(name.removeprefix('embedded:'))}"
    return f"hf-hub:{name}" if name.startswith("timm/") else name


def hub_name(repo: str, revision: str | None) -> str:
    """Returns the name under which timm opens a hub repository, at a commit if one is given."""
    return f"hf-hub:{repo}@{revision}" if revision else f"hf-hub:{repo}"


def _origin(name: str, net: Any) -> tuple[str | None, str | None]:
    """Returns the hub id and the commit that the weights of `net` came from, as far as they are known."""
    kind, _, rest = name.partition(":")
    if kind == "local-dir":
        return None, None
    repo, _, revision = (rest or net.pretrained_cfg.get("hf_hub_id") or "").partition("@")
    return (repo, cached_commit(repo, revision or None)) if repo else (None, None)


def timm_name_problem(name: str) -> str | None:
    """Returns what is wrong with a model name, without building anything or using a network; None if nothing."""
    import timm

    from hftl.embedded import MODELS

    kind, _, rest = name.partition(":")
    if kind == "embedded" and rest not in MODELS:
        return f"model.name: embedded models are {', '.join(MODELS)}, not '{rest}'.{nearest(rest, MODELS)}"
    if kind == "local-dir":
        fine = (Path(rest) / "config.json").is_file()
        return None if fine else f"model.name: '{rest}' is not a folder with config.json."
    if rest or name.startswith("timm/"):
        known = kind in ("hf-hub", "hf_hub", "embedded") or name.startswith("timm/")
        return None if known else f"model.name: '{kind}:' is not a source; allowed: hf-hub:, local-dir:, embedded:."
    if timm.is_model(name):
        tag = name.partition(".")[2]
        tags = [entry.partition(".")[2] for entry in timm.list_pretrained(name.partition(".")[0] + ".*")]
        if tag and tag not in tags:
            return f"model.name: '{name}' has no weights '{tag}'; there are {', '.join(tags)}.{nearest(tag, tags)}"
        return None
    if Path(name).is_dir():
        return f"model.name: '{name}' is a folder: say local-dir:{name}"
    return f"model.name: timm has no model '{name}'.{nearest(name, timm.list_models(), 3)}"


def _create(name: str, **options: Any) -> Any:
    """Calls timm's factory, which would take a pickle where there is nothing better: here there must be safetensors."""
    import timm

    if options.get("pretrained"):
        weights = _safe_weights(name)
        if weights is not None:  # a folder: timm 1.0.19 unpickles whatever it finds
            options["pretrained_cfg_overlay"] = {"source": "", "file": str(weights)}
    return timm.create_model(name, **options)


def _safe_weights(name: str) -> Path | None:
    """Makes sure that the pretrained weights are safetensors; returns their file where `name` is a folder.

    Raises:
        ModelError: There is a pickle only.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
    from timm.models._hub import load_model_config_from_hf

    kind, _, rest = name.partition(":")
    if kind == "local-dir":
        weights = Path(rest) / "model.safetensors"
        if not weights.is_file():
            files = [
                file.name for file in Path(rest).iterdir() if file.suffix in (".bin", ".pth", ".pt", ".npz", ".tar")
            ]
            raise ModelError(
                only_pickled(name, files[0]) if files else f"model.name: '{rest}' holds no model.safetensors."
            )
        return weights
    described: Any = load_model_config_from_hf(rest)[0] if rest else _pretrained_cfg(name)
    repo, _, revision = (rest or described.get("hf_hub_id") or "").partition("@")
    file = described.get("hf_hub_filename") or "pytorch_model.bin"
    if not repo:
        raise ModelError(only_pickled(name, described.get("url") or "no address"))
    safe = file if file.endswith(".safetensors") else None
    tried = [safe] if safe else ["model.safetensors", *([file.rpartition(".")[0] + ".safetensors"])]
    for attempt in tried:
        try:
            hf_hub_download(repo, attempt, revision=revision or None)
            return None  # timm looks for the same names first
        except LocalEntryNotFoundError:
            if attempt == tried[-1]:
                raise
        except EntryNotFoundError:
            continue
    raise ModelError(only_pickled(name, file))


def _pretrained_cfg(name: str) -> dict[str, Any]:
    import timm

    found = timm.get_pretrained_cfg(name)
    return found.to_dict() if found else {}


def _recorded_args(name: str) -> dict[str, Any]:
    """Returns the arguments that a folder's or hub repository's own config.json asks for."""
    from timm.models._hub import load_model_config_from_hf, load_model_config_from_path

    kind, _, rest = name.partition(":")
    load = {"local-dir": load_model_config_from_path, "hf-hub": load_model_config_from_hf}.get(kind)
    _, _, args = load(rest) if load else (None, None, None)
    return {key: value for key, value in (args or {}).items() if key != "num_classes"}


def _takes_image_size(name: str, size: int) -> bool:
    """Whether the architecture must be told its input size (ViTs with fixed positions), rather than take any."""
    with torch.device("meta"):
        try:
            _create(name, pretrained=False, img_size=size)
        except TypeError:
            return False
        except Exception:
            return True
    return True


def _data_config(net: Any, image_size: int | None) -> dict[str, Any]:
    from timm.data import resolve_data_config

    config = resolve_data_config(dict(net.pretrained_cfg), model=None, verbose=False)
    if image_size is not None:
        config["input_size"] = (config["input_size"][0], image_size, image_size)
    return config


def _classifier_names(net: Any) -> list[str]:
    """Returns the dotted names of timm's classifier module(s)."""
    classifier = net.get_classifier()
    wanted = classifier if isinstance(classifier, (tuple, list)) else [classifier]
    names = [name for name, module in net.named_modules() if any(module is each for each in wanted)]
    if not names or not any(True for each in wanted for _ in each.parameters()):
        raise ModelError(f"model.name: {type(net).__name__} has no classifier that timm's get_classifier() can name.")
    return names
