"""Command `demo`: Gradio page of a saved model, on the loopback address by default."""

from __future__ import annotations

import errno
import ipaddress
import socket
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any

from hftl.artifacts.locate import artifact_folder, locate_model
from hftl.artifacts.save_model import read_task
from hftl.data.columns import arrow_column
from hftl.data.image_decoding import decode_image
from hftl.data.source import load_splits
from hftl.errors import ArtifactError, ConfigError, DataError, HftlError, first_line, shorten
from hftl.inference.predictor import Predictor, load
from hftl.logging import log, suppress_logs
from hftl.reporting.run_record import RunRecord
from hftl.tasks.capabilities import Capability
from hftl.tasks.registry import unsupported
from hftl.tasks.task import input_column_types

if TYPE_CHECKING:
    import gradio
    from datasets import Dataset

PORTS = range(7860, 7960)
"""Default ports, tried in order; 7860 is the default of Gradio."""
TOP_CLASSES = 10
EXAMPLES = 8
_STYLE = "[data-testid=image] img {object-fit: contain; width: 100%; height: 100%}"
"""Enlarges small images; Gradio displays 8 pixels as 8 pixels."""
_DAY = 24 * 60 * 60


def serve(
    path_or_repo_id: str,
    host: str = "127.0.0.1",
    port: int | None = None,
    revision: str | None = None,
    source: str | None = None,
) -> None:
    """Serves the demo page of a saved model until interrupted.

    Args:
        path_or_repo_id: Run folder, its model/ folder, or a repo id.
        host: Address to listen on. Any address but loopback exposes the page to the network without a password.
        port: Port to listen on; None uses the first free port of `PORTS`.
        revision: Branch, tag or commit of a repo id.
        source: Data source of the examples, like `data.source`; None uses the test split of the training data.

    Raises:
        ArtifactError: The model cannot be loaded.
        ConfigError: Gradio is not installed, the address is unavailable, or the task has no demo page.
    """
    _require_gradio()
    free_port(host, port)  # fail before a large model is loaded
    folder = artifact_folder(locate_model(path_or_repo_id, revision))
    problem = unsupported(read_task(folder), Capability.DEMO)
    if problem:
        raise ConfigError(problem)
    predictor = load(folder)
    rows, heading = example_rows(predictor, source)
    title, about = Path(path_or_repo_id).resolve().name, describe(path_or_repo_id, predictor)
    demo = build_demo(predictor, rows, heading, title=title, about=about)
    log(f"demo: running on {launch(demo, host, port)}  (press Ctrl-C to stop)")
    demo.block_thread()


def build_demo(
    predictor: Predictor,
    examples: Sequence[Sequence[Any]] = (),
    heading: str = "Examples",
    title: str = "hftl",
    about: str = "",
) -> gradio.Blocks:
    """Returns a page with the inputs of the model and its most probable classes.

    Args:
        predictor: The model.
        examples: Clickable example inputs, each a list with one value per input column: a PIL image, a text, or two
            texts.
        heading: Heading of the examples.
        title: Heading of the page.
        about: Text below the heading, Markdown.

    Raises:
        ConfigError: Gradio is not installed.
    """
    _require_gradio()
    import gradio

    with gradio.Blocks(title=title, analytics_enabled=False, delete_cache=(_DAY, _DAY)) as demo:
        gradio.Markdown(f"# {_escape(title)}\n\n{about}")
        with gradio.Row():
            with gradio.Column():
                inputs = _input_components(predictor)
                button = gradio.Button("Classify", variant="primary")
            top = min(len(predictor.labels), TOP_CLASSES)
            classes = gradio.Label(label="Most probable classes", num_top_classes=top)
        predict = _predict_function(predictor)
        triggers = [button.click] if _takes_image(predictor) else [button.click, *(box.submit for box in inputs)]
        gradio.on(triggers, predict, inputs, classes, api_name="predict")
        if examples:
            # no cache, even with GRADIO_CACHE_EXAMPLES, which would predict all examples at startup
            gradio.Examples(
                [list(example) for example in examples],
                inputs,
                classes,
                predict,
                cache_examples=False,
                run_on_click=True,
                label=heading,
            )
    return demo


def launch(demo: gradio.Blocks, host: str = "127.0.0.1", port: int | None = None) -> str:
    """Serves a page in a separate thread and returns its URL; `demo.close()` stops the server.

    Neither the server nor the page sends requests to other machines: no telemetry, no tunnel, no web fonts.

    Raises:
        ConfigError: The address is unavailable.
    """
    import gradio

    port = free_port(host, port)
    if not _is_loopback(host):
        log(f"demo: WARNING: {host}:{port} is reachable from the network without a password.")
    try:
        _, url, _ = demo.launch(
            server_name=f"[{host}]" if ":" in host else host,
            server_port=port,
            share=False,
            ssr_mode=False,
            mcp_server=False,
            enable_monitoring=False,
            run_history=False,
            footer_links=["api", "settings"],
            css=_STYLE,
            theme=gradio.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]),
            prevent_thread_lock=True,
            quiet=True,
        )
    except (OSError, ValueError) as error:  # another process took the port, or a proxy blocks the address
        raise ConfigError(f"--host: cannot serve on '{host}:{port}': {first_line(error)}") from error
    return url


def free_port(host: str, port: int | None = None) -> int:
    """Returns `port`, or the first free port of `PORTS`.

    Raises:
        ConfigError: All ports are in use, or `host` is not an address of this machine.
    """
    if port is not None and not 0 < port < 2**16:  # getaddrinfo reduces larger ports modulo 2**16
        raise ConfigError(f"--port: {port} is out of range; allowed: 1 to 65535.")
    for candidate in PORTS if port is None else [port]:
        try:
            family, kind, protocol, _, address = socket.getaddrinfo(host, candidate, type=socket.SOCK_STREAM)[0]
            with socket.socket(family, kind, protocol) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind(address)
                return candidate
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                continue
            if isinstance(error, socket.gaierror) or error.errno == errno.EADDRNOTAVAIL:
                raise ConfigError(f"--host: '{host}' is not an address of this machine. Pass 127.0.0.1.") from error
            raise ConfigError(f"--port: cannot listen on {candidate}: {first_line(error)}.") from error
    used = f"{PORTS.start} to {PORTS.stop - 1} are all" if port is None else f"{port} is"
    raise ConfigError(f"--port: {used} in use on {host}. Pass another port, or omit --port for the first free one.")


def example_rows(predictor: Predictor, source: str | None = None) -> tuple[list[list[Any]], str]:
    """Returns up to `EXAMPLES` inputs, balanced over classes, and their heading.

    Uses the test or validation split; training rows only if `source` is set and has no other split. Returns no
    examples, with a log line, if the data cannot be read.

    Args:
        predictor: The model.
        source: Data source, like `data.source`; None uses the training data of the run.
    """
    config = predictor.data
    if source is not None:
        config = replace(config, source=source, max_train_samples_per_class=None, validation_fraction=0.0)
    try:
        with suppress_logs():
            splits = load_splits(config, training=False, leave_out=predictor.left_out if source is None else None)
        allowed = ("test", "validation") if source is None else ("test", "validation", "train")
        split = next((name for name in allowed if name in splits), None)
        if split is None:
            log(f"demo: no examples: {config.source} has no test or validation split.")
            return [], ""
        rows = _balanced_examples(splits[split], predictor)
    except (HftlError, OSError) as error:
        log(f"demo: no examples: {first_line(error)}")
        return [], ""
    return rows, f"Examples from the {split} split"


def describe(path_or_repo_id: str, predictor: Predictor) -> str:
    """Returns task and number of classes, for a run folder also model name and test accuracy, as Markdown."""
    parts = [predictor.task.name.replace("_", " ").capitalize(), f"{len(predictor.labels)} classes"]
    with suppress(ArtifactError):
        run = RunRecord(path_or_repo_id)
        name = str(run.settings.get("model.name", "")).removeprefix("local-dir:").rstrip("/")
        parts.insert(1, _escape(name if name.count("/") < 2 else Path(name).name))
        accuracy = run.metrics.get("test/accuracy")
        if accuracy is not None:
            low, high = run.intervals("test").get("accuracy", (None, None))
            interval = f" (95 % interval {low:.4f} to {high:.4f})" if low is not None else ""
            parts.append(f"test accuracy {accuracy:.4f}{interval}")
    return " · ".join(part for part in parts if part)


def _require_gradio() -> None:
    if find_spec("gradio") is None:
        raise ConfigError('demo: gradio is not installed. Install with: pip install "hftl[demo]"')


def _takes_image(predictor: Predictor) -> bool:
    return list(input_column_types(predictor.task).values()) == ["image"]


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _input_components(predictor: Predictor) -> list[Any]:
    import gradio

    if _takes_image(predictor):
        # the uploaded file, decoded like training images; examples as PNG, which is lossless
        return [gradio.Image(type="filepath", image_mode=None, format="png", label="Image", height=320)]
    columns = predictor.columns
    labels = ["Text"] if len(columns) == 1 else columns
    return [gradio.Textbox(label=label, lines=2 if len(columns) > 1 else 4) for label in labels]


def _predict_function(predictor: Predictor) -> Callable[..., dict[str, float]]:
    """Returns the event handler of the page: inputs -> probability of each class."""
    import gradio

    lock = Lock()  # Gradio runs the handlers of button and examples concurrently

    def predict(*values: str | None) -> dict[str, float]:
        """Returns the probability of each class, in the order of the model outputs."""
        missing = [name for name, value in zip(predictor.columns, values, strict=True) if not (value or "").strip()]
        if missing:
            kind = "an image" if _takes_image(predictor) else "a text"
            raise gradio.Error(f"Provide {kind} for: {', '.join(missing)}.", print_exception=False)
        try:
            with lock:
                row = predictor.predict([values] if len(values) > 1 else list(values))[0]
        except HftlError as error:
            raise gradio.Error(str(error), print_exception=False) from error
        return dict(zip(predictor.labels, row["probabilities"], strict=True))

    return predict


def _balanced_examples(rows: Dataset, predictor: Predictor) -> list[list[Any]]:
    """Returns up to `EXAMPLES` inputs: the first row of each class, then the second of each, and so on."""
    from datasets import Image

    missing = [name for name in predictor.columns if name not in rows.features]
    if missing:
        raise DataError(f"the data lack column(s) {', '.join(missing)}. Columns: {shorten(list(rows.features))}.")
    column = predictor.task.state()["target"].get("column")
    order = range(len(rows))
    if column in rows.features:
        counts: dict[Any, int] = {}
        ranked = []
        for position, label in enumerate(arrow_column(rows, column).to_pylist()):
            counts[label] = counts.get(label, -1) + 1
            ranked.append((counts[label], position))
        order = [position for _, position in sorted(ranked)]
    rows = rows.select_columns(predictor.columns).select(list(order[:EXAMPLES]))
    if _takes_image(predictor):
        column, processor = predictor.columns[0], predictor.model.processor
        stored = rows.cast_column(column, Image(decode=False))[column]
        return [[decode_image(image, processor.mode, predictor.data.max_pixels)] for image in stored]
    return [list(values) for values in zip(*(rows[name] for name in predictor.columns), strict=True)]


def _escape(text: str) -> str:
    """Returns text escaped for Markdown."""
    return "".join(f"\\{c}" if c in "\\`*_{}[]()<>#+-!|$~" else c for c in text)
