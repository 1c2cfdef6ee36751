"""What a target or a task supports beyond training and evaluation: declared by each, asked for by every capability."""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import Enum
from typing import Any


class Capability(str, Enum):
    """A part of hftl that does not work for every kind of label; saved models list theirs by these names."""

    COMPARE = "compare"
    """Comparison of methods: predictions give a score per row (`hftl.tasks.predictions`)."""
    INTERVALS = "intervals"
    """Confidence intervals in reports and model cards: predictions give the metrics again."""
    DEMO = "demo"
    """A page that shows the most probable classes of one image, text or pair of texts."""
    PROBE = "probe"
    """Heads of scikit-learn on features: the labels are one class per row."""
    CLASS_CHECKS = "class_checks"
    """The checks of `hftl check` that compare labels as classes: the labels are one class per row."""
    EXPORT = "export"
    """ONNX and torch.export: inputs are one image or tokens [B, T], outputs are logits [B, K]."""


EVERY_INPUT = frozenset(Capability)
"""Inputs of one image, one text or a pair of texts restrict nothing."""
OTHER_INPUTS = EVERY_INPUT - {Capability.DEMO, Capability.EXPORT}
"""What is possible with inputs that declare nothing."""


@dataclass(frozen=True)
class TargetInfo:
    """What a target declares about itself; the defaults fit a target that declares nothing."""

    label_kind: str = ""
    """The labels in words, such as `word tags`; by default the name of the class."""
    capabilities: frozenset[Capability] = frozenset()
    """What works for these labels."""


def target_info(target: Any) -> TargetInfo:
    """Returns the `info` of a target or of its class, and the defaults for one without it."""
    info = getattr(target, "info", None) or TargetInfo()
    name = getattr(target, "__name__", type(target).__name__)
    return info if info.label_kind else replace(info, label_kind=name)


def supported(target: Any, inputs: Any) -> frozenset[Capability]:
    """Returns what works for a target on inputs, each given as an object or as its class."""
    return target_info(target).capabilities & getattr(inputs, "capabilities", OTHER_INPUTS)


def capabilities_of(task: Any) -> frozenset[Capability]:
    """Returns what works for a task; nothing for a task that declares nothing."""
    return frozenset(getattr(task, "capabilities", ()))
