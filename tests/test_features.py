"""Feature cache: feature values, cache keys, resumed and concurrent computation, Parquet export."""

import json
import os
import shutil
import socket
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from accelerate import Accelerator
from conftest import ROOT
from safetensors.torch import load_file, save_file

import hftl
from hftl.cli.main import main
from hftl.errors import FeatureError
from hftl.features import cache
from hftl.features.cache import compute_features
from hftl.features.extractor import linear_head
from hftl.features.store import META, VALUES


@pytest.fixture(autouse=True)
def empty_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("HFTL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "features"


def load_run(run):
    task_class = hftl.TextClassification if "texts" in run.data.source else hftl.ImageClassification
    splits = hftl.load_splits(run.data)
    task = task_class(splits)
    return hftl.build_model(run, task.head), task, splits


def features_of(run, split="train", **options):
    model, task, splits = load_run(run)
    return compute_features(Accelerator(), model, task, splits[split], run, split=split, **options)


@pytest.mark.parametrize("case", ["mean", "default", "test_resnet", "test_vit"])
def test_head_on_features_matches_model_logits(case, text_run, image_run):
    run = image_run(case) if case.startswith("test") else text_run("frozen", case)
    model, task, splits = load_run(run)
    computed = compute_features(Accelerator(), model, task, splits["test"], run, split="test")
    rows = task.encode(splits["test"], model.processor, None, None)
    batch = task.collate(rows.fetch(range(len(rows)), 0))
    with torch.no_grad():
        logits = model.eval()(batch["inputs"])["logits"]
        head_logits = linear_head(model)(torch.from_numpy(np.array(computed.values)))
    assert computed.linear and torch.allclose(logits, head_logits, atol=1e-5)
    assert torch.equal(torch.from_numpy(np.array(computed.labels)), batch["labels"])
    assert not computed.values.flags.writeable and computed.values.dtype == np.float32
    cached = compute_features(Accelerator(), model, task, splits["test"], run, split="test")
    assert cached.from_cache and not computed.from_cache and np.array_equal(computed.values, cached.values)


def test_layer_features_match_model_pooling(text_run):
    run = text_run("frozen", "mean")
    layers, mean, head = (features_of(run, "test", layers=name).values for name in ("all", "mean", "head"))
    assert layers.shape == (13, 2, 32) and np.allclose(layers.mean(1), mean, atol=1e-6)
    assert np.allclose(layers[:, -1], head, atol=1e-6) and not np.allclose(layers[:, 0], head, atol=1e-2)


def test_layer_features_of_images_raise(image_run):
    with pytest.raises(FeatureError, match="requires a text model"):
        features_of(image_run(), layers="mean")


def test_cache_key_detects_changes_of_model_and_data(text_run, tmp_path, tiny_bert):
    run = text_run("frozen", "mean")
    model = tmp_path / "bert"
    shutil.copytree(tiny_bert, model)
    texts = tmp_path / "texts_copy"
    shutil.copytree(run.data.source, texts)
    run = replace(run, model=replace(run.model, name=str(model)), data=replace(run.data, source=str(texts)))
    first = features_of(run)
    assert features_of(run).from_cache
    changed_seed = replace(run, train=replace(run.train, seed=5, batch_size_per_device=4))
    assert features_of(changed_seed).from_cache, "features are independent of head and batch size"
    assert features_of(replace(run, model=replace(run.model, dropout=0.3))).from_cache, "features have no dropout"
    assert not features_of(replace(run, data=replace(run.data, max_length=7))).from_cache
    assert not features_of(replace(run, model=replace(run.model, pooling="cls"))).from_cache
    table = texts / "train.csv"
    table.write_text(table.read_text().replace("cat", "dog", 1))
    changed = features_of(run)
    assert not changed.from_cache and np.abs(changed.values - first.values).max() > 0
    weights = load_file(model / "model.safetensors")
    name = next(name for name in weights if "layer.0" in name and name.endswith("bias"))
    weights[name][0] += 1e-3
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    assert not features_of(run).from_cache


def test_cache_key_detects_change_of_timm_pooling(image_run, tmp_path, tiny_timm):
    """timm networks with mean and max pooling have equal weights."""
    features = []
    for pool in ("avg", "max"):
        folder = tmp_path / pool
        shutil.copytree(tiny_timm["test_vit"].removeprefix("local-dir:"), folder)
        config = json.loads((folder / "config.json").read_text())
        config["global_pool"] = pool
        config["model_args"] = config.get("model_args", {}) | {"global_pool": pool}
        (folder / "config.json").write_text(json.dumps(config))
        run = image_run("test_vit")
        features.append(features_of(replace(run, model=replace(run.model, name=f"local-dir:{folder}"))))
    assert not features[1].from_cache and not np.allclose(features[0].values, features[1].values)


def test_cache_key_detects_change_of_custom_task_code(text_run, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    run, hits = text_run("frozen", "mean"), []
    for version in ("1", "1", "2"):
        code = f"import hftl\nclass Custom(hftl.TextClassification):\n    v = {version}\n"
        (tmp_path / "custom.py").write_text(code)
        sys.modules.pop("custom", None)
        import custom

        splits = hftl.load_splits(run.data)
        task = custom.Custom(splits)
        model = hftl.build_model(run, task.head)
        hits.append(compute_features(Accelerator(), model, task, splits["test"], run).from_cache)
    assert hits == [False, True, False]


def test_cache_key_detects_change_of_image_file(image_run, images, tmp_path):
    folder = tmp_path / "images"
    shutil.copytree(images, folder)
    run = image_run()
    run = replace(run, data=replace(run.data, source=str(folder)))
    model, task, splits = load_run(run)  # the dataset stays open while a file changes
    first = compute_features(Accelerator(), model, task, splits["test"], run)
    files = sorted((folder / "test").rglob("*.png"))
    shutil.copy(files[-1], files[0])
    second = compute_features(Accelerator(), model, task, splits["test"], run)
    assert not second.from_cache and (first.values != second.values).any(1).sum() == 1


def test_views_match_augmentation_of_epochs(image_run):
    run = image_run()
    original, view_0, view_1 = features_of(run), features_of(run, view=0), features_of(run, view=1)
    assert not np.allclose(original.values, view_0.values) and not np.allclose(view_0.values, view_1.values)
    changed_seed = replace(run, train=replace(run.train, seed=9))
    assert features_of(run, view=1).from_cache and not features_of(changed_seed, view=1).from_cache
    assert features_of(changed_seed).from_cache


def test_interrupted_extraction_resumes_without_recomputation(text_run, monkeypatch, capsys):
    run = text_run("frozen", "mean")
    run = replace(run, train=replace(run.train, batch_size_per_device=1))
    uninterrupted = features_of(run).values.copy()
    shutil.rmtree(cache.cache_folder())
    monkeypatch.setattr(cache, "FLUSH_INTERVAL_S", 0.0)
    computed, add = [], cache.PartialFeatures.add

    def interrupt(self, index, values, labels):
        if len(computed) == 20:
            raise KeyboardInterrupt
        record(self, index, values, labels)

    def record(self, index, values, labels):
        computed.extend(index)
        add(self, index, values, labels)

    monkeypatch.setattr(cache.PartialFeatures, "add", interrupt)
    with pytest.raises(KeyboardInterrupt):
        features_of(run)
    monkeypatch.setattr(cache.PartialFeatures, "add", record)
    resumed = features_of(run)
    assert sorted(computed) == list(range(60)), "each row is computed once"
    assert "resuming with 20 of 60 rows computed" in capsys.readouterr().out
    assert np.array_equal(resumed.values, uninterrupted) and features_of(run).from_cache


@pytest.mark.parametrize("damage", ["truncated", "format", "json", "missing"])
def test_damaged_or_incompatible_cache_is_recomputed(damage, text_run, empty_cache):
    run = text_run("frozen", "mean")
    first = features_of(run).values.copy()
    (folder,) = (path for path in empty_cache.iterdir() if path.is_dir())
    if damage == "truncated":
        os.truncate(folder / VALUES, 1000)
    elif damage == "format":
        meta = json.loads((folder / META).read_text())
        (folder / META).write_text(json.dumps(meta | {"format": 999}))
    elif damage == "json":
        (folder / META).write_text('{"format"')
    else:
        (folder / VALUES).unlink()
    recomputed = features_of(run)
    assert not recomputed.from_cache and np.array_equal(first, recomputed.values) and features_of(run).from_cache


COMPUTE = """
import sys, json
from accelerate import Accelerator
import numpy as np
import hftl
from hftl.features.cache import compute_features
run = hftl.RunConfig(hftl.DataConfig(source=sys.argv[1]), hftl.ModelConfig(name=sys.argv[2], pooling="mean"),
                     train=hftl.TrainConfig(batch_size_per_device=1))
splits = hftl.load_splits(run.data)
task = hftl.TextClassification(splits)
accelerator = Accelerator()
features = compute_features(accelerator, hftl.build_model(run, task.head), task, splits["train"], run)
np.save(sys.argv[3] + str(accelerator.process_index), features.values)
print("FROM_CACHE", features.from_cache, features.labels.tolist() == task.collate(
    task.encode(splits["train"], hftl.build_model(run, task.head).processor, None, None).fetch(range(60), 0)
)["labels"].tolist())
from hftl.logging import leave_process_group
leave_process_group()
"""


def environment():
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}


@pytest.mark.slow
def test_concurrent_jobs_compute_features_once(text_run, tiny_bert, tmp_path):
    source = text_run().data.source
    jobs = [
        subprocess.Popen(
            [sys.executable, "-c", COMPUTE, source, tiny_bert, str(tmp_path / f"job{number}-")],
            stdout=subprocess.PIPE,
            text=True,
            env=environment(),
        )
        for number in range(2)
    ]
    outputs = [job.communicate(timeout=200)[0] for job in jobs]
    assert sorted(line for output in outputs for line in output.splitlines() if "FROM_CACHE" in line) == [
        "FROM_CACHE False True",
        "FROM_CACHE True True",
    ]
    assert np.array_equal(*(np.load(tmp_path / f"job{number}-0.npy") for number in range(2)))


@pytest.mark.slow
def test_two_machines_with_shared_disk_match(text_run, tiny_bert, tmp_path):
    """Both have local rank 0 and write features: with one folder, the lock of one would block the other."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": "2"}
    command = [sys.executable, "-c", COMPUTE, text_run().data.source, tiny_bert, str(tmp_path / "values")]
    jobs = [
        subprocess.Popen(command, env=environment() | group | {"RANK": str(rank), "LOCAL_RANK": "0"})
        for rank in range(2)
    ]
    assert [job.wait(timeout=120) for job in jobs] == [0, 0]
    assert np.array_equal(*(np.load(tmp_path / f"values{rank}.npy") for rank in range(2)))


def test_two_processes_match_single_process_features(text_run, tiny_bert, forks, tmp_path):
    logs, prefix = tmp_path / "logs", str(tmp_path / "values")
    command = ["python", "-c", COMPUTE, text_run().data.source, tiny_bert, prefix]
    statuses, output = forks.command(command, logs, 200, processes=2, ACCELERATE_USE_CPU="true")
    assert statuses == [0, 0], output[-3000:]
    assert sum(log.read_text().count("FROM_CACHE False True") for log in logs.iterdir()) == 2
    run = replace(text_run("frozen", "mean"), train=hftl.TrainConfig(batch_size_per_device=1))
    shutil.rmtree(cache.cache_folder())
    expected = features_of(run).values
    for rank in range(2):
        assert np.allclose(np.load(f"{prefix}{rank}.npy"), expected, atol=1e-6)


def test_unwritable_cache_folder_raises(text_run, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("HFTL_CACHE", str(tmp_path / "file"))
    with pytest.raises(FeatureError, match="HFTL_CACHE"):
        features_of(text_run("frozen", "mean"))


def test_features_command_writes_parquet_from_cache(texts, tiny_bert, text_run, tmp_path, capsys):
    main(["features", str(texts), "--model", tiny_bert, "--layers", "all", "--output", str(tmp_path / "out")])
    table = pq.read_table(tmp_path / "out" / "test.parquet")
    (tmp_path / "columns.yaml").write_text("data: {label_column: kind}")
    with pytest.raises(SystemExit):
        main(["features", str(texts), "--model", tiny_bert, "--config", str(tmp_path / "columns.yaml")])
    assert "there is no column 'kind'" in capsys.readouterr().err
    assert table.column_names == ["row", "label", "layer_1", "layer_2"] and table.num_rows == 13
    assert set(table["label"].to_pylist()) == {"animal", "food", "tool"}
    layers = features_of(replace(text_run("frozen")), "test", layers="all")
    assert layers.from_cache, "the command uses the cache of all runs"
    assert np.array_equal(np.array(table["layer_2"].to_pylist(), dtype=np.float32), layers.values[:, 1])
