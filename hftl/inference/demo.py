"""The command `demo`: a trained model as a page in the browser, on this machine alone unless told otherwise."""

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

from hftl.artifacts.locate import artifact_folder, find
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
"""Tried in this order where no port is asked for; 7860 is Gradio's own."""
TOP_CLASSES = 10
EXAMPLES = 8
_STYLE = "[data-testid=image] img {object-fit: contain; width: 100%; height: 100%}"
"""Shows small images large; Gradio leaves 8 pixels at 8."""
_DAY = 24 * 60 * 60


def serve(
    place: str,
    host: str = "127.0.0.1",
    port: int | None = None,
    revision: str | None = None,
    source: str | None = None,
) -> None:
    """Shows a trained model as a page, until interrupted.

    Args:
        place: Run folder, its model/ folder, or a hub id.
        host: Address to listen on. All but loopback is open to whoever reaches it: the page asks for no password.
        port: Port to listen on; the first free one of `PORTS` where None.
        revision: Branch, tag or commit of a hub id.
        source: Where the examples come from, as `data.source`; by default the test split of the run's own data.

    Raises:
        ArtifactError: The model does not open.
        ConfigError: Gradio is not installed, the address cannot be listened on, or there is no page for such a task.
    """
    _need_gradio()
    free_port(host, port)  # a taken port is said before a large model is loaded
    folder = artifact_folder(find(place, revision))
    problem = unsupported(read_task(folder), Capability.DEMO)
    if problem:
        raise ConfigError(problem)
    predictor = load(folder)
    rows, origin = example_rows(predictor, source)
    demo = build_demo(predictor, rows, origin, title=Path(place).resolve().name, about=describe(place, predictor))
    log(f"demo: {launch(demo, host, port)}  (Ctrl-C ends it)")
    demo.block_thread()


def build_demo(
    predictor: Predictor,
    examples: Sequence[Sequence[Any]] = (),
    origin: str = "Examples",
    title: str = "hftl",
    about: str = "",
) -> gradio.Blocks:
    """Returns a page with the inputs that the model takes and its most probable classes.

    Args:
        predictor: The model.
        examples: Inputs to click on: for each an image (PIL), a text, or two texts, in a list.
        origin: Where they come from, as their heading.
        title: Heading of the page.
        about: Line below it, Markdown.

    Raises:
        ConfigError: Gradio is not installed.
    """
    _need_gradio()
    import gradio

    with gradio.Blocks(title=title, analytics_enabled=False, delete_cache=(_DAY, _DAY)) as demo:
        gradio.Markdown(f"# {_plain(title)}\n\n{about}")
        with gradio.Row():
            with gradio.Column():
                inputs = _input_boxes(predictor)
                button = gradio.Button("Classify", variant="primary")
            top = min(len(predictor.labels), TOP_CLASSES)
            classes = gradio.Label(label="Most probable classes", num_top_classes=top)
        answer = _answer(predictor)
        asked = [button.click] if _takes_image(predictor) else [button.click, *(box.submit for box in inputs)]
        gradio.on(asked, answer, inputs, classes, api_name="predict")
        if examples:
            # run on click, and never kept on disk: GRADIO_CACHE_EXAMPLES would run them all before the page opens
            gradio.Examples(
                [list(example) for example in examples],
                inputs,
                classes,
                answer,
                cache_examples=False,
                run_on_click=True,
                label=origin,
            )
    return demo


def launch(demo: gradio.Blocks, host: str = "127.0.0.1", port: int | None = None) -> str:
    """Serves a page from a thread of its own and returns the address; `demo.close()` ends it.

    Nothing is asked of other machines, neither by the server nor by the page: no telemetry, no tunnel, no web fonts.

    Raises:
        ConfigError: The address cannot be listened on.
    """
    import gradio

    port = free_port(host, port)
    if not _is_loopback(host):
        log(f"demo: warning: on {host}, anyone who reaches port {port} can use this model; there is no password.")
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
    except (OSError, ValueError) as error:  # the port was taken meanwhile, or a proxy stands before this machine
        raise ConfigError(f"--host: no page on {host}:{port}: {first_line(error)}") from error
    return url


def free_port(host: str, port: int | None = None) -> int:
    """Returns `port`, or the first free one of `PORTS`.

    Raises:
        ConfigError: It is taken, there is none, or `host` is no address of this machine.
    """
    if port is not None and not 0 < port < 2**16:  # getaddrinfo would take the remainder
        raise ConfigError(f"--port: {port} is no port; they end at 65535.")
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
                raise ConfigError(f"--host: '{host}' is not an address of this machine; try 127.0.0.1.") from error
            raise ConfigError(f"--port: {candidate} cannot be listened on: {first_line(error)}.") from error
    taken = f"{PORTS.start} to {PORTS.stop - 1} are all" if port is None else f"{port} is"
    raise ConfigError(f"--port: {taken} taken on {host}; name another, or none for the first free one.")


def example_rows(predictor: Predictor, source: str | None = None) -> tuple[list[list[Any]], str]:
    """Returns up to `EXAMPLES` inputs, of as many classes as there are, and where they come from.

    Rows that the model was trained on are not shown unless `source` names them. Data that cannot be read cost the
    examples, not the page, and a line says so.

    Args:
        predictor: The model.
        source: As `data.source`; the data that it was trained on where None.
    """
    config = predictor.data
    if source is not None:
        config = replace(config, source=source, max_train_samples_per_class=None, validation_fraction=0.0)
    try:
        with suppress_logs():
            splits = load_splits(config, training=False, leave_out=predictor.left_out if source is None else None)
        wanted = ("test", "validation") if source is None else ("test", "validation", "train")
        split = next((name for name in wanted if name in splits), None)
        if split is None:
            log(f"demo: no examples: {config.source} has no test or validation rows.")
            return [], ""
        rows = _chosen(splits[split], predictor)
    except (HftlError, OSError) as error:
        log(f"demo: no examples: {first_line(error)}")
        return [], ""
    return rows, f"Examples from the {split} split"


def describe(place: str, predictor: Predictor) -> str:
    """Returns a line on the model, and on what was measured where `place` is a run folder; Markdown."""
    parts = [predictor.task.name.replace("_", " ").capitalize(), f"{len(predictor.labels)} classes"]
    with suppress(ArtifactError):
        run = RunRecord(place)
        name = str(run.settings.get("model.name", "")).removeprefix("local-dir:").rstrip("/")
        parts.insert(1, _plain(name if name.count("/") < 2 else Path(name).name))
        accuracy = run.metrics.get("test/accuracy")
        if accuracy is not None:
            low, high = run.intervals("test").get("accuracy", (None, None))
            span = f" (95 % interval {low:.4f} to {high:.4f})" if low is not None else ""
            parts.append(f"test accuracy {accuracy:.4f}{span}")
    return " · ".join(part for part in parts if part)


def _need_gradio() -> None:
    if find_spec("gradio") is None:
        raise ConfigError('hftl demo needs gradio, not installed here: pip install "hftl[demo]"')


def _takes_image(predictor: Predictor) -> bool:
    return list(input_column_types(predictor.task).values()) == ["image"]


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _input_boxes(predictor: Predictor) -> list[Any]:
    import gradio

    if _takes_image(predictor):
        # as uploaded, so that it is decoded as the training images were; examples as PNG, which loses nothing
        return [gradio.Image(type="filepath", image_mode=None, format="png", label="Image", height=320)]
    columns = predictor.columns
    labels = ["Text"] if len(columns) == 1 else columns
    return [gradio.Textbox(label=label, lines=2 if len(columns) > 1 else 4) for label in labels]


def _answer(predictor: Predictor) -> Callable[..., dict[str, float]]:
    """Returns the function behind the page: inputs -> probability of each class."""
    import gradio

    one_at_a_time = Lock()  # button and examples are events of their own, which Gradio would run side by side

    def predict(*values: str | None) -> dict[str, float]:
        """Probability of each class, in the order of the model's outputs."""
        missing = [name for name, value in zip(predictor.columns, values, strict=True) if not (value or "").strip()]
        if missing:
            kind = "an image" if _takes_image(predictor) else "a text"
            raise gradio.Error(f"Give {kind} for: {', '.join(missing)}.", print_exception=False)
        try:
            with one_at_a_time:
                row = predictor.predict([values] if len(values) > 1 else list(values))[0]
        except HftlError as error:
            raise gradio.Error(str(error), print_exception=False) from error
        return dict(zip(predictor.labels, row["probabilities"], strict=True))

    return predict


def _chosen(rows: Dataset, predictor: Predictor) -> list[list[Any]]:
    """Returns the inputs of the first row of each class, then of the second, until there are `EXAMPLES`."""
    from datasets import Image

    missing = [name for name in predictor.columns if name not in rows.features]
    if missing:
        raise DataError(f"the data lack column(s) {', '.join(missing)}; they have {shorten(list(rows.features))}.")
    column = predictor.task.state()["target"].get("column")
    order = range(len(rows))
    if column in rows.features:
        seen: dict[Any, int] = {}
        turns = []
        for position, label in enumerate(arrow_column(rows, column).to_pylist()):
            seen[label] = seen.get(label, -1) + 1
            turns.append((seen[label], position))
        order = [position for _, position in sorted(turns)]
    rows = rows.select_columns(predictor.columns).select(list(order[:EXAMPLES]))
    if _takes_image(predictor):
        column, processor = predictor.columns[0], predictor.model.processor
        stored = rows.cast_column(column, Image(decode=False))[column]
        return [[decode_image(image, processor.mode, predictor.data.max_pixels)] for image in stored]
    return [list(values) for values in zip(*(rows[name] for name in predictor.columns), strict=True)]


def _plain(text: str) -> str:
    """Returns text that Markdown shows as it is."""
    return "".join(f"\\{c}" if c in "\\`*_{}[]()<>#+-!|$~" else c for c in text)
