"""Text embedding models: pooled and normalized BERT-family checkpoints, saved in sentence-transformers format."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from hftl.config.schema import ModelConfig, RunConfig
from hftl.errors import ModelError, first_line, shorten
from hftl.logging import log
from hftl.models.checkpoint_metadata import checkpoint_file, checkpoint_source, read_checkpoint_json, resolve_pooling
from hftl.models.checkpoint_metadata import name_problem as checkpoint_problem
from hftl.models.remote_code import check_files
from hftl.models.suppress_warnings import quiet
from hftl.models.task_model import HeadSpec, ReloadedModel, Source, TaskModel
from hftl.models.text_model import set_dropout
from hftl.preprocessing.tokenization import token_limit

_MODULES = {"Transformer": "", "Pooling": "1_Pooling", "Normalize": "2_Normalize"}
"""sentence-transformers modules of an embedding model, by class name, and the folder of each."""


class EmbeddingModel(TaskModel):
    """Transformers network whose token features are pooled into one vector of unit length.

    There is no head; the network itself is trained. Embeddings are normalized, because training compares them by cosine
    similarity and puts no constraint on their length.

    Args:
        net: The network (`AutoModel`), without a pooler.
        processor: The tokenizer.
        source: Origin of the network.
        spec: Head of the task, with 0 outputs.
        pooling: `mean` or `cls`.
        pooler: The checkpoint's pooler, unused in the forward pass; restored when the network is saved.
    """

    modality = "text"
    compared = ("embedding",)

    def __init__(
        self, net: Any, processor: Any, source: Source, spec: HeadSpec, pooling: str, pooler: nn.Module | None
    ) -> None:
        super().__init__(net, processor, source, spec, ())
        self.pooling = pooling
        self.unused = (pooler,)  # in a tuple: not one of this module's parameters

    def forward(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """Returns `embedding` [B, D], and `pair_embedding` [B, D] if there are paired texts.

        Args:
            inputs: `input_ids` and `attention_mask` [B, T]; for paired texts `pair_input_ids` and
                `pair_attention_mask` [B, T'].
        """
        outputs = {"embedding": self._embed(inputs["input_ids"], inputs["attention_mask"])}
        if "pair_input_ids" in inputs:
            outputs["pair_embedding"] = self._embed(inputs["pair_input_ids"], inputs["pair_attention_mask"])
        return outputs

    def _embed(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        tokens = self.net(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        return pool_and_normalize(tokens, attention_mask, self.pooling)

    def save(self, folder: Path) -> None:
        """Writes weights, config, tokenizer, and the configuration files of sentence-transformers."""
        if self.unused[0] is not None:
            self.net.pooler = self.unused[0]
        try:
            with quiet():
                self.net.save_pretrained(folder)
                self.processor.save_pretrained(folder)
        finally:
            _detach_pooler(self.net)
        _write_sentence_transformers_config(
            folder, self.net.config.hidden_size, self.pooling, self.processor.model_max_length
        )

    def loaders(self, path_or_repo_id: str | Path, revision: str | None = None) -> dict[str, ReloadedModel]:
        """Loads with `AutoModel` plus explicit pooling, and with sentence-transformers if it is installed."""
        from transformers import AutoModel

        with quiet():
            net = AutoModel.from_pretrained(path_or_repo_id, revision=revision, use_safetensors=True).eval()
        reloaded = EmbeddingModel(net, None, self.source, self.spec, self.pooling, None)
        loaded: dict[str, ReloadedModel] = {"transformers": lambda inputs: reloaded(inputs)["embedding"]}
        if find_spec("sentence_transformers") is not None:
            loaded["sentence-transformers"] = _load_sentence_transformer(path_or_repo_id, revision)
        return loaded

    @property
    def build_args(self) -> dict[str, Any]:
        """Pooling of token features."""
        return {"pooling": self.pooling}

    def build_untrained(self) -> nn.Module:
        """Builds the checkpoint's network as before training, without a pooler."""
        net = self.net.get_base_model() if self.adapted else self.net
        with quiet():
            if not self.source.pretrained:
                return type(net)(net.config)
            return _load(self.source.name, self.source.revision)[0]


def pool_and_normalize(tokens: Tensor, attention_mask: Tensor, pooling: str) -> Tensor:
    """Returns unit vectors [B, D] from token features [B, T, D]: the mean of unmasked tokens, or the first token."""
    if pooling == "cls":
        return functional.normalize(tokens[:, 0], dim=-1)
    weights = attention_mask.unsqueeze(-1).to(tokens.dtype)
    return functional.normalize((tokens * weights).sum(1) / weights.sum(1).clamp(min=1), dim=-1)


def build(run: RunConfig, spec: HeadSpec) -> EmbeddingModel:
    """Builds an embedding model from the checkpoint `run.model.name`, pooled as its `1_Pooling` says, else by the mean.

    Raises:
        ModelError: The checkpoint is missing, or contains modules that hftl cannot train and save.
    """
    config = run.model
    problem = name_problem(config)
    if problem:
        raise ModelError(problem)
    try:
        with quiet():
            return _build(config, spec, run.data.max_length)
    except (OSError, ValueError, KeyError, RecursionError) as error:
        raise ModelError(
            f"model.name: '{config.name}' cannot be built as a text encoder: {type(error).__name__}: "
            f"{first_line(error)}"
        ) from error


def open_saved(folder: Path, spec: HeadSpec) -> EmbeddingModel:
    """Loads a model saved by `EmbeddingModel.save`."""
    from transformers import AutoTokenizer

    config = ModelConfig(name=str(folder))
    check_files(config, lambda file: read_checkpoint_json(config, file))
    with quiet():
        net, pooler = _load(str(folder), None)
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    return EmbeddingModel(
        net, tokenizer, Source(str(folder), None, True, "transformers"), spec, _pooling(config), pooler
    )


def name_problem(config: ModelConfig) -> str | None:
    """Returns an error message if the checkpoint name or its settings are invalid, else None. Uses no network."""
    if config.trust_remote_code:
        return "model.trust_remote_code: text embedding supports only networks of transformers. Set false."
    if config.pooling == "default":
        return "model.pooling: 'default' is invalid for text embedding; allowed: auto, mean, cls."
    return checkpoint_problem(config)


def _build(config: ModelConfig, spec: HeadSpec, max_length: int | None) -> EmbeddingModel:
    from transformers import AutoConfig, AutoModel, AutoTokenizer

    check_files(config, lambda file: read_checkpoint_json(config, file))
    options = {"revision": config.revision, "trust_remote_code": False}
    tokenizer = AutoTokenizer.from_pretrained(config.name, **options)
    checkpoint_length = (read_checkpoint_json(config, "sentence_bert_config.json") or {}).get("max_seq_length")
    # saved with the model: inference truncates texts at the same length as training
    tokenizer.model_max_length = token_limit(tokenizer, min(max_length or 10**6, checkpoint_length or 10**6))
    _check_modules(config)
    pooling = _pooling(config)
    if config.pretrained:
        net, pooler = _load(config.name, config.revision, config.dropout)
    else:
        net = AutoModel.from_config(_with_dropout(AutoConfig.from_pretrained(config.name, **options), config.dropout))
        pooler = _detach_pooler(net)
    return EmbeddingModel(net.float(), tokenizer, checkpoint_source(config), spec, pooling, pooler)


def _check_modules(config: ModelConfig) -> None:
    """Raises ModelError if the checkpoint has modules other than `_MODULES`, which saving would drop."""
    path = checkpoint_file(config, "modules.json")
    modules = json.loads(Path(path).read_text(encoding="utf-8")) if path else []
    types = [str(module.get("type", "")).rpartition(".")[2] for module in modules if isinstance(module, dict)]
    unsupported = [name for name in types if name not in _MODULES]
    if unsupported:
        raise ModelError(
            f"model.name: '{config.name}' has unsupported sentence-transformers modules: {shorten(unsupported)}; "
            f"allowed: {', '.join(_MODULES)}. Choose another checkpoint."
        )


def _pooling(config: ModelConfig) -> str:
    pooling, reason = resolve_pooling(config)
    pooling = "mean" if pooling == "default" else pooling
    log(f"model: {config.name}: {pooling} pooling ({reason})")
    return pooling


def _with_dropout(net_config: Any, dropout: float | None) -> Any:
    if dropout is not None:
        set_dropout(net_config, dropout)
    return net_config


def _load(name: str, revision: str | None, dropout: float | None = None) -> tuple[Any, nn.Module | None]:
    """Loads the network without its pooler, and the pooler if the checkpoint contains one.

    Raises:
        ModelError: The checkpoint lacks weights of the network.
    """
    from transformers import AutoConfig, AutoModel

    options: dict[str, Any] = {"revision": revision, "trust_remote_code": False}
    config = _with_dropout(AutoConfig.from_pretrained(name, **options), dropout)
    options |= {"config": config, "use_safetensors": True, "output_loading_info": True}
    net, info = AutoModel.from_pretrained(name, **options)
    missing = sorted(key for key in info["missing_keys"] if "pooler" not in key)
    if missing:
        raise ModelError(f"model.name: '{name}' lacks weights of its network: {shorten(missing, 4)}.")
    pooler = _detach_pooler(net)
    return net, None if info["missing_keys"] else pooler


def _detach_pooler(net: Any) -> nn.Module | None:
    pooler = getattr(net, "pooler", None)
    if pooler is not None:
        net.pooler = None
    return pooler


def _write_sentence_transformers_config(folder: Path, dimension: int, pooling: str, max_length: int) -> None:
    """Writes the module files that all versions of sentence-transformers read."""
    modules = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{class_name}"}
        for i, (class_name, path) in enumerate(_MODULES.items())
    ]
    modes = {f"pooling_mode_{mode}": mode.startswith(pooling) for mode in ("cls_token", "mean_tokens")}
    files = {
        "modules.json": modules,
        "1_Pooling/config.json": {"word_embedding_dimension": dimension, **modes},
        "2_Normalize/config.json": {},
        "sentence_bert_config.json": {"max_seq_length": max_length, "do_lower_case": False},
        "config_sentence_transformers.json": {
            "__version__": {},
            "prompts": {},
            "default_prompt_name": None,
            "similarity_fn_name": "cosine",
        },
    }
    for name, value in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(json.dumps(value, indent=2), encoding="utf-8")


def _load_sentence_transformer(path_or_repo_id: str | Path, revision: str | None) -> ReloadedModel:
    from sentence_transformers import SentenceTransformer

    with quiet():
        options: dict[str, Any] = {"revision": revision, "device": "cpu", "trust_remote_code": False}
        model = SentenceTransformer(str(path_or_repo_id), **options).eval()

    def embed(inputs: dict[str, Tensor]) -> Tensor:
        features: dict[str, Any] = {name: inputs[name] for name in ("input_ids", "attention_mask")}
        with torch.no_grad():
            return model(features)["sentence_embedding"]

    return embed
