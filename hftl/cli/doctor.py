"""`hftl doctor`: installed packages, devices and access to the Hub."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, requires, version
from types import ModuleType


def examine() -> bool:
    """Prints packages, devices and access to the Hub; returns whether the installation can train."""
    print(f"python {platform.python_version()} on {platform.platform()}, {os.cpu_count()} CPU cores")
    is_complete = _packages()
    try:
        import torch
        import torchvision  # noqa: F401  fails for a wheel built for another torch, as timm would
    except Exception as error:
        print(f"torch and torchvision are incompatible: {type(error).__name__}: {error}")
        print("  Install matching versions: uv pip install torch torchvision")
        return False
    _devices(torch)
    _hub()
    return is_complete


def _packages() -> bool:
    from packaging.requirements import Requirement

    is_complete = True
    try:
        requirements = [Requirement(line) for line in requires("hftl") or []]
    except PackageNotFoundError:
        print("hftl is not installed. Run: pip install -e .")
        return False
    for requirement in sorted(requirements, key=lambda requirement: requirement.name):
        try:
            installed = version(requirement.name)
            is_supported = requirement.specifier.contains(installed, prereleases=True)
            problem = "" if is_supported else f"  unsupported version; required: {requirement.specifier}"
        except PackageNotFoundError:
            installed, problem = "missing", f"  required: {requirement}"
        is_complete = is_complete and not problem
        print(f"  {requirement.name:<18} {installed}{problem}")
    return is_complete


def _devices(torch: ModuleType) -> None:
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            device = torch.cuda.get_device_properties(index)
            precision = "bf16" if torch.cuda.is_bf16_supported() else "fp16"
            memory = f"{device.total_memory / 2**30:.0f} GiB"
            print(f"cuda:{index} {device.name}, {memory}; recommended mixed_precision: {precision}")
    elif torch.backends.mps.is_available():
        print("mps (Apple)")
    else:
        print("no GPU: training runs on the CPU")


def _hub() -> None:
    from huggingface_hub import HfApi, constants, get_token

    if constants.HF_HUB_OFFLINE:
        print("hub: offline mode (HF_HUB_OFFLINE); only local folders and cached models load")
        return
    import socket
    from urllib.parse import urlsplit

    host = urlsplit(constants.ENDPOINT)
    try:
        socket.create_connection((host.hostname or "", host.port or 443), timeout=5).close()
    except OSError as error:
        print(f"hub: {constants.ENDPOINT} is unreachable ({error}). Use local-dir:PATH or a cached model.")
        return
    if get_token() is None:
        print(f"hub: {constants.ENDPOINT} is reachable; no token. Run `hf auth login` to push or load private models.")
        return
    try:
        print(f"hub: {constants.ENDPOINT} is reachable; logged in as {HfApi().whoami()['name']}")
    except Exception as error:
        print(f"hub: {constants.ENDPOINT} is reachable but rejects the token: {error}")
