"""A model as one file, batch and sequence axes dynamic: an ONNX graph for onnxruntime, or a torch.export program."""

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
"""Inputs by name -> logits, both on the CPU."""

FILES: dict[str, str] = {"onnx": "model.onnx", "torch": "model.pt2"}
INT8 = "model.int8.onnx"
_EXTRA = ("onnx", "onnxruntime", "onnxscript")
_TRACED_TOKENS = 32


def format_problem(name: str) -> str | None:
    """Returns what keeps a format from being written here; None if nothing."""
    if name not in FILES:
        return f"--format: '{name}' is not one of {', '.join(FILES)}.{nearest(name, FILES)}"
    missing = [package for package in _EXTRA if find_spec(package) is None]
    if name == "onnx" and missing:
        return f'--format: onnx needs {", ".join(missing)}, not installed here: pip install "hftl[export]"'
    return None


def write(model: TaskModel, inputs: dict[str, Tensor], file: Path, format: str) -> None:
    """Writes `model` as one graph from named inputs to logits.

    Args:
        model: On the CPU, in float32, adapters merged.
        inputs: At least 2 real rows, by name; an axis of length 1 would be taken for a constant.
        file: Where to; onnx puts weights beyond 2 GB into a second file beside it.
        format: `onnx` or `torch`.

    Raises:
        ConfigError: There is no such format, or its packages are not installed.
        ArtifactError: An operation of the network has no place in such a graph.
    """
    problem = format_problem(format)
    if problem:
        raise ConfigError(problem)
    # text is cut: its length must differ from any limit of the network's, or the axis would be tied to that
    inputs = {name: _short(name, value) for name, value in inputs.items()}
    try:
        with _silent(), torch.no_grad():
            (_write_onnx if format == "onnx" else _write_torch)(_Logits(model).eval(), inputs, file)
    except Exception as error:
        raise ArtifactError(
            f"--format: {type(model.net).__name__} cannot be exported to {format}: {_reason(error)} "
            "Try the other format, or serve the model/ folder with its own library."
        ) from error


def open_onnx(file: Path) -> Compute:
    """Returns what an ONNX file computes on onnxruntime's CPU provider, with as many threads as torch uses."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    names = [entry.name for entry in session.get_inputs()]

    def compute(inputs: dict[str, Tensor]) -> Tensor:
        given: Any = {name: inputs[name].cpu().numpy() for name in names}
        found: Any = session.run(["logits"], given)[0]
        return torch.from_numpy(found)

    return compute


def open_torch(file: Path) -> Compute:
    """Returns what a torch.export program computes."""
    program = torch.export.load(file).module()
    return lambda inputs: program({name: value.cpu() for name, value in inputs.items()})


def quantize(file: Path, to: Path) -> None:
    """Writes the ONNX graph `file` with int8 weights; activations are quantized as they come ("dynamic").

    Weights are unsigned: on x86 without VNNI the signed kernels saturate, and convolutions have none at all
    (onnxruntime, "Quantize ONNX models", data type selection).
    """
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    graph = onnx.load(file)
    del graph.graph.value_info[:]  # shapes of what is rewritten, which would contradict the inferred ones
    with _silent():
        quantize_dynamic(graph, to, per_channel=True, weight_type=QuantType.QUInt8)


class _Logits(nn.Module):
    """Returns the logits alone: a graph has no outputs by name in torch's sense."""

    def __init__(self, model: TaskModel) -> None:
        super().__init__()
        self.model = model

    # one dict rather than keywords: the guards that torch.export writes for **inputs do not run (torch 2.15)
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
    """Returns the leading axes of an input that may have any length; an image's size is the network's."""
    return ("batch",) if name == "pixel_values" else ("batch", "sequence")


def _short(name: str, value: Tensor) -> Tensor:
    return value[:, :_TRACED_TOKENS] if "sequence" in _axes(name) else value


def _reason(error: BaseException) -> str:
    """Returns the sentence of the error that began it: exporters wrap it in reports of many pages."""
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {first_line(error).rstrip('.')}."


@contextmanager
def _silent() -> Iterator[None]:
    """Hides what exporters and quantizers tell their own developers."""
    previous = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(previous)
