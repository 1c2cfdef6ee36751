"""`hftl.load`, `predict` and `evaluate` by folder and repo id, against the predictions and metrics of the run."""

import csv
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from conftest import run_undrawn
from launch import ENV
from safetensors.torch import load_file, save_file

import hftl
from hftl.artifacts.push import push
from hftl.cli.main import main
from hftl.errors import ArtifactError, DataError


@pytest.fixture(scope="module")
def text_folder(texts, tiny_bert, tmp_path_factory) -> Path:
    """A finished LoRA run on texts, with a pooled head."""
    return _train("text", texts, tiny_bert, tmp_path_factory.mktemp("text") / "run")


@pytest.fixture(scope="module")
def image_folder(images, tiny_timm, tmp_path_factory) -> Path:
    """A finished LoRA run on images."""
    return _train("image", images, tiny_timm["test_resnet"], tmp_path_factory.mktemp("image") / "run")


def _train(kind, source, model, folder) -> Path:
    run = hftl.RunConfig(
        hftl.DataConfig(source=str(source)),
        hftl.ModelConfig(name=model, pooling="mean"),
        hftl.AdaptConfig(method="lora"),
        hftl.TrainConfig(num_epochs=1, lr=1e-3, head_lr=1e-2, batch_size_per_device=8, trackers=[]),
        output_dir=str(folder),
    )
    run_undrawn(f"{kind}_classification", run)
    return folder


def read_test_predictions(folder: Path) -> list[dict]:
    """Returns the test rows of predictions.parquet of a run."""
    return [row for row in pq.read_table(folder / "predictions.parquet").to_pylist() if row["split"] == "test"]


def assert_predictions_equal(actual: list[dict], expected: list[dict]) -> None:
    assert [row["prediction"] for row in actual] == [row["prediction"] for row in expected]
    probabilities = np.array([row["probabilities"] for row in actual])
    np.testing.assert_allclose(probabilities, [row["probabilities"] for row in expected], atol=1e-5)


@pytest.mark.parametrize("part", ["", "model", "adapter"])
def test_predict_texts_matches_predictions_of_run(text_folder, texts, part):
    """For run folder, model and adapter (on its recorded base model); as texts, rows and a single text."""
    predictor = hftl.load(text_folder / part)
    with open(texts / "test.csv") as file:
        rows = list(csv.DictReader(file))
    assert predictor.labels == ["animal", "food", "tool"]
    assert_predictions_equal(predictor.predict([row["text"] for row in rows]), read_test_predictions(text_folder))
    assert_predictions_equal(predictor.predict(rows, batch_size=4), read_test_predictions(text_folder))
    assert_predictions_equal(predictor.predict(rows[0]["text"]), read_test_predictions(text_folder)[:1])
    assert predictor.predict([]) == []


@pytest.mark.parametrize("part", ["model", "adapter"])
def test_predict_images_matches_predictions_of_run(image_folder, images, part):
    from PIL import Image

    files = sorted((images / "test").rglob("*.png"))
    predictor = hftl.load(image_folder / part)
    assert_predictions_equal(predictor.predict(files), read_test_predictions(image_folder))
    assert_predictions_equal(
        predictor.predict([Image.open(file) for file in files]), read_test_predictions(image_folder)
    )
    assert_predictions_equal(
        predictor.predict([np.asarray(Image.open(file)) for file in files]), read_test_predictions(image_folder)
    )
    assert_predictions_equal(predictor.predict(str(files[0])), read_test_predictions(image_folder)[:1])


def test_load_by_repo_id_supports_revision_and_adapter(hub, text_folder, texts):
    with open(texts / "test.csv") as file:
        rows = list(csv.DictReader(file))
    first = push(text_folder, "alice/model", verify=False).rsplit("/", 1)[-1]
    files = {name: content for name, content in hub.store.repos["alice/model"].files.items()}
    hub.add_repo("alice/other", {"hftl.json": b"{}"})
    assert_predictions_equal(hftl.load("alice/model").predict(rows), read_test_predictions(text_folder))
    assert_predictions_equal(hftl.load("alice/model", revision=first).predict(rows), read_test_predictions(text_folder))
    assert_predictions_equal(
        hftl.load("alice/model", subfolder="adapter").predict(rows), read_test_predictions(text_folder)
    )
    assert files
    with pytest.raises(ArtifactError, match="damaged"):
        hftl.load("alice/other")
    with pytest.raises(ArtifactError, match="'alice/absent' does not exist"):
        hftl.load("alice/absent")
    with pytest.raises(ArtifactError, match="no such revision"):
        hftl.load("alice/model", revision="f" * 40)


def test_commands_accept_repo_ids(hub, image_folder, images, tmp_path, capsys):
    push(image_folder, "alice/model", verify=False)
    main(["evaluate", "alice/model", "--data", str(images)])
    printed = dict(line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("test/"))
    measured = json.loads((image_folder / "metrics.json").read_text())
    assert float(printed["test/accuracy"]) == pytest.approx(measured["test/accuracy"], abs=1e-4)
    main(["predict", "alice/model", str(images / "test"), "--output", str(tmp_path / "out.csv")])
    assert len((tmp_path / "out.csv").read_text().splitlines()) == 11


def test_load_rejects_repository_without_description(hub):
    hub.add_repo("alice/foreign", {"config.json": b"{}"})
    with pytest.raises(ArtifactError, match="alice/foreign.* lacks a file.*Load others with transformers or timm"):
        hftl.load("alice/foreign")


def copy_folder(folder: Path, target: Path) -> Path:
    shutil.copytree(folder, target, ignore=shutil.ignore_patterns("checkpoints"))
    return target


def test_load_names_missing_base_model_of_adapter(text_folder, tmp_path, tiny_bert):
    folder = copy_folder(text_folder / "adapter", tmp_path / "adapter")
    config = folder / "hftl_config.yaml"
    config.write_text(config.read_text().replace(tiny_bert, "/nowhere/bert"))
    description = folder / "hftl.json"
    description.write_text(description.read_text().replace(tiny_bert, "/nowhere/bert"))
    with pytest.raises(ArtifactError, match="base model '/nowhere/bert' of this adapter cannot be loaded"):
        hftl.load(folder)


def test_load_rejects_adapter_of_other_architecture(image_folder, tmp_path, tiny_timm):
    folder = copy_folder(image_folder / "adapter", tmp_path / "adapter")
    config = folder / "hftl_config.yaml"
    config.write_text(config.read_text().replace(tiny_timm["test_resnet"], tiny_timm["test_vit"]))
    with pytest.raises(ArtifactError, match="parameters.*its architecture differs"):
        hftl.load(folder)


@pytest.mark.parametrize("change", ["missing", "shape"])
def test_load_rejects_incomplete_adapter(text_folder, tmp_path, change):
    folder = copy_folder(text_folder / "adapter", tmp_path / "adapter")
    tensors = load_file(folder / "adapter_model.safetensors")
    name = next(name for name in tensors if "lora_A" in name)
    if change == "missing":
        del tensors[name]
    else:
        tensors[name] = tensors[name][:, :-1].contiguous()
    save_file(tensors, folder / "adapter_model.safetensors")
    with pytest.raises(ArtifactError, match="does not match the base model"):
        hftl.load(folder)


@pytest.mark.parametrize("damage", ["weights truncated", "weights missing", "config", "description", "mixed labels"])
def test_load_reports_damaged_file(text_folder, tmp_path, damage):
    folder = copy_folder(text_folder / "model", tmp_path / "model")
    weights, config, description = (folder / name for name in ("model.safetensors", "config.json", "hftl.json"))
    if damage == "weights truncated":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif damage == "weights missing":
        weights.unlink()
    elif damage == "config":
        config.write_text("{")
    elif damage == "description":
        description.write_text(description.read_text()[:-20])
    else:
        config.write_text(config.read_text().replace('"animal"', '"plant"'))
    message = "files of two runs" if damage == "mixed labels" else "does not open|cannot be loaded|damaged"
    with pytest.raises(ArtifactError, match=message):
        hftl.load(folder)


def test_predict_rejects_mismatched_inputs(text_folder, image_folder, tmp_path):
    with pytest.raises(DataError, match=r"lack the column\(s\) text\. Columns: txt.*'txt'"):
        hftl.load(text_folder).predict([{"txt": "the cat"}])
    with pytest.raises(DataError, match="takes a text per row, not tuple"):
        hftl.load(text_folder).predict([("the cat", "the dog")])
    with pytest.raises(DataError, match="no.png do not exist"):
        hftl.load(image_folder).predict([str(tmp_path / "no.png")])


def test_evaluate_maps_class_names_to_numeric_labels(text_run, texts, tmp_path, capsys):
    """A run trained on numeric labels with labels.json evaluates a table of class names."""
    folder = tmp_path / "numbered"
    folder.mkdir()
    names = ["animal", "food", "tool"]
    for split in ("train", "dev", "test"):
        text = (texts / f"{split}.csv").read_text()
        for number, name in enumerate(names):
            text = text.replace(f",{name}\n", f",{number}\n")
        (folder / f"{split}.csv").write_text(text)
    (folder / "labels.json").write_text(json.dumps(names))
    run = text_run("frozen")
    run = replace(run, data=replace(run.data, source=str(folder)))
    metrics = run_undrawn("text_classification", run)
    main(["evaluate", run.output_dir, "--data", str(texts)])
    assert f"{metrics['test/accuracy']:.4f}" in capsys.readouterr().out


def test_two_processes_predict_equal_table_in_order(text_folder, forks, tmp_path):
    """1,003 texts of varying length in batches of 8: complete, in order, equal to one process."""
    rng = np.random.default_rng(0)
    words = "the a my cat dog bread saw hammer soup".split()
    table = tmp_path / "texts.csv"
    lines = [" ".join(rng.choice(words, rng.integers(1, 12))) for _ in range(1003)]
    table.write_text("\n".join(["text", *lines]) + "\n")
    for processes, name in ((2, "two"), (1, "one")):
        arguments = [
            "predict",
            str(text_folder),
            str(table),
            "--batch_size",
            "8",
            "--output",
            f"{tmp_path / name}.parquet",
        ]
        if processes == 2:
            command = ["python", "-c", "from hftl.cli.main import main; main()", *arguments]
            statuses, output = forks.command(command, tmp_path / "logs", processes=2, **ENV)
            assert statuses == [0, 0] and output.count("1003 predictions") == 1, output[-3000:]
        else:
            main(arguments)
    one, two = (pq.read_table(tmp_path / f"{name}.parquet") for name in ("one", "two"))
    assert one["row"].to_pylist() == list(range(1003))
    assert one.drop(["confidence", "probabilities"]) == two.drop(["confidence", "probabilities"])
    difference = np.array(one["probabilities"].to_pylist()) - np.array(two["probabilities"].to_pylist())
    assert abs(difference).max() < 1e-6  # the number of threads may differ from that of launched processes


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"HF_TOKEN": ""}, "not logged in, or 'alice/model' does not exist"),
        ({"HF_TOKEN": "hf_nobody"}, "does not accept the token"),
        ({"HF_TOKEN": "hf_bob"}, "'alice/model' does not exist or is not accessible with this token"),
    ],
    ids=["no token", "wrong token", "token of other user"],
)
def test_load_of_private_model_reports_missing_access(hub, text_folder, environment, message, monkeypatch):
    push(text_folder, "alice/model", private=True, verify=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ArtifactError, match=message):
        hftl.load("alice/model")


def test_load_by_repo_id_raises_in_offline_mode(hub, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ArtifactError, match="'alice/model' is not a local folder; as a repo id"):
        hftl.load("alice/model")


def test_failed_prediction_leaves_no_partial_file(text_folder, tmp_path, monkeypatch):
    from hftl.evaluation.evaluate import TableWriter
    from hftl.inference.batch_inference import predict_to_file

    table = tmp_path / "texts.csv"
    table.write_text("\n".join(["text", *["the cat"] * 40]) + "\n")
    write = TableWriter.write

    def write_and_fail(writer, rows):
        write(writer, rows)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(TableWriter, "write", write_and_fail)
    with pytest.raises(OSError):
        predict_to_file(str(text_folder), str(table), output=str(tmp_path / "out.parquet"))
    assert [path.name for path in tmp_path.iterdir()] == ["texts.csv"]
