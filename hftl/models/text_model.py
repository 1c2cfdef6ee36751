"""Text models: any BERT-family checkpoint by repo id or folder, as a transformers class or hftl's pooled class."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from hftl.config.schema import ModelConfig, RunConfig
from hftl.errors import ModelError, first_line, shorten
from hftl.logging import log
from hftl.models.checkpoint_metadata import (
    checkpoint_file,
    checkpoint_source,
    name_problem,
    read_checkpoint_json,
    resolve_pooling,
)
from hftl.models.remote_code import check_files, check_own_code, only_pickled
from hftl.models.suppress_warnings import quiet
from hftl.models.task_model import HeadSpec, ReloadedModel, Source, TaskModel

_DROPOUTS = (
    "hidden_dropout_prob",
    "attention_probs_dropout_prob",
    "dropout",
    "attention_dropout",
    "classifier_dropout",
    "seq_classif_dropout",
    "embedding_dropout",
    "mlp_dropout",
)

_SAFETENSORS = ("model.safetensors", "model.safetensors.index.json")
_PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json")
_POOLED = "PooledTextForSequenceClassification"


__all__ = ["build", "name_problem", "open_saved"]


class TextModel(TaskModel):
    """transformers network with a new head."""

    modality = "text"
    trusted = False
    """Whether the network is defined by remote code of the checkpoint."""
    pools = True
    """Whether token features are pooled into one vector per text."""

    def forward(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """Returns the outputs of the transformers class for `input_ids` and `attention_mask` [B, T]."""
        return self.net(**inputs)

    def save(self, folder: Path) -> None:
        """Writes weights, config, tokenizer and, for the pooled class, its modeling file."""
        with quiet():
            self.net.save_pretrained(folder)
            self.processor.save_pretrained(folder)
        if self.sklearn_head is not None:
            _remove_labels(folder)

    def loaders(self, path_or_repo_id: str | Path, revision: str | None = None) -> dict[str, ReloadedModel]:
        """Loads with the auto class of the task; the pooled class from its saved modeling file."""
        net = self.reload(path_or_repo_id, revision)
        if self.sklearn_head is not None:
            net.set_submodule(*self.head_modules, nn.Identity())  # saved without head weights
        return {"transformers": lambda inputs: net(**inputs).logits}

    def reload(self, path_or_repo_id: str | Path, revision: str | None = None) -> Any:
        """Loads the saved network with the auto class of the task, in eval mode."""
        import transformers

        auto = getattr(transformers, self.spec.model_class)
        with quiet():
            options: dict[str, Any] = {"revision": revision, "code_revision": revision} if revision else {}
            if is_pooled(self.net) and not Path(path_or_repo_id).is_dir():
                from hftl.models import modeling_pooled_text

                check_own_code(str(path_or_repo_id), revision or "main", Path(modeling_pooled_text.__file__))
            # loads the saved modeling file instead of the class in this process, as users without hftl do
            trust = is_pooled(self.net) or self.trusted
            return auto.from_pretrained(
                path_or_repo_id, trust_remote_code=trust, use_safetensors=True, **options
            ).eval()

    def original_labels(self) -> list[str]:
        """Returns transformers' `id2label` in order."""
        return [label for _, label in sorted(self.net.config.id2label.items())]

    def build_untrained(self) -> nn.Module:
        """Builds the same class with the checkpoint's weights and an untrained head."""
        net = self.net.get_base_model() if self.adapted else self.net
        with quiet():
            if not self.source.pretrained:
                return type(net)(net.config)
            return _load(type(net), self.source.name, self.source.revision, net.config)[0]


def _remove_labels(folder: Path) -> None:
    """Removes the labels from the config of a network saved without a head.

    transformers initializes missing weights at random with only a warning; predictions of such a head must not carry
    class names.
    """
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    for name in ("id2label", "label2id", "problem_type"):
        config.pop(name, None)
    path.write_text(json.dumps(config, indent=2, ensure_ascii=False), encoding="utf-8")


def is_pooled(net: nn.Module) -> bool:
    """Whether `net` is hftl's pooled class rather than a transformers class."""
    return type(net).__name__ == _POOLED


def build(run: RunConfig, spec: HeadSpec, wrapper: type[TextModel] = TextModel) -> TextModel:
    """Builds `run.model.name` as `spec.model_class` or the pooled class, with `spec.num_outputs` outputs.

    Args:
        run: Uses `run.model`.
        spec: Head of the task.
        wrapper: Class of the returned model.

    Raises:
        ModelError: The checkpoint is missing, unsafe, or has no such class.
    """
    config = run.model
    problem = name_problem(config)
    if problem:
        raise ModelError(problem)
    try:
        with quiet():
            return _build(config, spec, wrapper)
    except (OSError, ValueError, KeyError, RecursionError) as error:
        pickled = next((file for file in _PICKLES if config.pretrained and checkpoint_file(config, file)), None)
        if pickled and not any(checkpoint_file(config, file) for file in _SAFETENSORS):
            raise ModelError(only_pickled(config.name, pickled)) from error
        cause = f"{type(error).__name__}: {first_line(error)}"
        raise ModelError(f"model.name: '{config.name}' cannot be built as {spec.model_class}: {cause}") from error


def open_saved(folder: Path, spec: HeadSpec, wrapper: type[TextModel] = TextModel) -> TextModel:
    """Loads a model saved by `TextModel.save`, with its trained head. Runs no code from the folder."""
    import transformers

    register_pooled()
    check_files(ModelConfig(name=str(folder)), lambda file: read_checkpoint_json(ModelConfig(name=str(folder)), file))
    with quiet():
        # the pooled class is the registered one, not the modeling file in the folder
        options = {"trust_remote_code": False, "use_safetensors": True}
        net = getattr(transformers, spec.model_class).from_pretrained(folder, **options)
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    root = net.base_model_prefix
    source = Source(str(folder), None, True, "transformers")
    return wrapper(net, tokenizer, source, spec, _head_modules(net, set(), root), root)


def _build(config: ModelConfig, spec: HeadSpec, wrapper: type[TextModel]) -> TextModel:
    import transformers
    from transformers import AutoTokenizer

    check_files(config, lambda file: read_checkpoint_json(config, file))
    tokenizer = AutoTokenizer.from_pretrained(config.name, **_trust_options(config))
    pooling, reason = resolve_pooling(config) if wrapper.pools else ("default", "")
    log(f"model: {config.name}: {pooling} pooling ({reason})" if wrapper.pools else "model: token features, no pooling")
    model_class, net_config = _class_and_config(config, spec, pooling)
    if config.pretrained:
        net, new = _load(model_class, config.name, config.revision, net_config)
    elif pooling != "default" or not model_class.__module__.startswith("transformers."):
        net, new = model_class(net_config), set()
    else:
        net, new = getattr(transformers, spec.model_class).from_config(net_config, trust_remote_code=False), set()
    net = net.float()
    root = net.base_model_prefix
    head = _head_modules(net, new, root)
    loaded = [name for name, _ in net.named_parameters() if name not in new and _under(name, head)]
    if config.pretrained and loaded:
        _reinitialize(net, head)  # the pretrained head was trained for another task
    model = wrapper(net, tokenizer, checkpoint_source(config), spec, head, root)
    model.trusted = not model_class.__module__.startswith(("transformers.", "hftl."))
    return model


def _trust_options(config: ModelConfig) -> dict[str, Any]:
    """Returns the revision and trust options of transformers; without an explicit value, it prompts on the terminal."""
    options = {"revision": config.revision, "trust_remote_code": config.trust_remote_code}
    return options | ({"code_revision": config.revision} if config.trust_remote_code else {})


def _load(model_class: Any, name: str, revision: str | None, config: Any) -> tuple[Any, set[str]]:
    """Loads a checkpoint, and returns the network with the names of the parameters missing from the checkpoint."""
    if model_class.__name__ == _POOLED:  # separate loader: checkpoints may store the backbone under another prefix
        options = {"revision": revision, "trust_remote_code": False, "use_safetensors": True}
        net = model_class.from_backbone(name, config, **options)
        return net, {key for key, _ in net.named_parameters() if not key.startswith("backbone.")}
    options = {"revision": revision, "config": config, "ignore_mismatched_sizes": True, "output_loading_info": True}
    options |= {"use_safetensors": True}
    net, info = model_class.from_pretrained(name, **options)
    new = _new_keys(info)
    missing = sorted(key for key in new if key.startswith(net.base_model_prefix + ".") and "pooler" not in key)
    if missing:
        raise ModelError(
            f"model.name: '{name}' lacks weights of the backbone of {model_class.__name__}: {shorten(missing, 4)}."
        )
    return net, new


def _class_and_config(config: ModelConfig, spec: HeadSpec, pooling: str) -> tuple[Any, Any]:
    """Returns the class to build and its configuration, with labels and dropout set."""
    import transformers
    from transformers import AutoConfig

    label_entries = (
        {
            "id2label": dict(enumerate(spec.labels)),
            "label2id": {label: i for i, label in enumerate(spec.labels)},
        }
        if spec.labels
        else {"num_labels": spec.num_outputs}
    )
    base = AutoConfig.from_pretrained(config.name, **_trust_options(config))
    if config.dropout is not None:
        set_dropout(base, config.dropout)
    if pooling == "default":
        base.problem_type = spec.problem_type
        for key, value in label_entries.items():
            setattr(base, key, value)
        auto = getattr(transformers, spec.model_class)
        code_reference = (getattr(base, "auto_map", None) or {}).get(spec.model_class)
        if code_reference and config.trust_remote_code:
            from transformers.dynamic_module_utils import get_class_from_dynamic_module

            model_class = get_class_from_dynamic_module(code_reference, config.name, revision=config.revision)
            model_class.register_for_auto_class(spec.model_class)  # saves its code together with its weights
            return model_class, base
        try:
            return auto._model_mapping[type(base)], base
        except KeyError:
            raise ModelError(
                f"model.name: transformers has no {spec.model_class} for model type '{base.model_type}' of "
                f"'{config.name}'. Choose another model."
            ) from None
    from hftl.models.modeling_pooled_text import PooledTextConfig, PooledTextForSequenceClassification

    register_pooled()
    options = {
        key: value for key, value in base.to_dict().items() if key not in ("id2label", "label2id", "architectures")
    }
    dropout = config.dropout if config.dropout is not None else 0.0
    pooled = PooledTextConfig(
        backbone=options,
        pooling=pooling,
        classifier_dropout=dropout,
        problem_type=spec.problem_type,
        tokenizer_class=None,
        **label_entries,
    )
    return PooledTextForSequenceClassification, pooled


def set_dropout(config: Any, probability: float) -> None:
    """Sets all dropout probabilities of a transformers configuration."""
    for name in _DROPOUTS:
        if getattr(config, name, None) is not None:
            setattr(config, name, probability)


def register_pooled() -> None:
    """Registers the pooled class with the auto classes, and saves its modeling file with every model."""
    from transformers import AutoConfig, AutoModelForSequenceClassification

    from hftl.models.modeling_pooled_text import PooledTextConfig, PooledTextForSequenceClassification

    AutoConfig.register("pooled_text", PooledTextConfig, exist_ok=True)
    AutoModelForSequenceClassification.register(PooledTextConfig, PooledTextForSequenceClassification, exist_ok=True)
    PooledTextConfig.register_for_auto_class()
    PooledTextForSequenceClassification.register_for_auto_class("AutoModelForSequenceClassification")


def _new_keys(info: Any) -> set[str]:
    """Returns the names of parameters missing from the checkpoint, from the loading info of transformers."""
    mismatched = {key if isinstance(key, str) else key[0] for key in info["mismatched_keys"]}
    return set(info["missing_keys"]) | mismatched


def _head_modules(net: nn.Module, new: set[str], root: str) -> list[str]:
    """Returns the names of the modules with new parameters or outside the root of the backbone."""
    outside = {name for name, _ in net.named_parameters() if not name.startswith(root + ".")}
    owners = {name.rpartition(".")[0] for name in (new & {n for n, _ in net.named_parameters()}) | outside}
    return sorted(owners)


def _under(name: str, modules: list[str]) -> bool:
    return any(name.startswith(module + ".") for module in modules)


def _reinitialize(net: Any, modules: list[str]) -> None:
    for name in modules:
        module = net.get_submodule(name)
        for parameter in module.parameters():
            parameter._is_hf_initialized = False  # otherwise transformers skips its initialization
        for submodule in module.modules():
            submodule._is_hf_initialized = False
            net._init_weights(submodule)
