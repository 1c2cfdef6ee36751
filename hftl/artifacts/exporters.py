"""Exporters to a single file with dynamic batch and sequence axes: ONNX for onnxruntime, or torch.export."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from hftl.errors import ArtifactError, ConfigError, first_line, nearest
from hftl.models.task_model import TaskModel

Format = Literal["onnx", "torch"]
Compute = Callable[[dict[str, Tensor]], Tensor]
"""Function from inputs by name to logits, both on the CPU."""

FILES: dict[str, str] = {"onnx": "model.onnx", "torch": "model.pt2"}
INT8 = "model.int8.onnx"
_ONNX_PACKAGES = ("onnx", "onnxruntime", "onnxscript")
_MAX_TRACED_TOKENS = 32


def format_problem(name: str) -> str | None:
    """Returns the error message for an unknown or unavailable format; None if it is available."""
    if name not in FILES:
        return f"--format: '{name}' is invalid; allowed: {', '.join(FILES)}.{nearest(name, FILES)}"
    missing = [package for package in _ONNX_PACKAGES if find_spec(package) is None]
    if name == "onnx" and missing:
        return f'--format: onnx needs {", ".join(missing)}. Install with: pip install "hftl[export]"'
    return None


def write(model: TaskModel, inputs: dict[str, Tensor], file: Path, format: str) -> None:
    """Writes `model` as one graph from named inputs to logits.

    Args:
        model: Model on the CPU, in float32, with merged adapters.
        inputs: Inputs of at least 2 rows, by name; tracing treats an axis of length 1 as constant.
        file: Output file; onnx stores weights above 2 GB in a second file next to it.
        format: `onnx` or `torch`.

    Raises:
        ConfigError: The format is unknown, or its packages are not installed.
        ArtifactError: The format does not support an operation of the model.
    """
    problem = format_problem(format)
    if problem:
        raise ConfigError(problem)
    # texts of the model's maximum length would specialize the sequence axis to that constant
    inputs = {name: _truncate(name, value) for name, value in inputs.items()}
    try:
        with _suppress_warnings(), torch.no_grad():
            (_write_onnx if format == "onnx" else _write_torch)(_Logits(model).eval(), inputs, file)
    except Exception as error:
        raise ArtifactError(
            f"--format: {type(model.net).__name__} cannot be exported to {format}: {_reason(error)} "
            "Pass the other format, or serve the model/ folder with its own library."
        ) from error


def open_onnx(file: Path) -> Compute:
    """Returns an inference function of an ONNX file: CPU execution provider, as many threads as torch."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    names = [entry.name for entry in session.get_inputs()]

    def compute(inputs: dict[str, Tensor]) -> Tensor:
        feed: Any = {name: inputs[name].cpu().numpy() for name in names}
        logits: Any = session.run(["logits"], feed)[0]
        return torch.from_numpy(logits)

    return compute


def open_torch(file: Path) -> Compute:
    """Returns an inference function of a torch.export program."""
    program = torch.export.load(file).module()
    return lambda inputs: program({name: value.cpu() for name, value in inputs.items()})


def quantize(file: Path, output: Path) -> None:
    """Writes the ONNX graph `file` with int8 weights and dynamically quantized activations.

    Weights are unsigned: signed kernels saturate on x86 without VNNI, and do not exist for convolutions.

    Source: onnxruntime, "Quantize ONNX models", data type selection.
    """
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    graph = onnx.load(file)
    del graph.graph.value_info[:]  # shapes of rewritten nodes would contradict the inferred ones
    with _suppress_warnings():
        quantize_dynamic(graph, output, per_channel=True, weight_type=QuantType.QUInt8)


class _Logits(nn.Module):
    """Wrapper that returns the logits tensor: exported graphs have no dict outputs."""

    def __init__(self, model: TaskModel) -> None:
        super().__init__()
        self.model = model

    # a dict argument: guards that torch.export generates for **inputs fail (torch 2.15)
    def forward(self, inputs: dict[str, Tensor]) -> Tensor:
        return self.model(inputs)["logits"]


def _write_onnx(net: nn.Module, inputs: dict[str, Tensor], file: Path) -> None:
    program = torch.onnx.export(
        net,
        kwargs={"inputs": inputs},
        dynamo=True,
        verbose=False,
        input_names=list(inputs),
        output_names=["logits"],
        dynamic_shapes={"inputs": {name: dict(enumerate(_axes(name))) for name in inputs}},
    )
    assert program is not None
    program.save(file)


def _write_torch(net: nn.Module, inputs: dict[str, Tensor], file: Path) -> None:
    dynamic = torch.export.Dim.DYNAMIC
    shapes = {"inputs": {name: dict.fromkeys(range(len(_axes(name))), dynamic) for name in inputs}}
    torch.export.save(torch.export.export(net, (inputs,), dynamic_shapes=shapes), file)


def _axes(name: str) -> tuple[str, ...]:
    """Returns the dynamic leading axes of an input; the image size is fixed by the model."""
    return ("batch",) if name == "pixel_values" else ("batch", "sequence")


def _truncate(name: str, value: Tensor) -> Tensor:
    return value[:, :_MAX_TRACED_TOKENS] if "sequence" in _axes(name) else value


def _reason(error: BaseException) -> str:
    """Returns type and first line of the root cause; exporters wrap it in long reports."""
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {first_line(error).rstrip('.')}."


@contextmanager
def _suppress_warnings() -> Iterator[None]:
    """Suppresses warnings and log messages of exporters and quantizers."""
    previous = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(previous)
