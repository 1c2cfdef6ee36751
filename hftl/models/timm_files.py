"""timm models by name, repo id or folder: names, weight files, build arguments and preprocessing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from hftl.config.schema import ModelConfig
from hftl.errors import ModelError, nearest
from hftl.hub_client import cached_commit
from hftl.models.remote_code import only_pickled


def timm_name(name: str) -> str:
    """Converts a model name to timm's format: `embedded:` to `local-dir:`, `timm/…` to `hf-hub:timm/…`."""
    if name.startswith("embedded:"):
        from hftl.embedded import model_folder

        return f"local-dir:{model_folder(name.removeprefix('embedded:'))}"
    return f"hf-hub:{name}" if name.startswith("timm/") else name


def hub_name(repo: str, revision: str | None) -> str:
    """Returns timm's name of a Hub repository, pinned to `revision` if it is not None."""
    return f"hf-hub:{repo}@{revision}" if revision else f"hf-hub:{repo}"


def name_problem(config: ModelConfig) -> str | None:
    """Returns an error message if the model name is invalid, else None. Builds nothing and uses no network."""
    import timm

    from hftl.embedded import MODELS

    name = config.name
    kind, _, rest = name.partition(":")
    if kind == "embedded" and rest not in MODELS:
        return (
            f"model.name: embedded model '{rest}' does not exist; allowed: {', '.join(MODELS)}.{nearest(rest, MODELS)}"
        )
    if kind == "local-dir":
        has_config = (Path(rest) / "config.json").is_file()
        return None if has_config else f"model.name: '{rest}' is not a folder with config.json."
    if rest or name.startswith("timm/"):
        is_known = kind in ("hf-hub", "hf_hub", "embedded") or name.startswith("timm/")
        return None if is_known else f"model.name: unknown prefix '{kind}:'; allowed: hf-hub:, local-dir:, embedded:."
    if timm.is_model(name):
        tag = name.partition(".")[2]
        tags = [entry.partition(".")[2] for entry in timm.list_pretrained(name.partition(".")[0] + ".*")]
        if tag and tag not in tags:
            return f"model.name: '{name}' has no weights '{tag}'; allowed: {', '.join(tags)}.{nearest(tag, tags)}"
        return None
    if Path(name).is_dir():
        return f"model.name: '{name}' is a folder. Set local-dir:{name}."
    return f"model.name: timm has no model '{name}'.{nearest(name, timm.list_models(), 3)}"


def create(name: str, **options: Any) -> Any:
    """Calls `timm.create_model`, but rejects pretrained weights that exist only as a pickle.

    Raises:
        ModelError: There are no weights in safetensors format.
    """
    import timm

    if options.get("pretrained"):
        weights = _safe_weights(name)
        if weights is not None:  # timm 1.0.19 unpickles weights in folders
            options["pretrained_cfg_overlay"] = {"source": "", "file": str(weights)}
    return timm.create_model(name, **options)


def _safe_weights(name: str) -> Path | None:
    """Checks that the pretrained weights are in safetensors format, and returns their file if `name` is a folder.

    Raises:
        ModelError: The weights are missing or exist only as a pickle.
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
                only_pickled(name, files[0]) if files else f"model.name: '{rest}' has no model.safetensors."
            )
        return weights
    config: Any = load_model_config_from_hf(rest)[0] if rest else _pretrained_cfg(name)
    repo, _, revision = (rest or config.get("hf_hub_id") or "").partition("@")
    file = config.get("hf_hub_filename") or "pytorch_model.bin"
    if not repo:
        raise ModelError(only_pickled(name, config.get("url") or "no URL"))
    candidates = ["model.safetensors", file.rpartition(".")[0] + ".safetensors"]
    if file.endswith(".safetensors"):
        candidates = [file]
    for candidate in candidates:
        try:
            hf_hub_download(repo, candidate, revision=revision or None)
            return None  # timm tries the same names first
        except LocalEntryNotFoundError:
            if candidate == candidates[-1]:
                raise
        except EntryNotFoundError:
            continue
    raise ModelError(only_pickled(name, file))


def _pretrained_cfg(name: str) -> dict[str, Any]:
    import timm

    config = timm.get_pretrained_cfg(name)
    return config.to_dict() if config else {}


def recorded_args(name: str) -> dict[str, Any]:
    """Returns the build arguments (`model_args`) recorded in config.json of a folder or Hub repository, else {}."""
    from timm.models._hub import load_model_config_from_hf, load_model_config_from_path

    kind, _, rest = name.partition(":")
    load = {"local-dir": load_model_config_from_path, "hf-hub": load_model_config_from_hf}.get(kind)
    _, _, args = load(rest) if load else (None, None, None)
    return {key: value for key, value in (args or {}).items() if key != "num_classes"}


def takes_image_size(name: str, size: int | list[int]) -> bool:
    """Whether the architecture needs its input size as argument `img_size` (ViTs with fixed position embeddings)."""
    with torch.device("meta"):
        try:
            create(name, pretrained=False, img_size=size)
        except TypeError:
            return False
        except Exception:
            return True
    return True


def data_config_of(net: Any, image_size: int | list[int] | None) -> dict[str, Any]:
    """Returns timm's data config of a network (input size, mean, std, interpolation, crop).

    Args:
        net: timm network.
        image_size: Side, or (height, width), in pixels; None: the recorded size.
    """
    from timm.data import resolve_data_config

    config = resolve_data_config(dict(net.pretrained_cfg), model=None, verbose=False)
    if image_size is not None:
        sides = (image_size, image_size) if isinstance(image_size, int) else image_size
        config["input_size"] = (config["input_size"][0], *sides)
    return config


def check_channels_first(net: Any, name: str) -> None:
    """Raises ModelError for feature maps [B, H, W, C], which transformers' TimmBackbone does not transpose."""
    if str(getattr(net, "output_fmt", "NCHW")).rpartition(".")[2] != "NCHW":
        raise ModelError(
            f"model.name: '{name}' returns channels-last feature maps, which transformers' TimmBackbone does not "
            "support. Choose a channels-first network, such as most ConvNets and ViTs."
        )


def origin(name: str, net: Any) -> tuple[str | None, str | None]:
    """Returns repo id and commit of the weights of `net`; None for unknown ones."""
    kind, _, rest = name.partition(":")
    if kind == "local-dir":
        return None, None
    repo, _, revision = (rest or net.pretrained_cfg.get("hf_hub_id") or "").partition("@")
    return (repo, cached_commit(repo, revision or None)) if repo else (None, None)
