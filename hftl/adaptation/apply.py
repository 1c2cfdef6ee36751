"""Entry point of adaptation: `adapt(model, config)` applies the method named in the configuration."""

from __future__ import annotations

from dataclasses import replace

from hftl.adaptation.freeze import freeze_backbone, unfreeze_all
from hftl.adaptation.lora import add_lora
from hftl.adaptation.parameter_counts import ParameterCounts, count_parameters
from hftl.adaptation.per_encoder import adapt_per_encoder, encoder_methods
from hftl.config.schema import AdaptConfig
from hftl.errors import AdaptError
from hftl.heads.sklearn_head import NONLINEAR_CLASSIFIERS
from hftl.logging import log
from hftl.models.task_model import TaskModel


def adapt(model: TaskModel, config: AdaptConfig) -> ParameterCounts:
    """Sets which parameters of `model` are trainable, in place. The head is always trainable.

    Returns:
        Parameter counts by group.

    Raises:
        AdaptError: The method is invalid for the model.
    """
    problem = method_problem(config.method, bool(model.head_modules))
    if problem:
        raise AdaptError(problem)
    methods = encoder_methods(model, config)
    if len(set(methods.values())) > 1:
        targets = adapt_per_encoder(model, config, methods)
        counts = count_parameters(model, " + ".join(f"{name} {method}" for name, method in methods.items()), targets)
        log(str(counts))
        return counts
    config = replace(config, method=next(iter(methods.values()), config.method))
    targets = ()
    if config.method in ("frozen", "probe"):
        freeze_backbone(model)
    elif config.method == "lora":
        targets = add_lora(model, config.lora)
    else:
        unfreeze_all(model, config.batch_norm)
    counts = count_parameters(model, config.method, targets)
    if config.method == "probe" and config.probe.classifier in NONLINEAR_CLASSIFIERS:
        counts = replace(counts, head=0)  # a scikit-learn classifier replaces the head and has no torch parameters
    log(str(counts))
    return counts


def method_problem(method: str, has_head: bool) -> str | None:
    """Returns why an adaptation method is invalid for a model with or without a head; None if it is valid."""
    if has_head or method not in ("frozen", "probe"):
        return None
    return f"adapt.method: '{method}' trains only the head, and this model has no head; allowed: full, lora."
