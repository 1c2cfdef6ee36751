"""Command `demo`: Gradio page against `Predictor`, examples, listening addresses, and the page in a browser."""

import os
import re
import socket
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import ROOT, load_recipe

from hftl import DataConfig, ModelConfig, RunConfig, build_model, load_splits
from hftl.cli.main import main
from hftl.errors import ConfigError
from hftl.inference import demo
from hftl.inference.predictor import Predictor
from hftl.tasks.registry import ImageClassification, TextClassification

KINDS = ("image", "text", "pair")


@pytest.fixture(scope="module")
def predictors(images, texts, tiny_timm, tiny_bert, tmp_path_factory):
    """Untrained models by kind of input."""
    import torch

    torch.manual_seed(0)
    pairs = tmp_path_factory.mktemp("pairs")
    for file in texts.glob("*.csv"):
        lines = [f"{line.partition(',')[0]},the {line}" for line in file.read_text().splitlines()[1:]]
        (pairs / file.name).write_text("\n".join(["premise,hypothesis,label", *lines]) + "\n")
    models = {}
    for kind, source in zip(KINDS, (images, texts, pairs), strict=True):
        columns = {"text_column": "premise", "text_pair_column": "hypothesis"} if kind == "pair" else {}
        data = DataConfig(source=str(source), **columns)
        task = (ImageClassification if kind == "image" else TextClassification)(load_splits(data))
        net = tiny_timm["test_resnet"] if kind == "image" else tiny_bert
        model = build_model(RunConfig(data, ModelConfig(name=net)), task.head).eval()
        with torch.no_grad():  # scaled, as a new head predicts nearly uniform probabilities
            for value in model.head_parameters():
                value.mul_(200)
        models[kind] = Predictor(model, task, data)
    return models


@pytest.fixture(scope="module")
def pages(predictors):
    """Served page of each model, with URL, examples and heading of the examples."""
    pytest.importorskip("gradio")
    served = {}
    for kind, predictor in predictors.items():
        examples, heading = demo.example_rows(predictor)
        page = demo.build_demo(predictor, examples, heading)
        served[kind] = SimpleNamespace(url=demo.launch(page), examples=examples, heading=heading, page=page)
    yield served
    for each in served.values():
        each.page.close(verbose=False)


def example_input(kind, images):
    """Returns one input as a list with a value (file or text) per column."""
    return {
        "image": [str(images / "test" / "red" / "00.png")],
        "text": ["my cat, a dog"],
        "pair": ["the soup", "a saw my hammer"],
    }[kind]


@pytest.mark.parametrize("kind", KINDS)
def test_demo_api_matches_predictor(pages, predictors, images, kind):
    client = pytest.importorskip("gradio_client")
    values = example_input(kind, images)
    arguments = [client.handle_file(values[0])] if kind == "image" else values
    response = client.Client(pages[kind].url, verbose=False).predict(*arguments, api_name="/predict")
    row = predictors[kind].predict([values[0] if len(values) == 1 else tuple(values)])[0]
    assert max(row["probabilities"]) > 0.4  # the prediction is not uniform
    assert response["label"] == row["prediction"]
    expected = dict(zip(predictors[kind].labels, row["probabilities"], strict=True))
    confidences = {entry["label"]: entry["confidence"] for entry in response["confidences"]}
    assert confidences == pytest.approx(expected, abs=1e-6)
    assert list(confidences.values()) == sorted(confidences.values(), reverse=True)


def test_demo_shows_at_most_ten_classes(predictors):
    gradio = pytest.importorskip("gradio")
    predictor = SimpleNamespace(task=predictors["text"].task, columns=["text"], labels=[str(k) for k in range(77)])
    labels = [block for block in demo.build_demo(predictor).blocks.values() if isinstance(block, gradio.Label)]
    assert [label.num_top_classes for label in labels] == [10]


def test_demo_rejects_empty_input(pages):
    client = pytest.importorskip("gradio_client")
    with pytest.raises(client.exceptions.AppError, match="Provide a text for: hypothesis"):
        client.Client(pages["pair"].url, verbose=False).predict("the soup", " ", api_name="/predict")


# examples


@pytest.mark.parametrize("kind", KINDS)
def test_examples_are_balanced_test_rows(predictors, kind):
    predictor = predictors[kind]
    examples, heading = demo.example_rows(predictor)
    assert heading == "Examples from the test split" and len(examples) == demo.EXAMPLES
    rows = load_splits(predictor.data)["test"]
    key = (lambda image: np.asarray(image.convert("RGB")).tobytes()) if kind == "image" else str
    labels = {tuple(key(row[name]) for name in predictor.columns): row["label"] for row in rows}
    example_labels = [labels[tuple(map(key, example))] for example in examples]  # KeyError if not a test row
    counts = [example_labels.count(label) for label in set(labels.values())]
    assert max(counts) - min(counts) <= 1


def test_examples_include_training_rows_only_from_source(predictors, texts, tmp_path):
    (tmp_path / "train.csv").write_text((texts / "train.csv").read_text())
    model = predictors["text"]
    without_test = Predictor(model.model, model.task, replace(model.data, source=str(tmp_path)))
    assert demo.example_rows(without_test)[1] == "Examples from the validation split"
    unlabeled = tmp_path / "new.jsonl"
    unlabeled.write_text('{"text": "a cat"}\n{"text": "a saw"}\n')
    assert demo.example_rows(model, str(unlabeled)) == ([["a cat"], ["a saw"]], "Examples from the train split")


@pytest.mark.parametrize("missing", ["data", "column"])
def test_demo_without_readable_data_has_no_examples(predictors, tmp_path, missing, capsys):
    pytest.importorskip("gradio")
    (tmp_path / "new.jsonl").write_text('{"sentence": "a cat"}\n')
    source = tmp_path / ("gone" if missing == "data" else "new.jsonl")
    examples, heading = demo.example_rows(predictors["text"], str(source))
    output = capsys.readouterr().out
    assert examples == [] and output.startswith("demo: no examples: ") and output.count("\n") == 1
    assert demo.build_demo(predictors["text"], examples, heading).blocks


# addresses


def is_reachable(address: str, url: str) -> bool:
    with socket.socket() as client:
        client.settimeout(5)
        return client.connect_ex((address, int(url.rstrip("/").rpartition(":")[2]))) == 0


@pytest.mark.skipif(sys.platform != "linux", reason="127.0.0.2 is a loopback address on Linux only")
def test_demo_listens_on_loopback_by_default(pages, predictors, capsys):
    for served in pages.values():
        assert is_reachable("127.0.0.1", served.url) and not is_reachable("127.0.0.2", served.url)
    capsys.readouterr()
    page = demo.build_demo(predictors["text"])
    url = demo.launch(page, "0.0.0.0")
    try:
        assert is_reachable("127.0.0.2", url)
        assert re.search(r"WARNING: 0\.0\.0\.0:\d+ is reachable from the network", capsys.readouterr().out)
    finally:
        page.close(verbose=False)


def test_free_port_skips_or_rejects_used_port(monkeypatch):
    with socket.socket() as listener, socket.socket() as closed:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        used = listener.getsockname()[1]
        closed.bind(("127.0.0.1", 0))
        free = closed.getsockname()[1]
        closed.close()
        with pytest.raises(ConfigError, match=f"--port: {used} is in use on 127.0.0.1"):
            demo.free_port("127.0.0.1", used)
        monkeypatch.setattr(demo, "PORTS", [used, free])
        assert demo.free_port("127.0.0.1") == free
    with pytest.raises(ConfigError, match="--host: '192.0.2.1' is not an address of this machine"):
        demo.free_port("192.0.2.1")
    with pytest.raises(ConfigError, match="--port: 70000"):
        demo.free_port("127.0.0.1", 70000)


# the command


def test_demo_command_reports_missing_model_or_package(tmp_path, monkeypatch, capsys):
    def run_and_fail(*arguments):
        with pytest.raises(SystemExit) as left:
            main(["demo", *arguments])
        assert left.value.code == 2
        return capsys.readouterr().err

    if demo.find_spec("gradio"):
        message = run_and_fail(str(tmp_path / "none"))
        assert re.match(r"ArtifactError: '.*none' is not a run folder", message)
    monkeypatch.setitem(sys.modules, "gradio", None)
    message = run_and_fail("runs/photos")
    assert 'ConfigError: demo: gradio is not installed. Install with: pip install "hftl[demo]"' in message


def open_page(chromium, url):
    """Returns a tab with the page, its console errors and warnings, and its requests to other servers."""
    tab = chromium.new_page()
    errors, requests = [], []
    tab.on("console", lambda message: errors.append(message.text) if message.type in ("error", "warning") else None)
    tab.on("pageerror", lambda error: errors.append(str(error)))
    local = (url, "data:")
    tab.on("request", lambda request: requests.append(request.url) if not request.url.startswith(local) else None)
    tab.goto(url)
    return tab, errors, requests


@pytest.mark.slow
@pytest.mark.browser
def test_browser_classifies_typed_text(chromium, text_run, capsys):
    pytest.importorskip("gradio")
    from hftl.inference.predictor import load

    run = text_run(max_steps=2, num_epochs=None, head_lr=0.1)
    accuracy = load_recipe("text_classification").main(run)["test/accuracy"]
    server = subprocess.Popen(
        [sys.executable, "-m", "hftl", "demo", run.output_dir],
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    try:
        url = re.match(r"demo: running on (http://127\.0\.0\.1:\d+/)", server.stdout.readline())[1]
        tab, errors, requests = open_page(chromium, url)
        tab.get_by_text(f"test accuracy {accuracy:.4f}").wait_for()
        tab.get_by_label("Text", exact=True).fill("a cat, my horse")
        tab.get_by_role("button", name="Classify").click()
        expected = load(run.output_dir).predict(["a cat, my horse"])[0]
        tab.locator("[data-testid=label-output-value]").wait_for()
        assert tab.locator("[data-testid=label-output-value]").inner_text().strip() == expected["prediction"]
        assert f"{expected['confidence']:.0%}" in tab.inner_text("body")
        assert not errors and not requests
        tab.close()
    finally:
        server.terminate()
        server.communicate()


@pytest.mark.browser
def test_browser_classifies_clicked_example(chromium, pages, predictors):
    served = pages["image"]
    tab, errors, requests = open_page(chromium, served.url)
    tab.get_by_text(served.heading).wait_for()
    tab.locator("button.gallery-item").nth(1).click()
    expected = predictors["image"].predict([served.examples[1][0]])[0]
    tab.locator("[data-testid=label-output-value]").wait_for()
    assert tab.locator("[data-testid=label-output-value]").inner_text().strip() == expected["prediction"]
    text = tab.inner_text("body")
    assert all(f"{probability:.0%}" in text for probability in expected["probabilities"])
    box = tab.locator("[data-testid=image] img").first.bounding_box()
    assert min(box["width"], box["height"]) > 100  # images of 24 pixels are enlarged
    assert not errors and not requests
    tab.close()
