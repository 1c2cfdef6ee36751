"""timm's names and what lies behind them: a network by name, hub id or folder, its arguments and preprocessing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from hftl.config.schema import ModelConfig
from hftl.errors import ModelError, nearest
from hftl.hub_client import cached_commit
from hftl.models.remote_code import only_pickled


def timm_name(name: str) -> str:
    """Returns the name as timm takes it: embedded models are folders, `timm/x` is a hub id."""
    if name.startswith("embedded:"):
        from hftl.embedded import model_folder

        return f"local-dir:{model_folder(name.removeprefix('embedded:'))}"
    return f"hf-hub:{name}" if name.startswith("timm/") else name


def hub_name(repo: str, revision: str | None) -> str:
    """Returns the name under which timm opens a hub repository, at a commit if one is given."""
    return f"hf-hub:{repo}@{revision}" if revision else f"hf-hub:{repo}"


def name_problem(config: ModelConfig) -> str | None:
    """Returns what is wrong with a model name, without building anything or using a network; None if nothing."""
    import timm

    from hftl.embedded import MODELS

    name = config.name
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


def create(name: str, **options: Any) -> Any:
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


def recorded_args(name: str) -> dict[str, Any]:
    """Returns the arguments that a folder's or hub repository's own config.json asks for."""
    from timm.models._hub import load_model_config_from_hf, load_model_config_from_path

    kind, _, rest = name.partition(":")
    load = {"local-dir": load_model_config_from_path, "hf-hub": load_model_config_from_hf}.get(kind)
    _, _, args = load(rest) if load else (None, None, None)
    return {key: value for key, value in (args or {}).items() if key != "num_classes"}


def takes_image_size(name: str, size: int | list[int]) -> bool:
    """Whether the architecture must be told its input size (ViTs with fixed positions), rather than take any."""
    with torch.device("meta"):
        try:
            create(name, pretrained=False, img_size=size)
        except TypeError:
            return False
        except Exception:
            return True
    return True


def data_config_of(net: Any, image_size: int | list[int] | None) -> dict[str, Any]:
    """Returns how images become the network's input, as timm records it.

    Args:
        net: The network.
        image_size: A side or (height, width) in pixels, in place of the recorded ones.
    """
    from timm.data import resolve_data_config

    config = resolve_data_config(dict(net.pretrained_cfg), model=None, verbose=False)
    if image_size is not None:
        sides = (image_size, image_size) if isinstance(image_size, int) else image_size
        config["input_size"] = (config["input_size"][0], *sides)
    return config


def check_channels_first(net: Any, name: str) -> None:
    """Raises ModelError where feature maps are [B, H, W, C], which transformers' TimmBackbone passes on unturned."""
    if str(getattr(net, "output_fmt", "NCHW")).rpartition(".")[2] != "NCHW":
        raise ModelError(
            f"model.name: '{name}' has channels last, which transformers' TimmBackbone cannot take; most ConvNets and "
            "ViTs have them first."
        )


def origin(name: str, net: Any) -> tuple[str | None, str | None]:
    """Returns the hub id and the commit that the weights of `net` came from, as far as they are known."""
    kind, _, rest = name.partition(":")
    if kind == "local-dir":
        return None, None
    repo, _, revision = (rest or net.pretrained_cfg.get("hf_hub_id") or "").partition("@")
    return (repo, cached_commit(repo, revision or None)) if repo else (None, None)
