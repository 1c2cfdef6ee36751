"""Features are what the head sees, computed once: any change makes new ones, no stop and no neighbour harms them."""

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


def opened(run):
    kind = hftl.TextClassification if "texts" in run.data.source else hftl.ImageClassification
    splits = hftl.load_splits(run.data)
    task = kind(splits)
    return hftl.build_model(run, task.head), task, splits


def of(run, split="train", **options):
    model, task, splits = opened(run)
    return compute_features(Accelerator(), model, task, splits[split], run, split=split, **options)


@pytest.mark.parametrize("kind", ["mean", "default", "test_resnet", "test_vit"])
def test_the_head_of_the_features_gives_the_logits_of_the_model(kind, text_run, image_run):
    run = image_run(kind) if kind.startswith("test") else text_run("frozen", kind)
    model, task, splits = opened(run)
    found = compute_features(Accelerator(), model, task, splits["test"], run, split="test")
    rows = task.encode(splits["test"], model.processor, None, None)
    batch = task.collate(rows.fetch(range(len(rows)), 0))
    with torch.no_grad():
        logits = model.eval()(batch["inputs"])["logits"]
        ours = linear_head(model)(torch.from_numpy(np.array(found.values)))
    assert found.linear and torch.allclose(logits, ours, atol=1e-5)
    assert torch.equal(torch.from_numpy(np.array(found.labels)), batch["labels"])
    assert not found.values.flags.writeable and found.values.dtype == np.float32
    again = compute_features(Accelerator(), model, task, splits["test"], run, split="test")
    assert again.from_cache and not found.from_cache and np.array_equal(found.values, again.values)


def test_layers_are_pooled_as_the_model_pools(text_run):
    run = text_run("frozen", "mean")
    every, mean, head = (of(run, "test", layers=layers).values for layers in ("all", "mean", "head"))
    assert every.shape == (13, 2, 32) and np.allclose(every.mean(1), mean, atol=1e-6)
    assert np.allclose(every[:, -1], head, atol=1e-6) and not np.allclose(every[:, 0], head, atol=1e-2)


def test_images_have_no_layers(image_run):
    with pytest.raises(FeatureError, match="text models; say head"):
        of(image_run(), layers="mean")


def test_any_change_is_another_key_and_nothing_else_is(text_run, tmp_path, tiny_bert):
    run = text_run("frozen", "mean")
    model = tmp_path / "bert"
    shutil.copytree(tiny_bert, model)
    texts = tmp_path / "texts_copied"
    shutil.copytree(run.data.source, texts)
    run = replace(run, model=replace(run.model, name=str(model)), data=replace(run.data, source=str(texts)))
    first = of(run)
    assert of(run).from_cache
    other_head = replace(run, train=replace(run.train, seed=5, batch_size_per_device=4))
    assert of(other_head).from_cache, "neither the head nor the batch size matters"
    assert of(replace(run, model=replace(run.model, dropout=0.3))).from_cache, "nor does dropout: features have none"
    assert not of(replace(run, data=replace(run.data, max_length=7))).from_cache
    assert not of(replace(run, model=replace(run.model, pooling="cls"))).from_cache
    table = texts / "train.csv"
    table.write_text(table.read_text().replace("cat", "dog", 1))
    changed = of(run)
    assert not changed.from_cache and np.abs(changed.values - first.values).max() > 0
    weights = load_file(model / "model.safetensors")
    name = next(name for name in weights if "layer.0" in name and name.endswith("bias"))
    weights[name][0] += 1e-3
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    assert not of(run).from_cache


def test_how_a_network_pools_is_in_the_key(image_run, tmp_path, tiny_timm):
    """timm's networks hold the same weights whether they take the mean of the patches or their maximum."""
    found = []
    for pool in ("avg", "max"):
        folder = tmp_path / pool
        shutil.copytree(tiny_timm["test_vit"].removeprefix("local-dir:"), folder)
        config = json.loads((folder / "config.json").read_text())
        config["global_pool"] = pool
        config["model_args"] = config.get("model_args", {}) | {"global_pool": pool}
        (folder / "config.json").write_text(json.dumps(config))
        run = image_run("test_vit")
        found.append(of(replace(run, model=replace(run.model, name=f"local-dir:{folder}"))))
    assert not found[1].from_cache and not np.allclose(found[0].values, found[1].values)


def test_the_code_of_a_task_of_somebody_else_is_in_the_key(text_run, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    run, hits = text_run("frozen", "mean"), []
    for version in ("1", "1", "2"):
        (tmp_path / "mine.py").write_text(f"import hftl\nclass Mine(hftl.TextClassification):\n    v = {version}\n")
        sys.modules.pop("mine", None)
        import mine

        splits = hftl.load_splits(run.data)
        task = mine.Mine(splits)
        model = hftl.build_model(run, task.head)
        hits.append(compute_features(Accelerator(), model, task, splits["test"], run).from_cache)
    assert hits == [False, True, False]


def test_an_image_that_changes_on_disk_is_noticed(image_run, images, tmp_path):
    folder = tmp_path / "pictures"
    shutil.copytree(images, folder)
    run = image_run()
    run = replace(run, data=replace(run.data, source=str(folder)))
    model, task, splits = opened(run)  # the rows stay open while a file under them changes
    first = compute_features(Accelerator(), model, task, splits["test"], run)
    files = sorted((folder / "test").rglob("*.png"))
    shutil.copy(files[-1], files[0])
    second = compute_features(Accelerator(), model, task, splits["test"], run)
    assert not second.from_cache and (first.values != second.values).any(1).sum() == 1


def test_views_are_the_epochs_of_augmentation(image_run):
    run = image_run()
    plain, zero, one = of(run), of(run, view=0), of(run, view=1)
    assert not np.allclose(plain.values, zero.values) and not np.allclose(zero.values, one.values)
    other = replace(run, train=replace(run.train, seed=9))
    assert of(run, view=1).from_cache and not of(other, view=1).from_cache and of(other).from_cache


def test_an_extraction_that_was_interrupted_goes_on(text_run, monkeypatch, capsys):
    run = text_run("frozen", "mean")
    small = replace(run, train=replace(run.train, batch_size_per_device=1))
    whole = of(small).values.copy()
    shutil.rmtree(cache.cache_folder())
    monkeypatch.setattr(cache, "KEEP_S", 0.0)
    seen, plain = [], cache.Growing.add

    def failing(self, index, values, labels):
        if len(seen) == 20:
            raise KeyboardInterrupt
        seen.extend(index)
        plain(self, index, values, labels)

    monkeypatch.setattr(cache.Growing, "add", failing)
    with pytest.raises(KeyboardInterrupt):
        of(small)
    monkeypatch.setattr(
        cache.Growing, "add", lambda self, index, *rest: (seen.extend(index), plain(self, index, *rest))
    )
    found = of(small)
    assert sorted(seen) == list(range(60)), "no row was computed twice"
    assert "40 of 60" not in capsys.readouterr().out.split("going on")[1]
    assert np.array_equal(found.values, whole) and of(small).from_cache


@pytest.mark.parametrize("harm", ["cut", "format", "json", "gone"])
def test_damage_and_other_formats_are_made_anew(harm, text_run, empty_cache):
    run = text_run("frozen", "mean")
    first = of(run).values.copy()
    (folder,) = (path for path in empty_cache.iterdir() if path.is_dir())
    if harm == "cut":
        os.truncate(folder / VALUES, 1000)
    elif harm == "format":
        meta = json.loads((folder / META).read_text())
        (folder / META).write_text(json.dumps(meta | {"format": 999}))
    elif harm == "json":
        (folder / META).write_text('{"format"')
    else:
        (folder / VALUES).unlink()
    again = of(run)
    assert not again.from_cache and np.array_equal(first, again.values) and of(run).from_cache


TWO = """
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
found = compute_features(accelerator, hftl.build_model(run, task.head), task, splits["train"], run)
np.save(sys.argv[3] + str(accelerator.process_index), found.values)
print("FROM_CACHE", found.from_cache, found.labels.tolist() == task.collate(
    task.encode(splits["train"], hftl.build_model(run, task.head).processor, None, None).fetch(range(60), 0)
)["labels"].tolist())
from hftl.logging import leave_process_group
leave_process_group()
"""


def environment():
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}


@pytest.mark.slow
def test_two_processes_that_want_the_same_compute_it_once(text_run, tiny_bert, tmp_path):
    source = text_run().data.source
    jobs = [
        subprocess.Popen(
            [sys.executable, "-c", TWO, source, tiny_bert, str(tmp_path / f"job{number}-")],
            stdout=subprocess.PIPE,
            text=True,
            env=environment(),
        )
        for number in range(2)
    ]
    told = [job.communicate(timeout=200)[0] for job in jobs]
    assert sorted(line for out in told for line in out.splitlines() if "FROM_CACHE" in line) == [
        "FROM_CACHE False True",
        "FROM_CACHE True True",
    ]
    assert np.array_equal(*(np.load(tmp_path / f"job{number}-0.npy") for number in range(2)))


@pytest.mark.slow
def test_two_machines_with_one_disk_do_not_wait_for_each_other(text_run, tiny_bert, tmp_path):
    """Each is the first process of its machine, and both would write: the lock of one would hold up the other."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        meet = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": "2"}
    words = [sys.executable, "-c", TWO, text_run().data.source, tiny_bert, str(tmp_path / "values")]
    jobs = [
        subprocess.Popen(words, env=environment() | meet | {"RANK": str(rank), "LOCAL_RANK": "0"}) for rank in range(2)
    ]
    assert [job.wait(timeout=120) for job in jobs] == [0, 0]
    assert np.array_equal(*(np.load(tmp_path / f"values{rank}.npy") for rank in range(2)))


def test_two_processes_share_the_pass(text_run, tiny_bert, forks, tmp_path):
    logs, out = tmp_path / "logs", str(tmp_path / "values")
    words = ["python", "-c", TWO, text_run().data.source, tiny_bert, out]
    statuses, said = forks.command(words, logs, 200, processes=2, ACCELERATE_USE_CPU="true")
    assert statuses == [0, 0], said[-3000:]
    assert sum(log.read_text().count("FROM_CACHE False True") for log in logs.iterdir()) == 2
    run = replace(text_run("frozen", "mean"), train=hftl.TrainConfig(batch_size_per_device=1))
    shutil.rmtree(cache.cache_folder())
    alone = of(run).values
    for rank in range(2):
        assert np.allclose(np.load(f"{out}{rank}.npy"), alone, atol=1e-6)


def test_a_folder_that_cannot_be_written_is_said(text_run, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("HFTL_CACHE", str(tmp_path / "file"))
    with pytest.raises(FeatureError, match="HFTL_CACHE"):
        of(text_run("frozen", "mean"))


def test_the_command_writes_parquet(texts, tiny_bert, text_run, tmp_path, capsys):
    main(["features", str(texts), "--model", tiny_bert, "--layers", "all", "--output", str(tmp_path / "out")])
    table = pq.read_table(tmp_path / "out" / "test.parquet")
    (tmp_path / "columns.yaml").write_text("data: {label_column: kind}")
    with pytest.raises(SystemExit):
        main(["features", str(texts), "--model", tiny_bert, "--config", str(tmp_path / "columns.yaml")])
    assert "there is no column 'kind'" in capsys.readouterr().err
    assert table.column_names == ["row", "label", "layer_1", "layer_2"] and table.num_rows == 13
    assert set(table["label"].to_pylist()) == {"animal", "food", "tool"}
    every = of(replace(text_run("frozen")), "test", layers="all")
    assert every.from_cache, "the same features as everywhere"
    assert np.array_equal(np.array(table["layer_2"].to_pylist(), dtype=np.float32), every.values[:, 1])
