"""README of an export, with serving code that needs only the runtime, not hftl, timm or transformers."""

from __future__ import annotations

from collections.abc import Mapping
from math import floor
from pathlib import Path
from typing import Any

from hftl.artifacts.export_checks import format_table
from hftl.artifacts.exporters import FILES
from hftl.models.task_model import TaskModel
from hftl.preprocessing.tokenization import token_limit
from hftl.tasks.task import Task

_PACKAGES = {"PIL": "pillow", "timm": "timm", "tokenizers": "tokenizers", "transformers": "transformers"}
_FILTERS = ("nearest", "bilinear", "bicubic", "lanczos")

_IMPORTS = {"onnx": "import numpy as np\nimport onnxruntime", "torch": "import numpy as np\nimport torch"}
_OPEN = {
    "onnx": 'session = onnxruntime.InferenceSession("{file}", providers=["CPUExecutionProvider"])',
    "torch": 'program = torch.export.load("{file}").module()',
}
_COMPUTE = {
    "onnx": 'logits = session.run(["logits"], inputs)[0]',
    "torch": "with torch.no_grad():\n"
    "    logits = program({name: torch.from_numpy(value) for name, value in inputs.items()}).numpy()",
}
_IMAGE = """

def pixels(file):
    image = ImageOps.exif_transpose(Image.open(file)).convert("{mode}")
    shorter = min(image.size)
    width, height = (int({resize} * side / shorter) for side in image.size)
    image = image.resize((width, height), Image.Resampling.{filter})
    left, top = round((width - {width}) / 2), round((height - {height}) / 2)
    image = image.crop((left, top, left + {width}, top + {height}))
    values = np.asarray(image, dtype=np.float32).reshape({height}, {width}, {channels}) / 255
    return ((values - np.float32({mean})) / np.float32({std})).transpose(2, 0, 1)


inputs = {{"pixel_values": np.stack([pixels(file) for file in ["photo.jpg"]])}}"""
_IMAGE_BY_TIMM = """\
transform = create_transform(**report["inputs"]["transform"])  # timm: preprocessing is more than resize and center crop
images = [ImageOps.exif_transpose(Image.open(file)).convert("{mode}") for file in ["photo.jpg"]]
inputs = {{"pixel_values": np.stack([transform(image).numpy() for image in images])}}"""
_TEXT = """\
tokenizer = Tokenizer.from_file("tokenizer.json")
tokenizer.enable_truncation({limit}, direction="{truncation_side}")
tokenizer.enable_padding(direction="{side}", pad_id={pad_id}, pad_type_id={pad_type}, pad_token="{pad}")
rows = tokenizer.encode_batch({rows})
columns = {{"input_ids": "ids", "attention_mask": "attention_mask", "token_type_ids": "type_ids"}}
names = report["inputs"]["names"]
inputs = {{name: np.array([getattr(row, columns[name]) for row in rows], dtype=np.int64) for name in names}}"""
_TEXT_BY_TRANSFORMERS = """\
tokenizer = AutoTokenizer.from_pretrained(".")
encoded = tokenizer(*map(list, zip(*{rows})), truncation=True, max_length={limit}, padding=True, return_tensors="np")
inputs = {{name: encoded[name].astype(np.int64) for name in report["inputs"]["names"]}}"""
_SOFTMAX = """\
probabilities = np.exp(logits - logits.max(-1, keepdims=True))
probabilities /= probabilities.sum(-1, keepdims=True)
for row in probabilities:
    print(report["labels"][row.argmax()], row.max())"""


def describe_inputs(model: TaskModel, names: list[str], max_length: int | None) -> dict[str, Any]:
    """Returns the input names of the graph and their preprocessing.

    Args:
        model: The exported model; its processor defines the preprocessing.
        names: Input names.
        max_length: `data.max_length` of the training run, in tokens; None uses the limit of the tokenizer.
    """
    if model.modality != "image":
        return {"names": names, "max_length": token_limit(model.processor, max_length)}
    config = model.processor.data_config
    keys = ("input_size", "interpolation", "mean", "std", "crop_pct", "crop_mode")
    transform = {key: list(config[key]) if isinstance(config[key], tuple) else config[key] for key in keys}
    return {"names": names, "mode": model.processor.mode, "transform": transform}


def write_export_card(folder: Path, model: TaskModel, task: Task, report: Mapping[str, Any]) -> None:
    """Writes `folder/README.md`: measurements, and serving code that runs in this folder.

    Args:
        folder: Folder of the export, including the tokenizer.
        model: The exported model.
        task: Task of the model.
        report: Content of `export.json`.
    """
    on, by = report["measured_on"], report["measured_by"]
    first = next(iter(report["files"].values()))
    packages, code = _code(folder, model, task, report)
    axes = "Any batch size" if model.modality == "image" else "Any batch size and length"
    body = f"""\
# {task.name.replace("_", " ")}, exported to {report["format"]}

`{FILES[report["format"]]}`: {", ".join(report["inputs"]["names"])} -> `logits` [batch, {task.head.num_outputs}].
{axes}. `export.json` contains labels, preprocessing and all measurements.

## How to use

Requires {packages}. Run in this folder:

```python
{code}
```

## Evaluation results

Largest logit difference to the trained model: {first["largest_difference"]:.2g}, on {on["rows_compared"]} {on["split"]}
rows of `{on["source"]}`. Metrics: all {on["rows"]} rows. Latency: median with {by["runtime"]} on a CPU,
{by["threads"]} thread(s).

```
{format_table(report, f"{on['split']}/{task.best_metric}")}
```
"""
    (folder / "README.md").write_text(body, encoding="utf-8")


def _code(folder: Path, model: TaskModel, task: Task, report: Mapping[str, Any]) -> tuple[str, str]:
    """Returns the packages required by the code, and the code."""
    format = report["format"]
    imports, inputs = (_image if model.modality == "image" else _text)(folder, model, task, report["inputs"])
    packages = ["numpy", "onnxruntime" if format == "onnx" else "torch", _PACKAGES[imports.split()[1].split(".")[0]]]
    parts = [
        "import json",
        f"{_IMPORTS[format]}\n{imports}",
        'report = json.load(open("export.json", encoding="utf-8"))\n' + _OPEN[format].format(file=FILES[format]),
        inputs,
        _COMPUTE[format],
        _SOFTMAX if task.head.problem_type == "single_label_classification" else "print(logits)",
    ]
    return ", ".join(packages), "\n\n".join(parts)


def _image(folder: Path, model: TaskModel, task: Task, preprocessing: Mapping[str, Any]) -> tuple[str, str]:
    """Returns the imports and the code that converts a file to `inputs`, equal to timm's evaluation transform."""
    config = preprocessing["transform"]
    channels, height, width = config["input_size"]
    is_center_crop = config["crop_mode"] == "center" and height == width and config["interpolation"] in _FILTERS
    if not is_center_crop:
        return "from timm.data import create_transform\nfrom PIL import Image, ImageOps", _IMAGE_BY_TIMM.format(
            mode=preprocessing["mode"]
        )
    lines = _IMAGE.format(
        mode=preprocessing["mode"],
        resize=floor(height / config["crop_pct"]),
        filter=config["interpolation"].upper(),
        width=width,
        height=height,
        channels=channels,
        mean=list(config["mean"]),
        std=list(config["std"]),
    )
    return "from PIL import Image, ImageOps", lines


def _text(folder: Path, model: TaskModel, task: Task, preprocessing: Mapping[str, Any]) -> tuple[str, str]:
    """Returns the imports and the code that converts texts to `inputs`, truncated and padded as in training."""
    tokenizer = model.processor
    is_pair = len(task.state()["inputs"]["columns"]) == 2
    rows = '[("a text", "its pair"), ("another text", "its pair")]' if is_pair else '["a text", "another text"]'
    limit = preprocessing["max_length"]
    if not (folder / "tokenizer.json").is_file():
        rows = rows if is_pair else '[("a text",), ("another text",)]'
        return "from transformers import AutoTokenizer", _TEXT_BY_TRANSFORMERS.format(rows=rows, limit=limit)
    lines = _TEXT.format(
        limit=limit,
        truncation_side=tokenizer.truncation_side,
        side=tokenizer.padding_side,
        pad_id=tokenizer.pad_token_id,
        pad_type=tokenizer.pad_token_type_id,
        pad=tokenizer.pad_token,
        rows=rows,
    )
    return "from tokenizers import Tokenizer", lines
