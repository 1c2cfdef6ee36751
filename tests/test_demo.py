"""The page of a model: it answers as the model does, to this machine alone, and asks nothing of others."""

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
    """Models with heads as they were drawn, by the kind of their input."""
    import torch

    torch.manual_seed(0)
    pairs = tmp_path_factory.mktemp("pairs")
    for file in texts.glob("*.csv"):
        lines = [f"{line.partition(',')[0]},the {line}" for line in file.read_text().splitlines()[1:]]
        (pairs / file.name).write_text("\n".join(["premise,hypothesis,label", *lines]) + "\n")
    made = {}
    for kind, source in zip(KINDS, (images, texts, pairs), strict=True):
        columns = {"text_column": "premise", "text_pair_column": "hypothesis"} if kind == "pair" else {}
        data = DataConfig(source=str(source), **columns)
        task = (ImageClassification if kind == "image" else TextClassification)(load_splits(data))
        net = tiny_timm["test_resnet"] if kind == "image" else tiny_bert
        model = build_model(RunConfig(data, ModelConfig(name=net)), task.head).eval()
        with torch.no_grad():  # else a new head's probabilities are all alike
            for value in model.head_parameters():
                value.mul_(200)
        made[kind] = Predictor(model, task, data)
    return made


@pytest.fixture(scope="module")
def pages(predictors):
    """A served page for each model, with what it shows."""
    pytest.importorskip("gradio")
    made = {}
    for kind, predictor in predictors.items():
        examples, origin = demo.example_rows(predictor)
        page = demo.build_demo(predictor, examples, origin)
        made[kind] = SimpleNamespace(url=demo.launch(page), examples=examples, origin=origin, page=page)
    yield made
    for served in made.values():
        served.page.close(verbose=False)


def given(kind, images):
    """One input of a kind, as files and texts."""
    return {
        "image": [str(images / "test" / "red" / "00.png")],
        "text": ["my cat, a dog"],
        "pair": ["the soup", "a saw my hammer"],
    }[kind]


@pytest.mark.parametrize("kind", KINDS)
def test_the_page_answers_as_the_model_does(pages, predictors, images, kind):
    client = pytest.importorskip("gradio_client")
    values = given(kind, images)
    sent = [client.handle_file(values[0])] if kind == "image" else values
    shown = client.Client(pages[kind].url, verbose=False).predict(*sent, api_name="/predict")
    row = predictors[kind].predict([values[0] if len(values) == 1 else tuple(values)])[0]
    assert max(row["probabilities"]) > 0.4  # not one answer for all
    assert shown["label"] == row["prediction"]
    wanted = dict(zip(predictors[kind].labels, row["probabilities"], strict=True))
    found = {entry["label"]: entry["confidence"] for entry in shown["confidences"]}
    assert found == pytest.approx(wanted, abs=1e-6)
    assert list(found.values()) == sorted(found.values(), reverse=True)


def test_no_more_than_ten_classes_are_shown(predictors):
    gradio = pytest.importorskip("gradio")
    many = SimpleNamespace(task=predictors["text"].task, columns=["text"], labels=[str(k) for k in range(77)])
    shown = [block for block in demo.build_demo(many).blocks.values() if isinstance(block, gradio.Label)]
    assert [label.num_top_classes for label in shown] == [10]


def test_an_empty_input_is_said(pages):
    client = pytest.importorskip("gradio_client")
    with pytest.raises(client.exceptions.AppError, match="Give a text for: hypothesis"):
        client.Client(pages["pair"].url, verbose=False).predict("the soup", " ", api_name="/predict")


# examples


@pytest.mark.parametrize("kind", KINDS)
def test_examples_are_test_rows_of_all_classes(predictors, kind):
    predictor = predictors[kind]
    examples, origin = demo.example_rows(predictor)
    assert origin == "Examples from the test split" and len(examples) == demo.EXAMPLES
    rows = load_splits(predictor.data)["test"]
    key = (lambda image: np.asarray(image.convert("RGB")).tobytes()) if kind == "image" else str
    labels = {tuple(key(row[name]) for name in predictor.columns): row["label"] for row in rows}
    found = [labels[tuple(map(key, example))] for example in examples]  # a KeyError: not a test row
    counts = [found.count(label) for label in set(labels.values())]
    assert max(counts) - min(counts) <= 1


def test_training_rows_are_examples_only_where_they_are_named(predictors, texts, tmp_path):
    (tmp_path / "train.csv").write_text((texts / "train.csv").read_text())
    model = predictors["text"]
    alone = Predictor(model.model, model.task, replace(model.data, source=str(tmp_path)))
    assert demo.example_rows(alone)[1] == "Examples from the validation split"
    unlabelled = tmp_path / "new.jsonl"
    unlabelled.write_text('{"text": "a cat"}\n{"text": "a saw"}\n')
    assert demo.example_rows(model, str(unlabelled)) == ([["a cat"], ["a saw"]], "Examples from the train split")


@pytest.mark.parametrize("missing", ["data", "column"])
def test_data_out_of_reach_cost_the_examples_only(predictors, tmp_path, missing, capsys):
    pytest.importorskip("gradio")
    (tmp_path / "new.jsonl").write_text('{"sentence": "a cat"}\n')
    source = tmp_path / ("gone" if missing == "data" else "new.jsonl")
    examples, origin = demo.example_rows(predictors["text"], str(source))
    said = capsys.readouterr().out
    assert examples == [] and said.startswith("demo: no examples: ") and said.count("\n") == 1
    assert demo.build_demo(predictors["text"], examples, origin).blocks


# where it listens


def reaches(address: str, url: str) -> bool:
    with socket.socket() as caller:
        caller.settimeout(5)
        return caller.connect_ex((address, int(url.rstrip("/").rpartition(":")[2]))) == 0


@pytest.mark.skipif(sys.platform != "linux", reason="127.0.0.2 is this machine on Linux only")
def test_it_listens_on_loopback_unless_told_otherwise(pages, predictors, capsys):
    for served in pages.values():
        assert reaches("127.0.0.1", served.url) and not reaches("127.0.0.2", served.url)
    capsys.readouterr()
    page = demo.build_demo(predictors["text"])
    url = demo.launch(page, "0.0.0.0")
    try:
        assert reaches("127.0.0.2", url)
        assert "warning: on 0.0.0.0, anyone who reaches port" in capsys.readouterr().out
    finally:
        page.close(verbose=False)


def test_a_taken_port_is_passed_over_or_said(monkeypatch):
    with socket.socket() as other, socket.socket() as spare:
        other.bind(("127.0.0.1", 0))
        other.listen()
        taken = other.getsockname()[1]
        spare.bind(("127.0.0.1", 0))
        free = spare.getsockname()[1]
        spare.close()
        with pytest.raises(ConfigError, match=f"--port: {taken} is taken on 127.0.0.1"):
            demo.free_port("127.0.0.1", taken)
        monkeypatch.setattr(demo, "PORTS", [taken, free])
        assert demo.free_port("127.0.0.1") == free
    with pytest.raises(ConfigError, match="--host: '192.0.2.1' is not an address of this machine"):
        demo.free_port("192.0.2.1")
    with pytest.raises(ConfigError, match="--port: 70000"):
        demo.free_port("127.0.0.1", 70000)


# the command


def test_what_is_missing_is_said_in_a_sentence(tmp_path, monkeypatch, capsys):
    def ended(*arguments):
        with pytest.raises(SystemExit) as left:
            main(["demo", *arguments])
        assert left.value.code == 2
        return capsys.readouterr().err

    if demo.find_spec("gradio"):
        assert re.match(r"ArtifactError: '.*none' is neither a run folder", ended(str(tmp_path / "none")))
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert 'ConfigError: hftl demo needs gradio, not installed here: pip install "hftl[demo]"' in ended("runs/photos")


def open_page(chromium, url):
    """A tab with the page, what it complained of, and what it asked of others than the page's server."""
    tab = chromium.new_page()
    said, asked = [], []
    tab.on("console", lambda message: said.append(message.text) if message.type in ("error", "warning") else None)
    tab.on("pageerror", lambda error: said.append(str(error)))
    tab.on("request", lambda request: asked.append(request.url) if not request.url.startswith((url, "data:")) else None)
    tab.goto(url)
    return tab, said, asked


@pytest.mark.slow
@pytest.mark.browser
def test_a_text_typed_in_a_browser_is_classified(chromium, text_run, capsys):
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
        url = re.match(r"demo: (http://127\.0\.0\.1:\d+/)", server.stdout.readline())[1]
        tab, said, asked = open_page(chromium, url)
        tab.get_by_text(f"test accuracy {accuracy:.4f}").wait_for()
        tab.get_by_label("Text", exact=True).fill("a cat, my horse")
        tab.get_by_role("button", name="Classify").click()
        wanted = load(run.output_dir).predict(["a cat, my horse"])[0]
        tab.locator("[data-testid=label-output-value]").wait_for()
        assert tab.locator("[data-testid=label-output-value]").inner_text().strip() == wanted["prediction"]
        assert f"{wanted['confidence']:.0%}" in tab.inner_text("body")
        assert not said and not asked
        tab.close()
    finally:
        server.terminate()
        server.communicate()


@pytest.mark.browser
def test_an_example_clicked_in_a_browser_is_classified(chromium, pages, predictors):
    served = pages["image"]
    tab, said, asked = open_page(chromium, served.url)
    tab.get_by_text(served.origin).wait_for()
    tab.locator("button.gallery-item").nth(1).click()
    wanted = predictors["image"].predict([served.examples[1][0]])[0]
    tab.locator("[data-testid=label-output-value]").wait_for()
    assert tab.locator("[data-testid=label-output-value]").inner_text().strip() == wanted["prediction"]
    text = tab.inner_text("body")
    assert all(f"{share:.0%}" in text for share in wanted["probabilities"])
    box = tab.locator("[data-testid=image] img").first.bounding_box()
    assert min(box["width"], box["height"]) > 100  # of 24 pixels
    assert not said and not asked
    tab.close()
