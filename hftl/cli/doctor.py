"""`hftl doctor`: what is installed, what it runs on, whether the hub answers."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, requires, version
from types import ModuleType


def examine() -> bool:
    """Prints the findings; returns whether a training could start here."""
    print(f"python {platform.python_version()} on {platform.platform()}, {os.cpu_count()} processors")
    fine = _packages()
    try:
        import torch
        import torchvision  # noqa: F401  a wheel for another torch fails here, and timm would with it
    except Exception as error:
        print(f"torch and torchvision do not load together: {type(error).__name__}: {error}")
        print("  Install them as a pair: uv pip install torch torchvision")
        return False
    _devices(torch)
    _hub()
    return fine


def _packages() -> bool:
    from packaging.requirements import Requirement

    fine = True
    try:
        wanted = [Requirement(line) for line in requires("hftl") or []]
    except PackageNotFoundError:
        print("hftl is not installed (pip install -e .)")
        return False
    for need in sorted(wanted, key=lambda need: need.name):
        try:
            found = version(need.name)
            conclusion = "" if need.specifier.contains(found, prereleases=True) else f"  too old: {need.specifier}"
        except PackageNotFoundError:
            found, conclusion = "missing", f"  needed: {need}"
        fine = fine and not conclusion
        print(f"  {need.name:<18} {found}{conclusion}")
    return fine


def _devices(torch: ModuleType) -> None:
    if torch.cuda.is_available():
        for number in range(torch.cuda.device_count()):
            card = torch.cuda.get_device_properties(number)
            bf16 = "bf16" if torch.cuda.is_bf16_supported() else "fp16"
            print(f"cuda:{number} {card.name}, {card.total_memory / 2**30:.0f} GiB; mixed_precision: {bf16} pays off")
    elif torch.backends.mps.is_available():
        print("mps (Apple)")
    else:
        print("no GPU: training runs on the CPU")


def _hub() -> None:
    from huggingface_hub import HfApi, constants, get_token

    if constants.HF_HUB_OFFLINE:
        print("hub: offline mode (HF_HUB_OFFLINE); only folders and cached models will load")
        return
    import socket
    from urllib.parse import urlsplit

    host = urlsplit(constants.ENDPOINT)
    try:
        socket.create_connection((host.hostname or "", host.port or 443), timeout=5).close()
    except OSError as error:
        print(f"hub: {constants.ENDPOINT} does not answer ({error}); use folders: local-dir:PATH, or a cached model")
        return
    if get_token() is None:
        print(f"hub: {constants.ENDPOINT} answers; no token (needed to push and for private models: hf auth login)")
        return
    try:
        print(f"hub: {constants.ENDPOINT} answers; logged in as {HfApi().whoami()['name']}")
    except Exception as error:
        print(f"hub: {constants.ENDPOINT} answers, but refuses the token: {error}")
