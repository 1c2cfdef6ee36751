"""Text models: any BERT-family checkpoint by hub id or folder, as its stock class or as our pooled one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from hftl.config.schema import ModelConfig
from hftl.console import say
from hftl.errors import ModelError, first_line, nearest, shorten
from hftl.hub import cached_commit
from hftl.models.parts import HeadSpec, Reader, Source, TaskModel
from hftl.models.quiet import quiet

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

_POOLED = "PooledTextForSequenceClassification"


class TextModel(TaskModel):
    """A transformers network with a new head."""

    modality = "text"

    def forward(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """Returns the stock class's outputs, from `input_ids` and `attention_mask` [B, T]."""
        return self.net(**inputs)

    def save(self, folder: Path) -> None:
        """Writes weights, config, tokenizer and, for our pooled class, its modelling file."""
        with quiet():
            self.net.save_pretrained(folder)
            self.processor.save_pretrained(folder)

    def readers(self, place: str | Path, revision: str | None = None) -> dict[str, Reader]:
        """Opens with the auto class of the task; our pooled class from the file that was saved with it."""
        import transformers

        auto = getattr(transformers, self.spec.stock)
        with quiet():
            # the folder's own file, not the class in this process: that is what a reader elsewhere will run
            options = {"revision": revision, "code_revision": revision} if revision else {}
            net = auto.from_pretrained(place, trust_remote_code=is_pooled(self.net), **options).eval()
        return {"transformers": lambda inputs: net(**inputs).logits}

    def stock_labels(self) -> list[str]:
        """Returns transformers' `id2label` in order."""
        return [label for _, label in sorted(self.net.config.id2label.items())]

    def fresh(self) -> nn.Module:
        """Returns the same class with the checkpoint's weights and an untrained head."""
        net = self.net.get_base_model() if self.adapted else self.net
        with quiet():
            if not self.source.pretrained:
                return type(net)(net.config)
            return _load(type(net), self.source.name, self.source.revision, net.config)[0]


def is_pooled(net: nn.Module) -> bool:
    """Whether `net` is our own class rather than a stock one."""
    return type(net).__name__ == _POOLED


def build_text(config: ModelConfig, spec: HeadSpec) -> TextModel:
    """Returns the checkpoint `config.name` as `spec.stock` (or our pooled class) with `spec.num_outputs` outputs.

    Raises:
        ModelError: The checkpoint cannot be found or has no such class.
    """
    problem = text_name_problem(config.name)
    if problem:
        raise ModelError(problem)
    try:
        with quiet():
            return _build(config, spec)
    except (OSError, ValueError, KeyError) as error:
        first = first_line(error)
        raise ModelError(
            f"model.name: '{config.name}' cannot be built as {spec.stock}: {type(error).__name__}: {first}"
        ) from error


def open_text(folder: Path, spec: HeadSpec) -> TextModel:
    """Returns the model in a folder written by `TextModel.save`, its head as trained."""
    import transformers

    register_pooled()
    with quiet():
        net = getattr(transformers, spec.stock).from_pretrained(folder)
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    root = net.base_model_prefix
    source = Source(str(folder), None, True, "transformers")
    return TextModel(net, tokenizer, source, spec, _head_modules(net, set(), root), root)


def _build(config: ModelConfig, spec: HeadSpec) -> TextModel:
    import transformers
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(config.name, revision=config.revision)
    pooling, why = _pooling(config)
    say(f"model: features of {config.name} by {pooling} ({why})")
    kind, net_config = _class_and_config(config, spec, pooling)
    if config.pretrained:
        net, new = _load(kind, config.name, config.revision, net_config)
    else:
        auto = kind if pooling != "stock" else getattr(transformers, spec.stock)
        net = auto(net_config) if pooling != "stock" else auto.from_config(net_config)
        new = set()
    net = net.float()
    root = net.base_model_prefix
    head = _head_modules(net, new, root)
    kept = [name for name, _ in net.named_parameters() if name not in new and _under(name, head)]
    if config.pretrained and kept:
        _reinitialise(net, head)  # the checkpoint's own head answers another question
    source = _source(config)
    return TextModel(net, tokenizer, source, spec, head, root)


def _load(kind: Any, name: str, revision: str | None, config: Any) -> tuple[Any, set[str]]:
    """Returns the network with the checkpoint's weights, and the names of parameters that these did not provide."""
    if kind.__name__ == _POOLED:  # its own loader, because a checkpoint may hold its backbone under another name
        net = kind.from_backbone(name, config, revision=revision)
        return net, {key for key, _ in net.named_parameters() if not key.startswith("backbone.")}
    options = {"revision": revision, "config": config, "ignore_mismatched_sizes": True, "output_loading_info": True}
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
    base = AutoConfig.from_pretrained(config.name, revision=config.revision)
    if config.dropout is not None:
        for name in _DROPOUTS:
            if getattr(base, name, None) is not None:
                setattr(base, name, config.dropout)
    if pooling == "stock":
        base.problem_type = spec.problem_type
        for key, value in names.items():
            setattr(base, key, value)
        auto = getattr(transformers, spec.stock)
        try:
            return auto._model_mapping[type(base)], base
        except KeyError:
            raise ModelError(
                f"model.name: transformers has no {spec.stock} for '{base.model_type}' ({config.name})."
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


def register_pooled() -> None:
    """Tells the auto classes of our pooled class, and to send its file along when it is saved."""
    from transformers import AutoConfig, AutoModelForSequenceClassification

    from hftl.models.modeling_pooled_text import PooledTextConfig, PooledTextForSequenceClassification

    AutoConfig.register("pooled_text", PooledTextConfig, exist_ok=True)
    AutoModelForSequenceClassification.register(PooledTextConfig, PooledTextForSequenceClassification, exist_ok=True)
    PooledTextConfig.register_for_auto_class()
    PooledTextForSequenceClassification.register_for_auto_class("AutoModelForSequenceClassification")


def _pooling(config: ModelConfig) -> tuple[str, str]:
    """Returns how features are read (`stock`, `cls` or `mean`), and why."""
    if config.pooling != "auto":
        return config.pooling, "model.pooling"
    declared = _read_json(config, "1_Pooling/config.json")
    if declared is None:
        return "stock", "the checkpoint does not say how it pools"
    mode = declared.get("pooling_mode")
    if declared.get("pooling_mode_mean_tokens") or mode == "mean":
        return "mean", "the checkpoint's 1_Pooling says so"
    if declared.get("pooling_mode_cls_token") or mode == "cls":
        return "cls", "the checkpoint's 1_Pooling says so"
    return "stock", "the checkpoint's 1_Pooling names a way that hftl does not have"


def _read_json(config: ModelConfig, file: str) -> dict[str, Any] | None:
    path = _file(config, file)
    return json.loads(Path(path).read_text()) if path else None


def _file(config: ModelConfig, file: str) -> str | None:
    """Returns the path of a file beside the checkpoint, or None where there is none."""
    from transformers.utils import cached_file

    return cached_file(
        config.name,
        file,
        revision=config.revision,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
        _raise_exceptions_for_gated_repo=False,
    )


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


def text_name_problem(name: str) -> str | None:
    """Returns what is wrong with a checkpoint name that needs no network to see; None if nothing."""
    path = Path(name).expanduser()
    if path.is_dir():
        return None if (path / "config.json").is_file() else f"model.name: '{name}' is a folder without config.json."
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        siblings = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
        return f"model.name: the folder '{name}' does not exist.{nearest(path.name, siblings)}"
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError as error:
        return f"model.name: '{name}' is neither a folder nor a hub id: {error}"
    return None


def _source(config: ModelConfig) -> Source:
    """Returns where the checkpoint came from, with what its card says of licence and language."""
    from huggingface_hub import ModelCard

    hub_id = None if Path(config.name).expanduser().is_dir() else config.name
    revision = config.revision or (cached_commit(hub_id, None) if hub_id else None)
    card = _file(config, "README.md")
    try:
        said = ModelCard.load(card).data.to_dict() if card else {}
    except ValueError:  # a card that does not parse says nothing
        said = {}
    licence = said.get("license") if isinstance(said.get("license"), str) else None
    return Source(config.name, revision, config.pretrained, "transformers", hub_id, licence, said.get("language"))
