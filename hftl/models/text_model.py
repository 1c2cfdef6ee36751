"""Text models: any BERT-family checkpoint by hub id or folder, as its stock class or as our pooled one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from hftl.config.schema import ModelConfig, RunConfig
from hftl.errors import ModelError, first_line, shorten
from hftl.logging import log
from hftl.models.checkpoint_metadata import file_beside, name_problem, pooling_of, read_json, source_of
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

_SAFE = ("model.safetensors", "model.safetensors.index.json")
_PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json")
_POOLED = "PooledTextForSequenceClassification"


__all__ = ["build", "name_problem", "open_saved"]


class TextModel(TaskModel):
    """A transformers network with a new head."""

    modality = "text"
    trusted = False
    """Whether the network is of code that the checkpoint brought along."""
    pools = True
    """Whether a text becomes one vector, in the way that its checkpoint asks for."""

    def forward(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """Returns the stock class's outputs, from `input_ids` and `attention_mask` [B, T]."""
        return self.net(**inputs)

    def save(self, folder: Path) -> None:
        """Writes weights, config, tokenizer and, for our pooled class, its modelling file."""
        with quiet():
            self.net.save_pretrained(folder)
            self.processor.save_pretrained(folder)
        if self.sklearn_head is not None:
            _forget_labels(folder)

    def loaders(self, place: str | Path, revision: str | None = None) -> dict[str, ReloadedModel]:
        """Opens with the auto class of the task; our pooled class from the file that was saved with it."""
        net = self.reopened(place, revision)
        if self.sklearn_head is not None:
            net.set_submodule(*self.head_modules, nn.Identity())  # it has no weights there
        return {"transformers": lambda inputs: net(**inputs).logits}

    def reopened(self, place: str | Path, revision: str | None = None) -> Any:
        """Returns what was saved at a place as the auto class of the task opens it, in eval mode."""
        import transformers

        auto = getattr(transformers, self.spec.model_class)
        with quiet():
            options: dict[str, Any] = {"revision": revision, "code_revision": revision} if revision else {}
            if is_pooled(self.net) and not Path(place).is_dir():
                from hftl.models import modeling_pooled_text

                check_own_code(str(place), revision or "main", Path(modeling_pooled_text.__file__))
            # the folder's own file, not the class in this process: that is what a reader elsewhere will run
            trust = is_pooled(self.net) or self.trusted
            return auto.from_pretrained(place, trust_remote_code=trust, use_safetensors=True, **options).eval()

    def original_labels(self) -> list[str]:
        """Returns transformers' `id2label` in order."""
        return [label for _, label in sorted(self.net.config.id2label.items())]

    def build_untrained(self) -> nn.Module:
        """Returns the same class with the checkpoint's weights and an untrained head."""
        net = self.net.get_base_model() if self.adapted else self.net
        with quiet():
            if not self.source.pretrained:
                return type(net)(net.config)
            return _load(type(net), self.source.name, self.source.revision, net.config)[0]


def _forget_labels(folder: Path) -> None:
    """Takes the labels out of the config of a network without a head.

    transformers puts random weights where a checkpoint has none, and only warns: what those say must not be called by
    the names of the classes.
    """
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    for name in ("id2label", "label2id", "problem_type"):
        config.pop(name, None)
    path.write_text(json.dumps(config, indent=2, ensure_ascii=False), encoding="utf-8")


def is_pooled(net: nn.Module) -> bool:
    """Whether `net` is our own class rather than a stock one."""
    return type(net).__name__ == _POOLED


def build(run: RunConfig, spec: HeadSpec, kind: type[TextModel] = TextModel) -> TextModel:
    """Returns the checkpoint `run.model.name` as `spec.stock` (or our pooled class) with `spec.num_outputs` outputs.

    Raises:
        ModelError: The checkpoint cannot be found or has no such class.
    """
    config = run.model
    problem = name_problem(config)
    if problem:
        raise ModelError(problem)
    try:
        with quiet():
            return _build(config, spec, kind)
    except (OSError, ValueError, KeyError, RecursionError) as error:
        pickled = next((file for file in _PICKLES if config.pretrained and file_beside(config, file)), None)
        if pickled and not any(file_beside(config, file) for file in _SAFE):
            raise ModelError(only_pickled(config.name, pickled)) from error
        first = first_line(error)
        raise ModelError(
            f"model.name: '{config.name}' cannot be built as {spec.model_class}: {type(error).__name__}: {first}"
        ) from error


def open_saved(folder: Path, spec: HeadSpec, kind: type[TextModel] = TextModel) -> TextModel:
    """Returns the model in a folder written by `TextModel.save`, its head as trained. No code in the folder runs."""
    import transformers

    register_pooled()
    check_files(ModelConfig(name=str(folder)), lambda file: read_json(ModelConfig(name=str(folder)), file))
    with quiet():
        # our pooled class is the one registered above, whatever file lies in the folder
        options = {"trust_remote_code": False, "use_safetensors": True}
        net = getattr(transformers, spec.model_class).from_pretrained(folder, **options)
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    root = net.base_model_prefix
    source = Source(str(folder), None, True, "transformers")
    return kind(net, tokenizer, source, spec, _head_modules(net, set(), root), root)


def _build(config: ModelConfig, spec: HeadSpec, of: type[TextModel]) -> TextModel:
    import transformers
    from transformers import AutoTokenizer

    check_files(config, lambda file: read_json(config, file))
    tokenizer = AutoTokenizer.from_pretrained(config.name, **_trust(config))
    pooling, why = pooling_of(config) if of.pools else ("default", "")
    log(f"model: features of {config.name} by {pooling} ({why})" if of.pools else "model: features of each token")
    kind, net_config = _class_and_config(config, spec, pooling)
    if config.pretrained:
        net, new = _load(kind, config.name, config.revision, net_config)
    elif pooling != "default" or not kind.__module__.startswith("transformers."):
        net, new = kind(net_config), set()
    else:
        net, new = getattr(transformers, spec.model_class).from_config(net_config, trust_remote_code=False), set()
    net = net.float()
    root = net.base_model_prefix
    head = _head_modules(net, new, root)
    kept = [name for name, _ in net.named_parameters() if name not in new and _under(name, head)]
    if config.pretrained and kept:
        _reinitialise(net, head)  # the checkpoint's own head answers another question
    model = of(net, tokenizer, source_of(config), spec, head, root)
    model.trusted = not kind.__module__.startswith(("transformers.", "hftl."))
    return model


def _trust(config: ModelConfig) -> dict[str, Any]:
    """Returns what transformers is told of revision and trust; told nothing, it would ask on the terminal."""
    trust = {"revision": config.revision, "trust_remote_code": config.trust_remote_code}
    return trust | ({"code_revision": config.revision} if config.trust_remote_code else {})


def _load(kind: Any, name: str, revision: str | None, config: Any) -> tuple[Any, set[str]]:
    """Returns the network with the checkpoint's weights, and the names of parameters that these did not provide."""
    if kind.__name__ == _POOLED:  # its own loader, because a checkpoint may hold its backbone under another name
        options = {"revision": revision, "trust_remote_code": False, "use_safetensors": True}
        net = kind.from_backbone(name, config, **options)
        return net, {key for key, _ in net.named_parameters() if not key.startswith("backbone.")}
    options = {"revision": revision, "config": config, "ignore_mismatched_sizes": True, "output_loading_info": True}
    options |= {"use_safetensors": True}
    net, info = kind.from_pretrained(name, **options)
    new = _new_keys(info)
    lost = [key for key in new if key.startswith(net.base_model_prefix + ".") and "pooler" not in key]
    if lost:
        raise ModelError(
            f"model.name: '{name}' lacks weights of the backbone of {kind.__name__}: {shorten(sorted(lost), 4)}."
        )
    return net, new


def _class_and_config(config: ModelConfig, spec: HeadSpec, pooling: str) -> tuple[Any, Any]:
    """Returns the class to build and its configuration, labels and dropout set."""
    import transformers
    from transformers import AutoConfig

    names = (
        {
            "id2label": dict(enumerate(spec.labels)),
            "label2id": {label: i for i, label in enumerate(spec.labels)},
        }
        if spec.labels
        else {"num_labels": spec.num_outputs}
    )
    base = AutoConfig.from_pretrained(config.name, **_trust(config))
    if config.dropout is not None:
        set_dropout(base, config.dropout)
    if pooling == "default":
        base.problem_type = spec.problem_type
        for key, value in names.items():
            setattr(base, key, value)
        auto = getattr(transformers, spec.model_class)
        brought = (getattr(base, "auto_map", None) or {}).get(spec.model_class)
        if brought and config.trust_remote_code:
            from transformers.dynamic_module_utils import get_class_from_dynamic_module

            kind = get_class_from_dynamic_module(brought, config.name, revision=config.revision)
            kind.register_for_auto_class(spec.model_class)  # so that its file goes where its weights go
            return kind, base
        try:
            return auto._model_mapping[type(base)], base
        except KeyError:
            raise ModelError(
                f"model.name: transformers has no {spec.model_class} for '{base.model_type}' ({config.name})."
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
        **names,
    )
    return PooledTextForSequenceClassification, pooled


def set_dropout(config: Any, probability: float) -> None:
    """Sets every dropout that a configuration of transformers names."""
    for name in _DROPOUTS:
        if getattr(config, name, None) is not None:
            setattr(config, name, probability)


def register_pooled() -> None:
    """Tells the auto classes of our pooled class, and to send its file along when it is saved."""
    from transformers import AutoConfig, AutoModelForSequenceClassification

    from hftl.models.modeling_pooled_text import PooledTextConfig, PooledTextForSequenceClassification

    AutoConfig.register("pooled_text", PooledTextConfig, exist_ok=True)
    AutoModelForSequenceClassification.register(PooledTextConfig, PooledTextForSequenceClassification, exist_ok=True)
    PooledTextConfig.register_for_auto_class()
    PooledTextForSequenceClassification.register_for_auto_class("AutoModelForSequenceClassification")


def _new_keys(info: Any) -> set[str]:
    """Returns the parameters that the checkpoint did not provide, from transformers' loading report."""
    mismatched = {key if isinstance(key, str) else key[0] for key in info["mismatched_keys"]}
    return set(info["missing_keys"]) | mismatched


def _head_modules(net: nn.Module, new: set[str], root: str) -> list[str]:
    """Returns the modules that hold the new parameters, and everything outside the backbone's root."""
    outside = {name for name, _ in net.named_parameters() if not name.startswith(root + ".")}
    owners = {name.rpartition(".")[0] for name in (new & {n for n, _ in net.named_parameters()}) | outside}
    return sorted(owners)


def _under(name: str, modules: list[str]) -> bool:
    return any(name.startswith(module + ".") for module in modules)


def _reinitialise(net: Any, modules: list[str]) -> None:
    for name in modules:
        module = net.get_submodule(name)
        for parameter in module.parameters():
            parameter._is_hf_initialized = False  # else transformers' initialisers skip it
        for part in module.modules():
            part._is_hf_initialized = False
            net._init_weights(part)
