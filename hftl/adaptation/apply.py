"""adapt(model, config): the way of adapting is a value, not another recipe."""

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
    """Decides which parameters of `model` learn, in place. The head always does.

    Returns:
        How many parameters learn, by group.

    Raises:
        AdaptError: The method does not fit the model.
    """
    targets: tuple[str, ...] = ()
    problem = method_problem(config.method, bool(model.head_modules))
    if problem:
        raise AdaptError(problem)
    ways = encoder_methods(model, config)
    if len(set(ways.values())) > 1:
        report = count_parameters(
            model, " + ".join(f"{name} {way}" for name, way in ways.items()), adapt_per_encoder(model, config, ways)
        )
        log(str(report))
        return report
    config = replace(config, method=next(iter(ways.values()), config.method))
    if config.method in ("frozen", "probe"):
        freeze_backbone(model)
    elif config.method == "lora":
        targets = add_lora(model, config.lora)
    else:
        unfreeze_all(model, config.batch_norm)
    report = count_parameters(model, config.method, targets)
    if config.method == "probe" and config.probe.classifier in NONLINEAR_CLASSIFIERS:
        report = replace(report, head=0)  # what takes its place is scikit-learn's, and has no parameters of torch's
    log(str(report))
    return report


def method_problem(method: str, has_head: bool) -> str | None:
    """Returns what is wrong with a way of adapting for a model with or without a head; None if nothing."""
    if has_head or method not in ("frozen", "probe"):
        return None
    return f"adapt.method: {method} trains the head alone, and this model has none; say full or lora."
