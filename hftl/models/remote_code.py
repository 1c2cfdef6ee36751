"""Security checks for remote code and pickles in checkpoints.

A repository can contain Python code (`auto_map`), name kernels to download (`attn_implementation`), or store weights as
a pickle, which executes code. Models known to transformers and timm need none of these. Pickles are never loaded.
Python code runs only with `model.trust_remote_code`, and from the Hub only at a pinned commit, which is immutable. timm
runs no code of repositories.
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
    """Returns an error message if remote code is trusted without a pinned commit, else None. Uses no network."""
    if not config.trust_remote_code or Path(config.name).expanduser().is_dir() or config.name.startswith("local-dir:"):
        return None
    if config.revision and COMMIT.fullmatch(config.revision):
        return None
    return (
        f"model.trust_remote_code: code from the Hub runs only at a commit, but model.revision is {config.revision!r}. "
        f"Read the code of '{config.name}', then set model.revision to its commit (40 characters, on its page under "
        "Files > History)."
    )


def check_files(config: ModelConfig, read: Any) -> None:
    """Rejects a text checkpoint whose config files request untrusted code, or files outside the checkpoint.

    Args:
        config: Uses name, revision and `trust_remote_code`.
        read: Returns the content of a JSON file of the checkpoint by name; None if it is missing.

    Raises:
        ModelError: A file requests untrusted code, a kernel, or a file outside the checkpoint.
    """
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    problem = trust_problem(config)
    if problem:
        raise ModelError(problem)
    model, tokenizer = read("config.json") or {}, read("tokenizer_config.json") or {}
    kernels = sorted({value for key, value in _strings(model) if key in _KERNELS and "/" in value})
    if kernels:
        raise ModelError(
            f"model.name: config.json of '{config.name}' requests a kernel from the Hub ({shorten(kernels)}), which "
            "runs as untrusted code. Remove this entry."
        )
    is_known = model.get("model_type") in CONFIG_MAPPING
    code = dict(_code(model) if not is_known or config.trust_remote_code else ()) | dict(_code(tokenizer))
    external = sorted({reference for reference in code.values() if "--" in reference})
    if config.trust_remote_code and external:
        raise ModelError(
            f"model.trust_remote_code: the code of '{config.name}' is in another repository ({shorten(external)}), "
            "which model.revision does not pin. Copy the files into a folder and set model.name to it."
        )
    if code and not is_known and not config.trust_remote_code:
        raise ModelError(
            f"model.name: model type '{model.get('model_type')}' of '{config.name}' is unknown to transformers and "
            f"requires remote code ({shorten(sorted(set(code.values())))}). Read the code, then set "
            "--model.trust_remote_code true and, on the Hub, --model.revision COMMIT (40 characters)."
        )
    _check_tokenizer(config, tokenizer)


def check_own_code(repo: str, revision: str, own: Path, *parts: Path) -> None:
    """Verifies that the modeling files in a repository are identical to hftl's, before they run.

    Args:
        repo: Repo id.
        revision: Commit.
        own: hftl's modeling file, named by config.json.
        *parts: hftl's files that it imports.

    Raises:
        ArtifactError: A file differs, or config.json names other code.
    """
    from huggingface_hub import hf_hub_download

    model = json.loads(Path(hf_hub_download(repo, "config.json", revision=revision)).read_text(encoding="utf-8"))
    unexpected = sorted(reference for _, reference in _code(model) if reference.partition(".")[0] != own.stem)
    downloads = {file: Path(hf_hub_download(repo, file.name, revision=revision)) for file in (own, *parts)}
    changed = [file.name for file, copy in downloads.items() if copy.read_bytes() != file.read_bytes()]
    if unexpected or changed:
        fact = f"names other code ({shorten(unexpected)})" if unexpected else f"{changed[0]} differs from hftl's"
        raise ArtifactError(f"{repo}@{revision[:8]}: {fact}; the code was not run.")


def only_pickled(name: str, found: str) -> str:
    """Returns the error message for weights that exist only as a pickle (file or URL `found`)."""
    return (
        f"model.name: '{name}' has weights only as a pickle ({found}), which can execute code and is never loaded; "
        "allowed: model.safetensors. Convert it in a trusted environment (from_pretrained, then save_pretrained of "
        "transformers), or request a conversion (https://huggingface.co/spaces/safetensors/convert)."
    )


def _check_tokenizer(config: ModelConfig, tokenizer: dict[str, Any]) -> None:
    """Rejects vocabulary file names outside the checkpoint: transformers before 5.2x read them and saved copies.

    Many checkpoints name a file of the machine that created them; a path that does not exist here is harmless.
    """
    folder = Path(config.name).expanduser()
    folder = folder if folder.is_dir() else Path(".")
    paths = [(key, value) for key, value in _strings(tokenizer) if key.endswith("_file") and Path(value).name != value]
    existing = [f"{key}: {value!r}" for key, value in paths if _exists(folder / value)]
    if existing:
        raise ModelError(
            f"model.name: tokenizer_config.json of '{config.name}' names local files outside the checkpoint "
            f"({shorten(existing)}). Remove these entries."
        )


def _exists(path: Path) -> bool:
    try:
        return path.expanduser().exists()
    except (OSError, ValueError):
        return False


def _code(config: Any) -> Iterator[tuple[str, str]]:
    """Yields (auto class, code reference) for the remote code that the `auto_map` of a JSON config requests."""
    auto_map = config.get("auto_map") if isinstance(config, dict) else None
    if isinstance(auto_map, (list, tuple)):  # legacy format of tokenizers
        auto_map = {"AutoTokenizer": auto_map}
    for name, value in auto_map.items() if isinstance(auto_map, dict) else ():
        if name in _TEXT_CLASSES:
            references = value if isinstance(value, (list, tuple)) else [value]
            yield from ((name, str(reference)) for reference in references if reference)


def _strings(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Yields (key, string) for all strings in nested JSON."""
    if isinstance(value, str):
        yield key, value
    elif isinstance(value, dict):
        for item_key, item in value.items():
            yield from _strings(item, key if item_key == "" else str(item_key))
    elif isinstance(value, list):
        for item in value:
            yield from _strings(item, key)
