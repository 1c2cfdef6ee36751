"""A fitted scikit-learn classifier as the last layer of a network, saved without pickle (skops)."""

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
"""In a model folder, beside the backbone."""
KINDS = ("svm", "random_forest", "knn")
"""Classic heads that are not linear, so that no stock class can hold them."""
_SMALLEST = 1e-12
"""Of an output that no training row had: the log needs something above 0."""

# Every type that a head of ours consists of. The private modules are scikit-learn's, as skops writes them down.
_TYPES = frozenset({
    "builtins.dict", "builtins.list", "builtins.str", "builtins.tuple",
    "numpy.float32", "numpy.float64", "numpy.int32", "numpy.int64", "numpy.ndarray",
    "sklearn.pipeline.Pipeline",
    "sklearn.preprocessing._data.StandardScaler", "sklearn.preprocessing._data.Normalizer",
    "sklearn.svm._classes.SVC", "sklearn.neighbors._classification.KNeighborsClassifier",
    "sklearn.ensemble._forest.RandomForestClassifier", "sklearn.tree._classes.DecisionTreeClassifier",
    "sklearn.tree._tree.Tree",
})  # fmt: skip
# How skops builds them. Others of its loaders call functions that a file names.
_LOADERS = frozenset({
    "DictNode", "ListNode", "TupleNode", "JsonNode", "TypeNode", "NdArrayNode", "ObjectNode", "TreeNode",
})  # fmt: skip


class SklearnHead(nn.Module):
    """Features [B, D] -> logits [B, K], by scikit-learn on the CPU. It has no parameters and passes no gradient.

    Args:
        kind: One of `KINDS`.
        estimator: Fitted on features and classes 0..K-1; some of them may have had no rows.
        num_outputs: K.
        calibration: See `logits`.
    """

    def __init__(self, kind: str, estimator: Any, num_outputs: int, calibration: float) -> None:
        super().__init__()
        self.kind = kind
        self.estimator = estimator
        self.num_outputs = num_outputs
        self.calibration = calibration
        self.bypassed = False
        """Whether features are passed on as they are, so that the network gives what its stock class would."""

    def forward(self, features: Tensor) -> Tensor:
        """Returns logits [B, K] in float32; their softmax is the head's probabilities."""
        if self.bypassed:
            return features
        values = features.detach().float().cpu().numpy()
        found = logits(raw_outputs(self.estimator, values), self.calibration, decides(self.estimator))
        placed = np.full((len(values), self.num_outputs), np.log(_SMALLEST))
        placed[:, self.estimator.classes_] = found
        return torch.from_numpy(placed).to(features.device, torch.float32)

    def to_bytes(self) -> bytes:
        """Returns the content of the file."""
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
        """Returns the head in the content of a file.

        Raises:
            ArtifactError: skops is missing, or the content is damaged or holds types that no head of ours consists of.
        """
        problem = skops_problem()
        if problem:
            raise ArtifactError(problem)
        import skops.io

        try:
            foreign = sorted(_named(content) - _TYPES - _LOADERS)
            if not foreign:
                return cls(**skops.io.loads(content, trusted=sorted(_TYPES)))
        except Exception as error:  # a foreign file can be wrong in any way
            raise ArtifactError(f"{FILE} does not open: {type(error).__name__}: {first_line(error)}") from error
        raise ArtifactError(
            f"{FILE} holds {', '.join(foreign)}, of which no head of hftl consists; it was not opened. If you trust "
            "it, open it with skops.io yourself."
        )


def skops_problem() -> str | None:
    """Returns a sentence where skops, which reads and writes these heads, is not installed."""
    from importlib.util import find_spec

    if find_spec("skops") is not None:
        return None
    return f"heads of {', '.join(KINDS)} are saved with skops, which is not installed: uv pip install 'hftl[probe]'."


def decides(estimator: Any) -> bool:
    """Whether an estimator gives decision values rather than probabilities."""
    return hasattr(estimator, "decision_function")


def raw_outputs(estimator: Any, values: np.ndarray) -> np.ndarray:
    """Returns decision values or probabilities [N, C] of features [N, D], for the C classes that had training rows.

    The one decision value d of two classes becomes (-d/2, d/2), whose softmax is the logistic function of d.
    """
    if not decides(estimator):
        return np.asarray(estimator.predict_proba(values), dtype=np.float64)
    found = np.asarray(estimator.decision_function(values), dtype=np.float64)
    return found if found.ndim == 2 else np.stack([-found / 2, found / 2], 1)


def logits(outputs: np.ndarray, calibration: float, decision: bool) -> np.ndarray:
    """Returns logits [N, C] of what an estimator says.

    Args:
        outputs: [N, C] from `raw_outputs`.
        calibration: Of decision values the temperature that they are divided by. Of probabilities the share e of
            (1 - e) p + e / C: votes of neighbours and trees are often exactly 0, of which the log-loss is infinite.
        decision: Whether they are decision values.
    """
    if decision:
        return outputs / calibration
    return np.log(np.maximum((1 - calibration) * outputs + calibration / outputs.shape[1], _SMALLEST))


def _named(content: bytes) -> set[str]:
    """Returns every type and loader that the content of a skops file names, without building anything."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        schema = json.loads(archive.read("schema.json"))
    found: set[str] = set()
    for node in _nodes(schema):
        found |= {f"{node.get('__module__')}.{node.get('__class__')}", str(node.get("__loader__"))}
    return found


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
    """Returns the head in a folder that `save_head` wrote to.

    Raises:
        ArtifactError: It is not there, or does not open: see `SklearnHead.from_bytes`.
    """
    path = folder / FILE
    if not path.is_file():
        raise ArtifactError(f"{folder} has no {FILE}, which holds the head of this model.")
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        head = SklearnHead.from_bytes(path.read_bytes())
    for warning in said:
        if "version" in str(warning.message):  # scikit-learn promises nothing between its versions
            from hftl.logging import log

            log(f"model: {path}: {first_line(Exception(str(warning.message)))}")
            break
    return head
