"""Code and pickles that a checkpoint brings along: what may run, and what never does.

A repository can hold Python (`auto_map`), name kernels to fetch (`attn_implementation`), or have its weights in a
pickle, which is code too. None of it is needed for the models that transformers and timm know. Pickles are never
opened. Python runs where `model.trust_remote_code` says so, and from the hub only at a commit: code that nobody can
change afterwards. timm runs no code of repositories at all.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hftl.config.schema import ModelConfig
from hftl.errors import ArtifactError, ModelError, shorten

COMMIT = re.compile(r"[0-9a-f]{40}")
_KERNELS = ("attn_implementation", "_attn_implementation", "_attn_implementation_internal", "experts_implementation")
_TEXT_CLASSES = ("AutoConfig", "AutoModel", "AutoModelForSequenceClassification", "AutoTokenizer")


def trust_problem(config: ModelConfig) -> str | None:
    """Returns what is wrong with the settings of trust, without a network; None if nothing."""
    if not config.trust_remote_code or Path(config.name).expanduser().is_dir() or config.name.startswith("local-dir:"):
        return None
    if config.revision and COMMIT.fullmatch(config.revision):
        return None
    return (
        "model.trust_remote_code: code from the hub runs only at a commit, which nobody can change: set model.revision "
        f"to one of '{config.name}' (40 characters, on its page under Files > History), after reading its code; it is "
        f"{config.revision!r} now."
    )


def check_files(config: ModelConfig, read: Any) -> None:
    """Refuses a text checkpoint whose files ask for code that is not trusted, or for files that are not its own.

    Args:
        config: Name and trust.
        read: Returns the content of a JSON file beside the checkpoint, or None where there is none.

    Raises:
        ModelError: Says what to set.
    """
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    problem = trust_problem(config)
    if problem:
        raise ModelError(problem)
    described, tokenizer = read("config.json") or {}, read("tokenizer_config.json") or {}
    kernels = sorted({value for key, value in _texts(described) if key in _KERNELS and "/" in value})
    if kernels:
        raise ModelError(
            f"model.name: '{config.name}' asks in its config.json for a kernel from the hub ({shorten(kernels)}), "
            "which would be run as it is; remove that entry."
        )
    known = described.get("model_type") in CONFIG_MAPPING
    brought = dict(_code(described) if not known or config.trust_remote_code else ()) | dict(_code(tokenizer))
    foreign = sorted({place for place in brought.values() if "--" in place})
    if config.trust_remote_code and foreign:
        raise ModelError(
            f"model.trust_remote_code: the code of '{config.name}' lies in another repository ({shorten(foreign)}), "
            "which model.revision does not pin; copy the files into a folder and name that."
        )
    if brought and not known and not config.trust_remote_code:
        raise ModelError(
            f"model.name: '{config.name}' is a '{described.get('model_type')}', which transformers does not know, and "
            f"brings code of its own ({shorten(sorted(set(brought.values())))}). Read it; to run it, say "
            "--model.trust_remote_code true and, on the hub, --model.revision COMMIT (40 characters)."
        )
    _check_tokenizer(config, tokenizer)


def check_own_code(repo: str, revision: str, own: Path, *parts: Path) -> None:
    """Refuses to run what a repository holds as our modelling file, where it is not byte for byte that file.

    Args:
        repo: Hub id.
        revision: Commit.
        own: The file that config.json names.
        *parts: The files that it imports.

    Raises:
        ArtifactError: It is another file, or config.json names other code.
    """
    from huggingface_hub import hf_hub_download

    described = json.loads(Path(hf_hub_download(repo, "config.json", revision=revision)).read_text(encoding="utf-8"))
    others = sorted(place for _, place in _code(described) if place.partition(".")[0] != own.stem)
    held = {file: Path(hf_hub_download(repo, file.name, revision=revision)) for file in (own, *parts)}
    different = [file.name for file, found in held.items() if found.read_bytes() != file.read_bytes()]
    if others or different:
        what = f"names other code ({shorten(others)})" if others else f"holds another {different[0]} than hftl's"
        raise ArtifactError(f"{repo}@{revision[:8]} {what}; it was not run.")


def only_pickled(name: str, found: str) -> str:
    """Returns the sentence for weights that exist only as a pickle."""
    return (
        f"model.name: '{name}' has its weights only as a pickle ({found}), which is code and is never opened here; it "
        "needs model.safetensors. Convert it where you trust it: transformers' from_pretrained, then save_pretrained; "
        "or ask its owner (https://huggingface.co/spaces/safetensors/convert)."
    )


def _check_tokenizer(config: ModelConfig, tokenizer: dict[str, Any]) -> None:
    """Refuses names of vocabulary files elsewhere: transformers before 5.2x opened them, and saved copies.

    Many checkpoints name a file of the machine that they were made on; what is not there is nobody's secret.
    """
    folder = Path(config.name).expanduser()
    folder = folder if folder.is_dir() else Path(".")
    named = [(key, value) for key, value in _texts(tokenizer) if key.endswith("_file") and Path(value).name != value]
    there = [f"{key}: {value!r}" for key, value in named if _exists(folder / value)]
    if there:
        raise ModelError(
            f"model.name: tokenizer_config.json of '{config.name}' names files of this machine that are not part of "
            f"the checkpoint ({shorten(there)}); remove these entries."
        )


def _exists(path: Path) -> bool:
    try:
        return path.expanduser().exists()
    except (OSError, ValueError):
        return False


def _code(described: Any) -> Iterator[tuple[str, str]]:
    """Yields (class, place) of the code that a description asks for."""
    mapped = described.get("auto_map") if isinstance(described, dict) else None
    if isinstance(mapped, (list, tuple)):  # an old form, of tokenizers
        mapped = {"AutoTokenizer": mapped}
    for name, place in mapped.items() if isinstance(mapped, dict) else ():
        if name in _TEXT_CLASSES:
            yield from ((name, str(one)) for one in (place if isinstance(place, (list, tuple)) else [place]) if one)


def _texts(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Yields (key, text) for all texts in nested JSON."""
    if isinstance(value, str):
        yield key, value
    elif isinstance(value, dict):
        for inner_key, inner in value.items():
            yield from _texts(inner, key if inner_key == "" else str(inner_key))
    elif isinstance(value, list):
        for inner in value:
            yield from _texts(inner, key)
