"""One adaptation method per encoder of a model with two encoders (`adapt.image_method`, `adapt.text_method`)."""

from __future__ import annotations

from hftl.adaptation.freeze import unfreeze_all
from hftl.adaptation.lora import add_lora
from hftl.config.schema import AdaptConfig, EncoderMethod
from hftl.errors import AdaptError
from hftl.models.task_model import TaskModel


def encoder_methods(model: TaskModel, config: AdaptConfig) -> dict[str, EncoderMethod]:
    """Returns the adaptation method of each encoder by its name; empty if `config.method` applies to the whole model.

    Raises:
        AdaptError: A method is set for an encoder that the model does not have, or in addition to `probe`.
    """
    configured: dict[str, EncoderMethod | None] = {"image": config.image_method, "text": config.text_method}
    missing = [name for name, method in configured.items() if method is not None and name not in model.encoders]
    if missing:
        settings = " and ".join(f"adapt.{name}_method" for name in missing)
        raise AdaptError(
            f"{settings}: {model.source.name} has no separate {' and '.join(missing)} encoder. Set adapt.method."
        )
    if not any(configured.values()):
        return {}
    if config.method == "probe":
        raise AdaptError(
            "adapt.method: 'probe' conflicts with adapt.image_method and adapt.text_method: it freezes the whole "
            "backbone. Set only one."
        )
    return {name: configured[name] or config.method for name in model.encoders}


def adapt_per_encoder(model: TaskModel, config: AdaptConfig, methods: dict[str, EncoderMethod]) -> tuple[str, ...]:
    """Adapts each encoder of `model` by its own method, in place; the head is always trainable.

    Returns:
        Original names of the layers with adapters.

    Raises:
        AdaptError: A LoRA pattern matches no layer of the encoders adapted by `lora`.
    """
    unfreeze_all(model, config.batch_norm)
    batch_norms = {model.original_name(name) for name, p in model.named_parameters() if not p.requires_grad}
    modules = {
        method: tuple(model.encoders[name] for name in methods if methods[name] == method)
        for method in methods.values()
    }
    full, frozen = modules.get("full", ()), modules.get("frozen", ())
    targets: tuple[str, ...] = ()
    if "lora" in modules:
        targets = add_lora(model, config.lora, adapted_modules=modules["lora"], trained_modules=full)
        for name, parameter in model.named_parameters():
            # peft makes trained modules trainable, with their batch norms
            if model.original_name(name) in batch_norms and "lora_" not in name:
                parameter.requires_grad_(False)
    for name, parameter in model.named_parameters():
        if model.under(name, frozen):
            parameter.requires_grad_(False)
    model.still = frozen
    return targets
