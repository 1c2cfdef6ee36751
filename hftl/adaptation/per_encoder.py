"""A way of adapting for each encoder of a model that has several (`adapt.image_method`, `adapt.text_method`)."""

from __future__ import annotations

from hftl.adaptation.freeze import unfreeze_all
from hftl.adaptation.lora import add_lora
from hftl.config.schema import AdaptConfig, EncoderMethod
from hftl.errors import AdaptError
from hftl.models.task_model import TaskModel


def encoder_methods(model: TaskModel, config: AdaptConfig) -> dict[str, EncoderMethod]:
    """Returns the way of each encoder by its name; nothing where `config.method` holds for the whole model.

    Raises:
        AdaptError: A way is given for an encoder that the model does not have.
    """
    given: dict[str, EncoderMethod | None] = {"image": config.image_method, "text": config.text_method}
    foreign = [f"adapt.{name}" for name, way in given.items() if way is not None and name not in model.encoders]
    if foreign:
        raise AdaptError(
            f"{' and '.join(foreign)}: {model.source.name} has no such encoder beside another one; say adapt.method."
        )
    if not any(given.values()):
        return {}
    if config.method == "probe":
        raise AdaptError(
            "adapt.method: probe takes no adapt.image_method and no adapt.text_method: all of the backbone is frozen."
        )
    return {name: given[name] or config.method for name in model.encoders}


def adapt_per_encoder(model: TaskModel, config: AdaptConfig, ways: dict[str, EncoderMethod]) -> tuple[str, ...]:
    """Makes each encoder of `model` learn in its own way, in place; the head always learns.

    Returns:
        Stock names of the layers that carry adapters.

    Raises:
        AdaptError: As `add_lora`.
    """
    unfreeze_all(model, config.batch_norm)
    kept = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    of_way = {way: tuple(model.encoders[name] for name in ways if ways[name] == way) for way in ways.values()}
    full, frozen = of_way.get("full", ()), of_way.get("frozen", ())
    targets: tuple[str, ...] = ()
    if "lora" in of_way:
        model_class = {model.original_name(name) for name in kept}
        targets = add_lora(model, config.lora, within=of_way["lora"], whole=full)
        for name, parameter in model.named_parameters():
            if model.original_name(name) in model_class and "lora_" not in name:
                parameter.requires_grad_(False)
    for name, parameter in model.named_parameters():
        if model.under(name, frozen):
            parameter.requires_grad_(False)
    model.still = frozen
    return targets
