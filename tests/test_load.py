"""hftl.load, predict and evaluate: by folder and by id, on one process and on two, in bounded memory."""

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


def rows_of(folder: Path) -> list[dict]:
    """Returns the test rows of a run's own predictions."""
    return [row for row in pq.read_table(folder / "predictions.parquet").to_pylist() if row["split"] == "test"]


def same(found: list[dict], expected: list[dict]) -> None:
    assert [row["prediction"] for row in found] == [row["prediction"] for row in expected]
    found_shares = np.array([row["probabilities"] for row in found])
    np.testing.assert_allclose(found_shares, [row["probabilities"] for row in expected], atol=1e-5)


@pytest.mark.parametrize("part", ["", "model", "adapter"])
def test_texts_are_predicted_as_the_run_did(text_folder, texts, part):
    """The adapter opens on its recorded base model; texts, rows and data sets give the same."""
    predictor = hftl.load(text_folder / part)
    with open(texts / "test.csv") as file:
        rows = list(csv.DictReader(file))
    assert predictor.labels == ["animal", "food", "tool"]
    same(predictor.predict([row["text"] for row in rows]), rows_of(text_folder))
    same(predictor.predict(rows, batch_size=4), rows_of(text_folder))
    same(predictor.predict(rows[0]["text"]), rows_of(text_folder)[:1])
    assert predictor.predict([]) == []


@pytest.mark.parametrize("part", ["model", "adapter"])
def test_images_are_predicted_as_the_run_did(image_folder, images, part):
    from PIL import Image

    files = sorted((images / "test").rglob("*.png"))
    predictor = hftl.load(image_folder / part)
    same(predictor.predict(files), rows_of(image_folder))
    same(predictor.predict([Image.open(file) for file in files]), rows_of(image_folder))
    same(predictor.predict([np.asarray(Image.open(file)) for file in files]), rows_of(image_folder))
    same(predictor.predict(str(files[0])), rows_of(image_folder)[:1])


def test_by_id_at_a_revision_and_as_an_adapter(hub, text_folder, texts):
    with open(texts / "test.csv") as file:
        rows = list(csv.DictReader(file))
    first = push(text_folder, "alice/model", verify=False).rsplit("/", 1)[-1]
    files = {name: content for name, content in hub.store.repos["alice/model"].files.items()}
    hub.add_repo("alice/other", {"hftl.json": b"{}"})
    same(hftl.load("alice/model").predict(rows), rows_of(text_folder))
    same(hftl.load("alice/model", revision=first).predict(rows), rows_of(text_folder))
    same(hftl.load("alice/model", subfolder="adapter").predict(rows), rows_of(text_folder))
    assert files
    with pytest.raises(ArtifactError, match="damaged"):
        hftl.load("alice/other")
    with pytest.raises(ArtifactError, match="'alice/absent' does not exist"):
        hftl.load("alice/absent")
    with pytest.raises(ArtifactError, match="no such revision"):
        hftl.load("alice/model", revision="f" * 40)


def test_commands_take_ids(hub, image_folder, images, tmp_path, capsys):
    push(image_folder, "alice/model", verify=False)
    main(["evaluate", "alice/model", "--data", str(images)])
    printed = dict(line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("test/"))
    measured = json.loads((image_folder / "metrics.json").read_text())
    assert float(printed["test/accuracy"]) == pytest.approx(measured["test/accuracy"], abs=1e-4)
    main(["predict", "alice/model", str(images / "test"), "--output", str(tmp_path / "out.csv")])
    assert len((tmp_path / "out.csv").read_text().splitlines()) == 11


def test_a_repository_that_hftl_did_not_make_is_named(hub):
    hub.add_repo("alice/foreign", {"config.json": b"{}"})
    with pytest.raises(ArtifactError, match="alice/foreign.* lacks a file.*open others with transformers or timm"):
        hftl.load("alice/foreign")


def copied(folder: Path, target: Path) -> Path:
    shutil.copytree(folder, target, ignore=shutil.ignore_patterns("checkpoints"))
    return target


def test_an_adapter_whose_base_model_is_gone_says_which(text_folder, tmp_path, tiny_bert):
    folder = copied(text_folder / "adapter", tmp_path / "adapter")
    config = folder / "hftl_config.yaml"
    config.write_text(config.read_text().replace(tiny_bert, "/nowhere/bert"))
    described = folder / "hftl.json"
    described.write_text(described.read_text().replace(tiny_bert, "/nowhere/bert"))
    with pytest.raises(ArtifactError, match="adapter of the base model '/nowhere/bert'.*does not open here"):
        hftl.load(folder)


def test_an_adapter_of_another_architecture_is_refused(image_folder, tmp_path, tiny_timm):
    folder = copied(image_folder / "adapter", tmp_path / "adapter")
    config = folder / "hftl_config.yaml"
    config.write_text(config.read_text().replace(tiny_timm["test_resnet"], tiny_timm["test_vit"]))
    with pytest.raises(ArtifactError, match="parameters.*it is another architecture"):
        hftl.load(folder)


@pytest.mark.parametrize("change", ["missing", "shape"])
def test_an_incomplete_adapter_is_refused(text_folder, tmp_path, change):
    folder = copied(text_folder / "adapter", tmp_path / "adapter")
    tensors = load_file(folder / "adapter_model.safetensors")
    name = next(name for name in tensors if "lora_A" in name)
    if change == "missing":
        del tensors[name]
    else:
        tensors[name] = tensors[name][:, :-1].contiguous()
    save_file(tensors, folder / "adapter_model.safetensors")
    with pytest.raises(ArtifactError, match="does not fit the base model"):
        hftl.load(folder)


@pytest.mark.parametrize("damage", ["weights cut", "weights missing", "config", "description", "mixed labels"])
def test_a_damaged_model_is_named(text_folder, tmp_path, damage):
    folder = copied(text_folder / "model", tmp_path / "model")
    weights, config, described = (folder / name for name in ("model.safetensors", "config.json", "hftl.json"))
    if damage == "weights cut":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif damage == "weights missing":
        weights.unlink()
    elif damage == "config":
        config.write_text("{")
    elif damage == "description":
        described.write_text(described.read_text()[:-20])
    else:
        config.write_text(config.read_text().replace('"animal"', '"plant"'))
    with pytest.raises(
        ArtifactError, match="mixed here" if damage == "mixed labels" else "cannot be loaded|does not open|damaged"
    ):
        hftl.load(folder)


def test_inputs_that_do_not_fit_are_named(text_folder, image_folder, tmp_path):
    with pytest.raises(DataError, match=r"lack the column\(s\) text; they have txt.*'txt'"):
        hftl.load(text_folder).predict([{"txt": "the cat"}])
    with pytest.raises(DataError, match="takes a text a row, not tuple"):
        hftl.load(text_folder).predict([("the cat", "the dog")])
    with pytest.raises(DataError, match="there is no file"):
        hftl.load(image_folder).predict([str(tmp_path / "no.png")])


def test_class_names_are_understood_where_training_had_numbers(text_run, texts, tmp_path, capsys):
    """A run trained on numbered classes with names beside them measures a table that names its classes."""
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


def test_two_processes_predict_the_same_table_in_order(text_folder, forks, tmp_path):
    """1,003 texts of uneven length in batches of 8: complete, in order, equal to one process."""
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
            words = ["python", "-c", "from hftl.cli.main import main; main()", *arguments]
            statuses, said = forks.command(words, tmp_path / "logs", processes=2, **ENV)
            assert statuses == [0, 0] and said.count("1003 predictions") == 1, said[-3000:]
        else:
            main(arguments)
    one, two = (pq.read_table(tmp_path / f"{name}.parquet") for name in ("one", "two"))
    assert one["row"].to_pylist() == list(range(1003))
    assert one.drop(["confidence", "probabilities"]) == two.drop(["confidence", "probabilities"])
    difference = np.array(one["probabilities"].to_pylist()) - np.array(two["probabilities"].to_pylist())
    assert abs(difference).max() < 1e-6  # this process and those of the launcher may use other numbers of threads


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({"HF_TOKEN": ""}, "not logged in, or 'alice/model' does not exist"),
        ({"HF_TOKEN": "hf_nobody"}, "does not accept the token"),
        ({"HF_TOKEN": "hf_bob"}, "'alice/model' does not exist or is not accessible with this token"),
    ],
    ids=["no token", "wrong token", "someone else's"],
)
def test_a_private_model_without_the_right_token_says_so(hub, text_folder, environment, said, monkeypatch):
    push(text_folder, "alice/model", private=True, verify=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ArtifactError, match=said):
        hftl.load("alice/model")


def test_a_model_that_cannot_be_fetched_offline_says_so(hub, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ArtifactError, match="'alice/model' is not a folder here, and as a hub id"):
        hftl.load("alice/model")


def test_a_prediction_that_fails_leaves_no_half_table(text_folder, tmp_path, monkeypatch):
    from hftl.evaluation.evaluate import TableWriter
    from hftl.inference.batch_inference import predict_to_file

    table = tmp_path / "texts.csv"
    table.write_text("\n".join(["text", *["the cat"] * 40]) + "\n")
    write = TableWriter.write

    def failing(writer, rows):
        write(writer, rows)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(TableWriter, "write", failing)
    with pytest.raises(OSError):
        predict_to_file(str(text_folder), str(table), output=str(tmp_path / "out.parquet"))
    assert [path.name for path in tmp_path.iterdir()] == ["texts.csv"]
