"""Text embeddings: any BERT-family checkpoint, pooled; saved as a folder that sentence-transformers opens."""

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
from hftl.models import checkpoint_metadata as checkpoint_files
from hftl.models.checkpoint_metadata import file_beside, pooling_of, read_json, source_of
from hftl.models.remote_code import check_files
from hftl.models.suppress_warnings import quiet
from hftl.models.task_model import HeadSpec, ReloadedModel, Source, TaskModel
from hftl.models.text_model import set_dropout
from hftl.preprocessing.tokenization import token_limit

_MODULES = {"Transformer": "", "Pooling": "1_Pooling", "Normalize": "2_Normalize"}
"""What an embedding is made of, by the class names of sentence-transformers, and the folder of each."""


class EmbeddingModel(TaskModel):
    """A transformers network whose token features become one vector of length 1.

    There is no head: what is learnt is the network itself. Embeddings are normalised, since training compares them by
    cosine and nothing was said of their length.

    Args:
        net: The network (`AutoModel`), without a pooler.
        processor: The tokenizer.
        source: Where the network came from.
        spec: The task's.
        pooling: `mean` or `cls`.
        pooler: The checkpoint's pooler, which nothing here uses; it goes back in its place when the network is saved.
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
        """Returns `embedding` [B, D], and `pair_embedding` [B, D] where there are second texts.

        Args:
            inputs: `input_ids` and `attention_mask` [B, T]; of second texts `pair_input_ids` and `pair_attention_mask`.
        """
        out = {"embedding": self._embed(inputs["input_ids"], inputs["attention_mask"])}
        if "pair_input_ids" in inputs:
            out["pair_embedding"] = self._embed(inputs["pair_input_ids"], inputs["pair_attention_mask"])
        return out

    def _embed(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        tokens = self.net(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        return pooled(tokens, attention_mask, self.pooling)

    def save(self, folder: Path) -> None:
        """Writes weights, config, tokenizer, and what sentence-transformers reads beside them."""
        if self.unused[0] is not None:
            self.net.pooler = self.unused[0]
        try:
            with quiet():
                self.net.save_pretrained(folder)
                self.processor.save_pretrained(folder)
        finally:
            _take_pooler(self.net)
        _describe(folder, self.net.config.hidden_size, self.pooling, self.processor.model_max_length)

    def loaders(self, place: str | Path, revision: str | None = None) -> dict[str, ReloadedModel]:
        """Opens with `AutoModel` and pooling by hand, and with sentence-transformers where that is installed."""
        from transformers import AutoModel

        with quiet():
            net = AutoModel.from_pretrained(place, revision=revision, use_safetensors=True).eval()
        reloaded = EmbeddingModel(net, None, self.source, self.spec, self.pooling, None)
        readers: dict[str, ReloadedModel] = {"transformers": lambda inputs: reloaded(inputs)["embedding"]}
        if find_spec("sentence_transformers") is not None:
            readers["sentence-transformers"] = _sentence_transformer(place, revision)
        return readers

    @property
    def build_args(self) -> dict[str, Any]:
        """How token features become one vector."""
        return {"pooling": self.pooling}

    def build_untrained(self) -> nn.Module:
        """Returns the checkpoint's network again, without a pooler."""
        net = self.net.get_base_model() if self.adapted else self.net
        with quiet():
            if not self.source.pretrained:
                return type(net)(net.config)
            return _load(self.source.name, self.source.revision)[0]


def pooled(tokens: Tensor, attention_mask: Tensor, pooling: str) -> Tensor:
    """Returns vectors of length 1 [B, D] from token features [B, T, D]: the mean of real tokens, or the first one."""
    if pooling == "cls":
        return functional.normalize(tokens[:, 0], dim=-1)
    weights = attention_mask.unsqueeze(-1).to(tokens.dtype)
    return functional.normalize((tokens * weights).sum(1) / weights.sum(1).clamp(min=1), dim=-1)


def build(run: RunConfig, spec: HeadSpec) -> EmbeddingModel:
    """Returns the checkpoint `run.model.name`, pooled as it says, or by the mean of its tokens where it says nothing.

    Raises:
        ModelError: The checkpoint cannot be found, or is made of more than hftl can train and save.
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
    """Returns the model in a folder written by `EmbeddingModel.save`."""
    from transformers import AutoTokenizer

    config = ModelConfig(name=str(folder))
    check_files(config, lambda file: read_json(config, file))
    with quiet():
        net, pooler = _load(str(folder), None)
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    return EmbeddingModel(
        net, tokenizer, Source(str(folder), None, True, "transformers"), spec, _pooling(config), pooler
    )


def name_problem(config: ModelConfig) -> str | None:
    """Returns what is wrong with the checkpoint's name or settings, seen without a network; None if nothing."""
    if config.trust_remote_code:
        return "model.trust_remote_code: text embeddings are trained on the networks that transformers has; say false."
    if config.pooling == "default":
        return "model.pooling: an embedding is pooled by mean or cls; 'stock' has no meaning for it."
    return checkpoint_files.name_problem(config)


def _build(config: ModelConfig, spec: HeadSpec, max_length: int | None) -> EmbeddingModel:
    from transformers import AutoConfig, AutoModel, AutoTokenizer

    check_files(config, lambda file: read_json(config, file))
    where = {"revision": config.revision, "trust_remote_code": False}
    tokenizer = AutoTokenizer.from_pretrained(config.name, **where)
    longest = (read_json(config, "sentence_bert_config.json") or {}).get("max_seq_length")
    # saved with the model, so that whoever opens it cuts texts where training did
    tokenizer.model_max_length = token_limit(tokenizer, min(max_length or 10**6, longest or 10**6))
    _refuse_modules(config)
    pooling = _pooling(config)
    if config.pretrained:
        net, pooler = _load(config.name, config.revision, config.dropout)
    else:
        net = AutoModel.from_config(_with_dropout(AutoConfig.from_pretrained(config.name, **where), config.dropout))
        pooler = _take_pooler(net)
    return EmbeddingModel(net.float(), tokenizer, source_of(config), spec, pooling, pooler)


def _refuse_modules(config: ModelConfig) -> None:
    """Refuses a checkpoint whose embeddings pass through more than `_MODULES`: what is saved would lack it."""
    path = file_beside(config, "modules.json")
    listed = json.loads(Path(path).read_text(encoding="utf-8")) if path else []
    kinds = [str(module.get("type", "")).rpartition(".")[2] for module in listed if isinstance(module, dict)]
    more = [kind for kind in kinds if kind not in _MODULES]
    if more:
        raise ModelError(
            f"model.name: '{config.name}' is made of {shorten(kinds)}, of which hftl would drop {shorten(more)}; it "
            f"has {', '.join(_MODULES)}. Take a checkpoint of these alone."
        )


def _pooling(config: ModelConfig) -> str:
    pooling, why = pooling_of(config)
    pooling = "mean" if pooling == "default" else pooling
    log(f"model: embeddings of {config.name} by {pooling} ({why})")
    return pooling


def _with_dropout(net_config: Any, dropout: float | None) -> Any:
    if dropout is not None:
        set_dropout(net_config, dropout)
    return net_config


def _load(name: str, revision: str | None, dropout: float | None = None) -> tuple[Any, nn.Module | None]:
    """Returns the network without its pooler, and the pooler where the checkpoint has one.

    Raises:
        ModelError: The checkpoint lacks weights of the network.
    """
    from transformers import AutoConfig, AutoModel

    where = {"revision": revision, "trust_remote_code": False}
    config = _with_dropout(AutoConfig.from_pretrained(name, **where), dropout)
    options = {"config": config, "use_safetensors": True, "output_loading_info": True}
    net, info = AutoModel.from_pretrained(name, **where, **options)
    lost = sorted(key for key in info["missing_keys"] if "pooler" not in key)
    if lost:
        raise ModelError(f"model.name: '{name}' lacks weights of its network: {shorten(lost, 4)}.")
    pooler = _take_pooler(net)
    return net, None if info["missing_keys"] else pooler


def _take_pooler(net: Any) -> nn.Module | None:
    pooler = getattr(net, "pooler", None)
    if pooler is not None:
        net.pooler = None
    return pooler


def _describe(folder: Path, size: int, pooling: str, longest: int) -> None:
    """Writes the files by which all versions of sentence-transformers know the parts of an embedding."""
    modules = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, (kind, path) in enumerate(_MODULES.items())
    ]
    modes = {f"pooling_mode_{mode}": mode.startswith(pooling) for mode in ("cls_token", "mean_tokens")}
    described = {
        "modules.json": modules,
        "1_Pooling/config.json": {"word_embedding_dimension": size, **modes},
        "2_Normalize/config.json": {},
        "sentence_bert_config.json": {"max_seq_length": longest, "do_lower_case": False},
        "config_sentence_transformers.json": {
            "__version__": {},
            "prompts": {},
            "default_prompt_name": None,
            "similarity_fn_name": "cosine",
        },
    }
    for name, value in described.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(json.dumps(value, indent=2), encoding="utf-8")


def _sentence_transformer(place: str | Path, revision: str | None) -> ReloadedModel:
    from sentence_transformers import SentenceTransformer

    with quiet():
        model = SentenceTransformer(str(place), revision=revision, device="cpu", trust_remote_code=False).eval()

    def read(inputs: dict[str, Tensor]) -> Tensor:
        features: dict[str, Any] = {name: inputs[name] for name in ("input_ids", "attention_mask")}
        with torch.no_grad():
            return model(features)["sentence_embedding"]

    return read
