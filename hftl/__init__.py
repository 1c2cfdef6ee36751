"""Fine-tuning of pretrained vision and text models (full, frozen backbone or LoRA) on any hardware.

Names are imported lazily: `import hftl` does not import torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from hftl.renames import PYTHON_NAMES
from hftl.version import __version__ as __version__

if TYPE_CHECKING:
    from hftl.adaptation.apply import adapt
    from hftl.artifacts.push import push
    from hftl.artifacts.save_model import load_model_and_task
    from hftl.artifacts.save_run import RunResult, save_run
    from hftl.audit.check import check
    from hftl.config.parse import parse_config
    from hftl.config.schema import (
        AdaptConfig,
        AugmentConfig,
        CheckpointConfig,
        DataConfig,
        DetectorConfig,
        FrozenConfig,
        HubConfig,
        LoraConfig,
        ModelConfig,
        ProbeConfig,
        RunConfig,
        TrainConfig,
    )
    from hftl.data.source import load_splits
    from hftl.data.splits import Splits
    from hftl.errors import HftlError
    from hftl.evaluation.evaluate import evaluate
    from hftl.inference.predictor import Predictor, load
    from hftl.models.build import build_model
    from hftl.run.recipe import run_recipe
    from hftl.run.setup import create_accelerator, setup_run
    from hftl.run_folder.folder import get_run_folder
    from hftl.selection.comparison import compare
    from hftl.selection.ranking import rank
    from hftl.tasks.image_classification import ImageClassification
    from hftl.tasks.image_text_classification import ImageTextClassification
    from hftl.tasks.image_text_retrieval import ImageTextRetrieval
    from hftl.tasks.object_detection import ObjectDetection
    from hftl.tasks.question_answering import QuestionAnswering
    from hftl.tasks.semantic_segmentation import SemanticSegmentation
    from hftl.tasks.task import SupervisedTask, Task
    from hftl.tasks.text_classification import TextClassification
    from hftl.tasks.text_embedding import TextEmbedding
    from hftl.tasks.token_classification import TokenClassification
    from hftl.training.fit import fit

_EXPORTS = {
    "hftl.config.schema": (
        "AdaptConfig",
        "AugmentConfig",
        "CheckpointConfig",
        "DataConfig",
        "DetectorConfig",
        "FrozenConfig",
        "LoraConfig",
        "ModelConfig",
        "ProbeConfig",
        "HubConfig",
        "RunConfig",
        "TrainConfig",
    ),
    "hftl.audit.check": ("check",),
    "hftl.selection.comparison": ("compare",),
    "hftl.selection.ranking": ("rank",),
    "hftl.config.parse": ("parse_config",),
    "hftl.errors": ("HftlError",),
    "hftl.data.source": ("Splits", "load_splits"),
    "hftl.models.build": ("build_model",),
    "hftl.inference.predictor": ("Predictor", "load"),
    "hftl.tasks.task": ("SupervisedTask", "Task"),
    "hftl.tasks.image_classification": ("ImageClassification",),
    "hftl.tasks.question_answering": ("QuestionAnswering",),
    "hftl.tasks.image_text_retrieval": ("ImageTextRetrieval",),
    "hftl.tasks.object_detection": ("ObjectDetection",),
    "hftl.tasks.semantic_segmentation": ("SemanticSegmentation",),
    "hftl.tasks.image_text_classification": ("ImageTextClassification",),
    "hftl.tasks.text_classification": ("TextClassification",),
    "hftl.tasks.token_classification": ("TokenClassification",),
    "hftl.tasks.text_embedding": ("TextEmbedding",),
    "hftl.adaptation.apply": ("adapt",),
    "hftl.run_folder.folder": ("get_run_folder",),
    "hftl.run.setup": ("setup_run", "create_accelerator"),
    "hftl.run.recipe": ("run_recipe",),
    "hftl.training.fit": ("fit",),
    "hftl.evaluation.evaluate": ("evaluate",),
    "hftl.artifacts.save_model": ("load_model_and_task",),
    "hftl.artifacts.save_run": ("RunResult", "save_run"),
    "hftl.artifacts.push": ("push",),
}
_MODULE_OF = {name: module for module, names in _EXPORTS.items() for name in names}

__all__ = [
    "AdaptConfig",
    "AugmentConfig",
    "CheckpointConfig",
    "DataConfig",
    "DetectorConfig",
    "FrozenConfig",
    "HftlError",
    "HubConfig",
    "ImageClassification",
    "ImageTextClassification",
    "ImageTextRetrieval",
    "LoraConfig",
    "ModelConfig",
    "ObjectDetection",
    "Predictor",
    "ProbeConfig",
    "QuestionAnswering",
    "RunConfig",
    "RunResult",
    "SemanticSegmentation",
    "Splits",
    "SupervisedTask",
    "Task",
    "TextClassification",
    "TextEmbedding",
    "TokenClassification",
    "TrainConfig",
    "adapt",
    "build_model",
    "check",
    "compare",
    "create_accelerator",
    "evaluate",
    "fit",
    "get_run_folder",
    "load",
    "load_model_and_task",
    "load_splits",
    "parse_config",
    "push",
    "rank",
    "run_recipe",
    "save_run",
    "setup_run",
]


def __getattr__(name: str) -> Any:
    if name in PYTHON_NAMES:
        raise AttributeError(f"hftl.{name} was renamed to hftl.{PYTHON_NAMES[name]}")
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'hftl' has no attribute '{name}'")
    return getattr(import_module(_MODULE_OF[name]), name)
