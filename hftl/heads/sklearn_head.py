"""Fitted scikit-learn classifier as the last layer of a network, saved without pickle (skops)."""

from __future__ import annotations

import io
import json
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from hftl.errors import ArtifactError, first_line

FILE = "head.skops"
"""File name in a model folder."""
NONLINEAR_CLASSIFIERS = ("svm", "random_forest", "knn")
"""Classifiers that are not linear, so that no timm or transformers class can represent them as a head."""
_MIN_PROBABILITY = 1e-12
"""Lower bound of probabilities, and probability of classes without training rows: keeps logarithms finite."""

# All types in a head saved by hftl. The private modules are scikit-learn's, as recorded by skops.
_TYPES = frozenset({
    "builtins.dict", "builtins.list", "builtins.str", "builtins.tuple",
    "numpy.float32", "numpy.float64", "numpy.int32", "numpy.int64", "numpy.ndarray",
    "sklearn.pipeline.Pipeline",
    "sklearn.preprocessing._data.StandardScaler", "sklearn.preprocessing._data.Normalizer",
    "sklearn.svm._classes.SVC", "sklearn.neighbors._classification.KNeighborsClassifier",
    "sklearn.ensemble._forest.RandomForestClassifier", "sklearn.tree._classes.DecisionTreeClassifier",
    "sklearn.tree._tree.Tree",
})  # fmt: skip
# Loaders of skops for these types. Other loaders call functions named in the file.
_LOADERS = frozenset({
    "DictNode", "ListNode", "TupleNode", "JsonNode", "TypeNode", "NdArrayNode", "ObjectNode", "TreeNode",
})  # fmt: skip


class SklearnHead(nn.Module):
    """Layer that maps features [B, D] to logits [B, K] with scikit-learn on the CPU, without parameters or gradients.

    Args:
        kind: One of `NONLINEAR_CLASSIFIERS`.
        estimator: Fitted on features and classes 0..K-1; some classes may have no training rows.
        num_outputs: Number of classes K.
        calibration: See `logits`.
    """

    def __init__(self, kind: str, estimator: Any, num_outputs: int, calibration: float) -> None:
        super().__init__()
        self.kind = kind
        self.estimator = estimator
        self.num_outputs = num_outputs
        self.calibration = calibration
        self.bypassed = False
        """Whether to return the features unchanged, as the network saved without a head does."""

    def forward(self, features: Tensor) -> Tensor:
        """Returns logits [B, K] in float32; their softmax gives the probabilities of the head."""
        if self.bypassed:
            return features
        values = features.detach().float().cpu().numpy()
        outputs = raw_outputs(self.estimator, values)
        all_logits = np.full((len(values), self.num_outputs), np.log(_MIN_PROBABILITY))
        all_logits[:, self.estimator.classes_] = logits(
            outputs, self.calibration, has_decision_function(self.estimator)
        )
        return torch.from_numpy(all_logits).to(features.device, torch.float32)

    def to_bytes(self) -> bytes:
        """Returns the content of `FILE`."""
        import skops.io

        content = {
            "kind": self.kind,
            "estimator": self.estimator,
            "num_outputs": self.num_outputs,
            "calibration": self.calibration,
        }
        buffer = io.BytesIO()
        skops.io.dump(content, buffer, compression=zipfile.ZIP_DEFLATED)
        return buffer.getvalue()

    @classmethod
    def from_bytes(cls, content: bytes) -> SklearnHead:
        """Loads the head from the content of `FILE`.

        Raises:
            ArtifactError: skops is missing, or the content is damaged or contains untrusted types.
        """
        problem = skops_problem()
        if problem:
            raise ArtifactError(problem)
        import skops.io

        try:
            untrusted = sorted(_type_names(content) - _TYPES - _LOADERS)
            if not untrusted:
                return cls(**skops.io.loads(content, trusted=sorted(_TYPES)))
        except Exception as error:  # the content of an untrusted file can raise any exception
            raise ArtifactError(f"{FILE}: cannot be loaded: {type(error).__name__}: {first_line(error)}") from error
        raise ArtifactError(
            f"{FILE}: contains untrusted types ({', '.join(untrusted)}) and was not loaded. If you trust the file, "
            "load it with skops.io."
        )


def skops_problem() -> str | None:
    """Returns an error message if skops, which saves and loads these heads, is not installed, else None."""
    from importlib.util import find_spec

    if find_spec("skops") is not None:
        return None
    names = ", ".join(NONLINEAR_CLASSIFIERS)
    return f"{names} need skops, which is not installed. Install it: uv pip install 'hftl[probe]'."


def has_decision_function(estimator: Any) -> bool:
    """Whether an estimator outputs decision values rather than probabilities."""
    return hasattr(estimator, "decision_function")


def raw_outputs(estimator: Any, values: np.ndarray) -> np.ndarray:
    """Returns decision values or probabilities [N, C] for features [N, D] and the C classes with training rows.

    For two classes, the single decision value d becomes (-d/2, d/2), whose softmax is the logistic function of d.
    """
    if not has_decision_function(estimator):
        return np.asarray(estimator.predict_proba(values), dtype=np.float64)
    decisions = np.asarray(estimator.decision_function(values), dtype=np.float64)
    return decisions if decisions.ndim == 2 else np.stack([-decisions / 2, decisions / 2], 1)


def logits(outputs: np.ndarray, calibration: float, decision: bool) -> np.ndarray:
    """Returns logits [N, C] from the outputs of an estimator.

    Args:
        outputs: Outputs [N, C] of `raw_outputs`.
        calibration: For decision values, the temperature to divide by. For probabilities p, the weight e of the uniform
            distribution in (1 - e) p + e / C: votes of neighbors and trees are often exactly 0, with infinite log-loss.
        decision: Whether `outputs` are decision values.
    """
    if decision:
        return outputs / calibration
    return np.log(np.maximum((1 - calibration) * outputs + calibration / outputs.shape[1], _MIN_PROBABILITY))


def _type_names(content: bytes) -> set[str]:
    """Returns the names of all types and loaders in the content of a skops file, without loading it."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        schema = json.loads(archive.read("schema.json"))
    names: set[str] = set()
    for node in _nodes(schema):
        names |= {f"{node.get('__module__')}.{node.get('__class__')}", str(node.get("__loader__"))}
    return names


def _nodes(tree: Any) -> Iterator[dict[str, Any]]:
    pending = [tree]
    while pending:
        node = pending.pop()
        if isinstance(node, dict) and ("__class__" in node or "__loader__" in node):
            yield node
        if isinstance(node, (dict, list)):
            pending += node.values() if isinstance(node, dict) else node


def save_head(head: SklearnHead, folder: Path) -> None:
    """Writes `folder/head.skops`."""
    (folder / FILE).write_bytes(head.to_bytes())


def open_head(folder: Path) -> SklearnHead:
    """Loads a head saved by `save_head`.

    Raises:
        ArtifactError: The file is missing or cannot be loaded: see `SklearnHead.from_bytes`.
    """
    path = folder / FILE
    if not path.is_file():
        raise ArtifactError(f"{folder}: has no {FILE}, the head of this model.")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        head = SklearnHead.from_bytes(path.read_bytes())
    for warning in caught:
        if "version" in str(warning.message):  # scikit-learn guarantees no compatibility between versions
            from hftl.logging import log

            log(f"model: {path}: {first_line(Exception(str(warning.message)))}")
            break
    return head
