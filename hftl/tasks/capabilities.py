"""Capabilities of targets and tasks beyond training and evaluation; targets declare them, commands check them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import Enum
from typing import Any


class Capability(str, Enum):
    """Feature of hftl that only some kinds of labels support; saved models list the supported ones by value."""

    COMPARE = "compare"
    """Comparison of methods; requires a score per row (`hftl.tasks.predictions`)."""
    INTERVALS = "intervals"
    """Confidence intervals in reports and model cards; require metrics computed from predictions."""
    DEMO = "demo"
    """Page with the most probable classes of one image, text or text pair."""
    PROBE = "probe"
    """scikit-learn classifiers on backbone features; require single-label classes."""
    CLASS_CHECKS = "class_checks"
    """Checks of `hftl check` that compare classes; require single-label classes."""
    EXPORT = "export"
    """ONNX and torch.export; require one image or tokens [B, T] as inputs and logits [B, K] as outputs."""


ALL_CAPABILITIES = frozenset(Capability)
"""Capabilities of inputs that are one image, one text or a text pair."""
DEFAULT_CAPABILITIES = ALL_CAPABILITIES - {Capability.DEMO, Capability.EXPORT}
"""Capabilities of inputs without a declaration."""


@dataclass(frozen=True)
class TargetInfo:
    """Declarations of a target; the defaults apply to targets without a declaration."""

    label_kind: str = ""
    """Description of the labels in messages, such as `word tags`; by default the name of the class."""
    capabilities: frozenset[Capability] = frozenset()
    """Capabilities that these labels support."""


def target_info(target: Any) -> TargetInfo:
    """Returns `info` of a target or target class, or the defaults if it has none."""
    info = getattr(target, "info", None) or TargetInfo()
    name = getattr(target, "__name__", type(target).__name__)
    return info if info.label_kind else replace(info, label_kind=name)


def supported(target: Any, inputs: Any) -> frozenset[Capability]:
    """Returns the capabilities that both target and inputs support; each is an object or a class."""
    return target_info(target).capabilities & getattr(inputs, "capabilities", DEFAULT_CAPABILITIES)


def capabilities_of(task: Any) -> frozenset[Capability]:
    """Returns the capabilities of a task; empty for a task without a declaration."""
    return frozenset(getattr(task, "capabilities", ()))
