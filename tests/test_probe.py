"""Classic heads: linear ones are the stock model's own, the others stand beside it; both say what scikit-learn says."""

import importlib.util
import json
import os
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import load_recipe, run_undrawn, with_data
from launch import flags

import hftl
from hftl.artifacts.export import export_folder
from hftl.config.schema import ProbeConfig
from hftl.errors import AdaptError, ArtifactError, ConfigError, FeatureError, RunComplete
from hftl.heads import sklearn_head as sklearn_head
from hftl.heads.classifiers import KINDS
from hftl.heads.sklearn_head import SklearnHead
from hftl.heads.sklearn_probe import Probe, calibrate, fit_classifier
from hftl.reporting import write_report

LINEAR = [name for name, kind in KINDS.items() if kind.linear]
CLASSIC = [name for name, kind in KINDS.items() if not kind.linear]


@pytest.fixture(autouse=True)
def few_trees(monkeypatch):
    """A forest of 20 trees grows in a tenth of the time, and is a forest."""
    kind = KINDS["random_forest"]
    make = kind.make
    fewer = replace(kind, make=lambda *a: make(*a).set_params(n_estimators=20), meanwhile={"n_estimators": 5})
    monkeypatch.setitem(KINDS, "random_forest", fewer)


@pytest.fixture
def no_skops(monkeypatch):
    """Returns a function after which skops cannot be found."""
    find = importlib.util.find_spec
    missing = lambda name, *rest: None if name == "skops" else find(name, *rest)  # noqa: E731
    return lambda: monkeypatch.setattr(importlib.util, "find_spec", missing)


def blobs(rows=120, features=10, classes=3, seed=0, apart=1.0):
    """Features around class means, on scales that differ a thousandfold, far from 0."""
    rng = np.random.default_rng(seed)
    labels = np.arange(rows) % classes
    means = apart * rng.standard_normal((classes, features))
    values = means[labels] + rng.standard_normal((rows, features))
    return (values * np.logspace(-1, 2, features) + 5).astype(np.float32), labels


def with_head(run, head, **probe):
    return replace(run, adapt=replace(run.adapt, method="probe", probe=ProbeConfig(classifier=head, **probe)))


def probabilities(fitted: Probe, values) -> np.ndarray:
    """What the artifact of a fitted head would say."""
    if KINDS[fitted.head].linear:
        weight, bias = fitted.linear()
        return (torch.tensor(values) @ torch.tensor(weight).T + torch.tensor(bias)).softmax(1).numpy()
    head = SklearnHead(fitted.head, fitted.estimator, fitted.num_classes, fitted.calibration)
    return head(torch.tensor(values)).softmax(1).numpy()


# the heads themselves


@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize("head", KINDS)
def test_a_head_is_the_chosen_estimator_with_calibrated_probabilities(head, classes):
    values, labels = blobs(classes=classes)
    new, _ = blobs(seed=1, classes=classes)
    fitted = fit_classifier(values, labels, classes, head)
    found = probabilities(fitted, new)
    np.testing.assert_allclose(found.sum(1), 1, atol=1e-5)
    if head == "logistic":
        np.testing.assert_allclose(found, fitted.estimator.predict_proba(new), atol=1e-5)
    elif not hasattr(fitted.estimator, "decision_function"):
        mixed = (1 - fitted.calibration) * fitted.estimator.predict_proba(new) + fitted.calibration / classes
        np.testing.assert_allclose(found, mixed, atol=1e-5)
    else:
        decisions = np.asarray(fitted.estimator.decision_function(new)) / fitted.calibration
        decisions = decisions if decisions.ndim == 2 else np.stack([-decisions / 2, decisions / 2], 1)
        np.testing.assert_allclose(found, torch.tensor(decisions).softmax(1).numpy(), atol=1e-5)
    if head != "svm":  # of which scikit-learn counts votes of pairs before it looks at values
        assert (found.argmax(1) == fitted.estimator.predict(new)).mean() > 0.99
    scores = {key: fitted.settings[key] for key in fitted.settings}
    assert {**scores, "accuracy": fitted.accuracy, "loss": fitted.loss} in fitted.tried
    assert all(fitted.accuracy >= tried["accuracy"] for tried in fitted.tried)
    assert json.loads(json.dumps(fitted.record()))["settings"] == fitted.settings


@pytest.mark.parametrize("head", KINDS)
def test_cross_validation_tells_what_new_rows_will_bring(head):
    values, labels = blobs(600)
    rng = np.random.default_rng(1)
    noisy = np.where(rng.random(600) < 0.2, rng.integers(0, 3, 600), labels)
    fitted = fit_classifier(values[:300], noisy[:300], 3, head)
    found = probabilities(fitted, values[300:])
    accuracy = (found.argmax(1) == noisy[300:]).mean()
    loss = -np.log(np.maximum(found[np.arange(300), noisy[300:]], 1e-12)).mean()
    assert abs(accuracy - fitted.accuracy) < 0.08 and abs(loss - fitted.loss) < 0.2, (accuracy, loss, fitted.record())
    assert loss < np.log(3), "worse than saying nothing"


@pytest.mark.parametrize("head", ["logistic", "lda", "knn", "svm"])
def test_a_class_without_training_rows_is_never_predicted(head):
    values, labels = blobs()
    gap = np.where(labels == 2, 3, labels)  # 2 and 4 have none
    found = probabilities(fit_classifier(values, gap, 5, head), values)
    assert found.shape == (120, 5) and found[:, [2, 4]].max() < 1e-6
    np.testing.assert_allclose(
        found[:, [0, 1, 3]], probabilities(fit_classifier(values, labels, 3, head), values), atol=1e-5
    )


def test_equal_seeds_give_equal_heads_and_folds_follow_the_seed():
    values, labels = blobs(apart=0.3)
    first, second, other = (fit_classifier(values, labels, 3, "random_forest", seed=seed) for seed in (0, 0, 1))
    assert first.tried == second.tried and first.tried != other.tried
    np.testing.assert_array_equal(probabilities(first, values), probabilities(second, values))


def test_the_kernel_that_is_computed_once_is_the_kernel_of_libsvm():
    from sklearn.model_selection import StratifiedKFold, cross_val_predict
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler
    from sklearn.svm import SVC

    values, labels = blobs(apart=0.4)
    fitted = fit_classifier(values, labels, 3, "svm")
    folds = StratifiedKFold(5, shuffle=True, random_state=0)
    for tried in fitted.tried:
        model = make_pipeline(StandardScaler(), SVC(C=tried["C"], gamma=tried["gamma"]))
        decisions = cross_val_predict(model, values, labels, cv=folds, method="decision_function")
        assert (decisions.argmax(1) == labels).mean() == pytest.approx(tried["accuracy"], abs=0.01)


@pytest.mark.parametrize("decision", [True, False])
def test_a_calibration_gives_the_least_log_loss(decision):
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 3, 400)
    outputs = rng.standard_normal((400, 3)) + 1.5 * np.eye(3)[codes]
    outputs = outputs * 7 if decision else np.eye(3)[outputs.argmax(1)]  # votes that are all for one class
    best = calibrate(outputs, codes, decision)

    def loss(calibration):
        return -sklearn_head.logits(outputs, calibration, decision)[np.arange(400), codes].mean() + (
            np.log(np.exp(sklearn_head.logits(outputs, calibration, decision)).sum(1)).mean()
        )

    assert loss(best) < min(loss(best * 1.2), loss(best / 1.2))
    if decision:
        assert calibrate(10 * outputs, codes, True) == pytest.approx(10 * best, rel=1e-3)
    assert np.isfinite(calibrate(100 * np.eye(3)[codes], codes, True)), "every row right: there is still a best one"


# bad input


def test_features_that_allow_no_fit_are_refused_with_the_reason(capsys):
    values, labels = blobs()
    bad = values.copy()
    bad[[3, 7], 0] = np.nan, np.inf
    with pytest.raises(FeatureError, match=r"2 training row\(s\) are NaN or infinite: 3, 7"):
        fit_classifier(bad, labels, 3)
    with pytest.raises(FeatureError, match="the same"):
        fit_classifier(np.ones_like(values), labels, 3)
    with pytest.raises(FeatureError, match="one class"):
        fit_classifier(values, np.zeros(120, dtype=int), 3)
    with pytest.raises(FeatureError, match=r"class\(es\) 2 have a single training row.*adapt\.method frozen"):
        fit_classifier(values[:9], np.array([0, 0, 0, 0, 1, 1, 1, 1, 2]), 3)
    capsys.readouterr()
    for head in KINDS:  # few rows, a constant feature, more features than rows
        few = np.concatenate([values[:7], np.ones((7, 3), dtype=np.float32)], 1)
        fitted = fit_classifier(few, np.array([0, 0, 0, 1, 1, 1, 1]), 2, head)
        assert fitted.folds == 3 and np.isfinite(probabilities(fitted, few)).all(), head
        assert "3 folds instead of 5" in capsys.readouterr().out


def test_many_rows_are_thinned_for_the_choice_alone_and_keep_every_class(monkeypatch):
    monkeypatch.setitem(KINDS, "ridge", replace(KINDS["ridge"], rows=60))
    values, labels = blobs(300)
    labels[:6] = 3
    labels[6:][labels[6:] == 3] = 0
    fitted = fit_classifier(values, labels, 4, "ridge")
    assert fitted.rows == 60 and fitted.folds == 5
    direct = fit_classifier(values, labels, 4, "ridge").estimator
    np.testing.assert_array_equal(fitted.estimator[-1].coef_, direct[-1].coef_)
    assert fitted.estimator[0].n_samples_seen_ == 300


def test_what_stands_in_the_way_is_said_before_anything_is_computed(text_run, tmp_path, no_skops):
    no_skops()
    (tmp_path / "rows.csv").write_text(
        "text,label\n" + "".join(f"a cat {n},{'xy'[n % 2]}\n" for n in range(20)) + "a,z\n"
    )
    run = with_data(with_head(text_run(), "svm", folds=1), source=str(tmp_path / "rows.csv"), validation_fraction=0.0)
    with pytest.raises(ConfigError) as caught:
        hftl.setup_run(run, hftl.TextClassification)
    found = str(caught.value)
    assert "adapt.probe.num_folds: 1" in found
    with pytest.raises(ConfigError) as caught:
        hftl.setup_run(with_head(run, "svm"), hftl.TextClassification)
    found = str(caught.value)
    assert "skops, which is not installed: uv pip install 'hftl[probe]'" in found and "class(es) z" in found
    with pytest.raises(ConfigError) as caught:
        hftl.setup_run(with_head(run, "ridge"), hftl.TextClassification)
    assert "skops" not in str(caught.value)


def test_a_head_of_several_layers_is_refused_and_pooling_helps(text_run, tiny_bert, tmp_path):
    from transformers import AutoTokenizer, DistilBertConfig, DistilBertModel

    folder = tmp_path / "distilbert"
    AutoTokenizer.from_pretrained(tiny_bert).save_pretrained(folder)
    size = {"dim": 16, "hidden_dim": 32, "n_layers": 1, "n_heads": 2}
    DistilBertModel(DistilBertConfig(vocab_size=80, max_position_embeddings=64, **size)).save_pretrained(folder)
    run = with_head(text_run(), "logistic")
    run = replace(run, model=replace(run.model, name=str(folder)))
    with pytest.raises(ConfigError, match=r"pre_classifier.*--model\.pooling mean or cls"):
        hftl.setup_run(run, hftl.TextClassification)
    run, splits, task = hftl.setup_run(replace(run, model=replace(run.model, pooling="mean")), hftl.TextClassification)
    model = hftl.build_model(run, task.head)
    history = hftl.fit(hftl.create_accelerator(run), model, task, splits, run)
    assert history.selection["accuracy"] > 0.5


def test_settings_of_steps_do_not_apply_and_are_not_in_the_record(text_run, capsys):
    run, _, _ = hftl.setup_run(
        with_head(text_run(num_epochs=3, batch_size_per_device=64), "ridge"), hftl.TextClassification
    )
    assert run.train.num_epochs is run.train.lr is run.train.head_lr is run.train.freeze_backbone_ratio is None
    assert "train.num_epochs, train.lr, train.head_lr are ignored" in capsys.readouterr().out


# from data to a saved model

CELLS = [("text", head) for head in KINDS] + [("image", head) for head in ("logistic", "lda", *CLASSIC)]


def finished(kind, head, image_run, text_run, **more):
    """Runs the recipe; returns the configuration, the metrics and the task's name."""
    nets = {"lda": "test_vit", "svm": "test_convnext"}
    run = image_run(nets.get(head, "test_resnet")) if kind == "image" else text_run(**more)
    run = with_head(run, head)
    metrics = run_undrawn(f"{kind}_classification", run)
    return run, metrics


def test_rows(folder, split="test"):
    import pyarrow.parquet as pq

    return [row for row in pq.read_table(f"{folder}/predictions.parquet").to_pylist() if row["split"] == split]


test_rows.__test__ = False


@pytest.mark.parametrize(("kind", "head"), CELLS)
def test_a_saved_head_says_what_the_fitted_one_said(kind, head, image_run, text_run, images, texts):
    pooling = "mean" if head in ("ridge", "knn") else "auto"
    run, metrics = finished(kind, head, image_run, text_run, **({"pooling": pooling} if kind == "text" else {}))
    folder = run.output_dir
    model = hftl.load(folder)
    given = (
        sorted(str(file) for file in (images / "test").rglob("*.png"))
        if kind == "image"
        else [line.rpartition(",")[0] for line in (texts / "test.csv").read_text().splitlines()[1:]]
    )
    for found, row in zip(model.predict(given), test_rows(folder), strict=True):
        np.testing.assert_allclose(found["probabilities"], row["probabilities"], atol=1e-5)
    assert metrics["test/accuracy"] > 0.4 and np.isfinite(metrics["test/loss"])
    assert (model.model.sklearn_head is None) == (head in LINEAR)
    facts = json.loads(open(f"{folder}/report.json").read())
    assert facts["training"]["selection"]["head"] == head and max(facts["verified"].values()) < 1e-4
    assert ("model/head" in facts["verified"]) == (head in CLASSIC) and facts["adapt"]["backbone_trainable"] == 0
    card = open(f"{folder}/model/README.md").read()
    assert "5-fold cross-validation" in card and ("hftl.load" in card) == (head in CLASSIC)
    assert ("transformers.pipeline(" in card) == (head in LINEAR)
    if head not in ("logistic", "knn"):
        return
    page = write_report(Path(folder)).read_text()
    assert f"{head}: 5-fold cross-validation" in page and "settings tried" in page


def pipeline_says(folder, kind, rows, names) -> np.ndarray:
    """Returns the probabilities [N, K] of transformers.pipeline; its classes are of transformers or in the folder."""
    import transformers

    trust = {"trust_remote_code": True} if list(folder.glob("modeling_*.py")) else {}
    pipe = transformers.pipeline(f"{kind}-classification", str(folder), **trust)
    found = pipe(rows, top_k=None if kind == "text" else len(names))
    return np.array([[{each["label"]: each["score"] for each in row}[name] for name in names] for row in found])


def timm_says(folder, files) -> np.ndarray:
    """Returns the probabilities [N, K] of timm's own model and preprocessing."""
    import timm
    from PIL import Image
    from timm.data import create_transform, resolve_data_config

    weights = {"source": "", "file": f"{folder}/model.safetensors"}  # timm 1.0.19 unpickles local-dir: folders
    old = {"pretrained_cfg_overlay": weights} if timm.__version__ == "1.0.19" else {}
    net = timm.create_model(f"local-dir:{folder}", pretrained=True, **old).eval()
    transform = create_transform(**resolve_data_config(net.pretrained_cfg, model=net))
    with torch.no_grad():
        return net(torch.stack([transform(Image.open(file).convert("RGB")) for file in files])).softmax(1).numpy()


def scikit_learn_says(run, make_task) -> tuple[np.ndarray, list[str]]:
    """Returns the probabilities of scikit-learn's own logistic regression, and the class names."""
    from accelerate import Accelerator
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    from hftl.features.cache import compute_features

    chosen = json.loads(open(f"{run.output_dir}/report.json").read())["training"]["selection"]["settings"]
    splits = hftl.load_splits(run.data)
    task = make_task(splits)
    model, accelerator = hftl.build_model(run, task.head), Accelerator()
    train, test = (
        compute_features(accelerator, model, task, splits[name], run, split=name) for name in ("train", "test")
    )
    theirs = make_pipeline(StandardScaler(), LogisticRegression(**chosen, max_iter=10_000, tol=1e-9))
    theirs.fit(train.values.astype(np.float64), train.labels)
    return theirs.predict_proba(test.values.astype(np.float64)), list(task.head.labels)


@pytest.mark.parametrize("kind", ["text", "image"])
def test_a_logistic_artifact_opens_with_pipeline_and_gives_the_probabilities_of_scikit_learn(
    kind, image_run, text_run, images, texts
):
    run, _ = finished(kind, "logistic", image_run, text_run, pooling="mean")
    task = hftl.ImageClassification if kind == "image" else hftl.TextClassification
    expected, names = scikit_learn_says(run, task)
    rows = (
        sorted(str(file) for file in (images / "test").rglob("*.png"))
        if kind == "image"
        else [line.rpartition(",")[0] for line in (texts / "test.csv").read_text().splitlines()[1:]]
    )
    folder = Path(run.output_dir, "model")
    np.testing.assert_allclose(pipeline_says(folder, kind, rows, names), expected, atol=1e-5)
    if kind == "image":
        np.testing.assert_allclose(timm_says(folder, rows), expected, atol=1e-5)


@pytest.mark.slow
@pytest.mark.real
def test_the_same_of_real_weights_and_real_questions(shared, minilm, tmp_path):
    data = hftl.DataConfig(source=str(shared / "text" / "trec6"))
    run = hftl.RunConfig(
        data, hftl.ModelConfig(name=minilm), hftl.AdaptConfig("probe"), output_dir=str(tmp_path / "run")
    )
    metrics = load_recipe("text_classification").main(run)
    expected, names = scikit_learn_says(run, hftl.TextClassification)
    rows = hftl.load_splits(data)["test"]["text"][:100]
    found = pipeline_says(Path(run.output_dir, "model"), "text", list(rows), names)
    np.testing.assert_allclose(found, expected[:100], atol=1e-5)
    assert metrics["test/accuracy"] > 0.88


def test_a_classic_head_is_refused_by_what_cannot_compute_it(image_run, text_run):
    run, _ = finished("image", "knn", image_run, text_run)
    with pytest.raises(ConfigError, match=r"export: .*knn.*logistic"):
        export_folder(run.output_dir)
    from transformers import AutoModelForImageClassification

    with pytest.raises(ValueError, match="no classifier head"):
        AutoModelForImageClassification.from_pretrained(f"{run.output_dir}/model")


def test_a_run_that_is_complete_says_so_and_one_that_was_stopped_begins_again(text_run, monkeypatch):
    run = replace(with_head(text_run(), "ridge"), resume="auto")
    main = load_recipe("text_classification").main

    def stopped(*_, **__):
        raise KeyboardInterrupt("SIGTERM")

    with monkeypatch.context() as patch:
        patch.setattr("hftl.training.probe.fit_classifier", stopped)
        with pytest.raises(KeyboardInterrupt):
            main(run)
    metrics = main(run)
    with pytest.raises(RunComplete) as caught:
        main(run)
    assert caught.value.metrics == metrics


@pytest.mark.slow
@pytest.mark.parametrize("head", ["logistic", "svm"])
def test_two_processes_save_and_measure_what_one_does(head, forks, texts, tiny_bert, tmp_path):
    found = {}
    for processes in (1, 2):
        out = tmp_path / str(processes)
        more = {"adapt__probe__head": head, "train__batch_size_per_device": 8, "train__trackers": "[]"}
        options = flags(texts, tiny_bert, out, "probe", **more)
        environment = {"HFTL_CACHE": str(tmp_path / f"cache{processes}")}
        logs = tmp_path / f"logs{processes}"
        statuses, said = forks.run(options, logs, processes=processes, environment=environment)
        assert set(statuses) == {0}, said
        rows = test_rows(out)
        found[processes] = (
            np.array([row["probabilities"] for row in rows]),
            json.loads((out / "metrics.json").read_text()),
        )
    np.testing.assert_allclose(found[1][0], found[2][0], atol=1e-4)
    assert found[1][1] == pytest.approx(found[2][1], abs=1e-4)


# what is in the file


class Foreign:
    """Not a part of any head."""


@pytest.fixture(scope="module")
def head_file():
    values, labels = blobs(40)
    fitted = fit_classifier(values, labels, 3, "knn")
    return SklearnHead("knn", fitted.estimator, 3, fitted.calibration)


@pytest.mark.parametrize("what", ["class", "estimator", "function", "pickle", "cut"])
def test_a_file_with_anything_else_in_it_is_not_opened(what, head_file, tmp_path):
    import pickle
    from functools import partial

    import skops.io
    from sklearn.linear_model import LogisticRegression

    marker = tmp_path / "ran"
    head = {"kind": "knn", "estimator": head_file.estimator, "num_outputs": 3, "calibration": 0.1}
    foreign = {
        "class": Foreign(),
        "estimator": LogisticRegression(),
        "function": partial(os.mkdir, str(marker)),
    }
    if what in foreign:
        content = skops.io.dumps(head | {"estimator": foreign[what]})
    else:
        content = pickle.dumps(head_file.estimator) if what == "pickle" else head_file.to_bytes()[:-100]
    expected = {"class": "Foreign", "estimator": "LogisticRegression", "function": "partial|mkdir"}.get(
        what, "does not open"
    )
    with pytest.raises(ArtifactError, match=expected):
        SklearnHead.from_bytes(content)
    assert not marker.exists()


@pytest.mark.parametrize("head", CLASSIC)
def test_a_file_holds_arrays_and_json_and_gives_the_same_head(head):
    import io

    values, labels = blobs()
    fitted = fit_classifier(values, labels, 3, head)
    first = SklearnHead(head, fitted.estimator, 3, fitted.calibration)
    content = first.to_bytes()
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        for name in archive.namelist():
            assert name == "schema.json" or np.load(io.BytesIO(archive.read(name)), allow_pickle=False) is not None
    again = SklearnHead.from_bytes(content)
    assert torch.equal(first(torch.tensor(values)), again(torch.tensor(values))) and again.kind == head


def test_a_folder_without_its_head_or_without_skops_does_not_open(image_run, text_run, no_skops):
    run, _ = finished("text", "svm", image_run, text_run)
    os.rename(f"{run.output_dir}/model/head.skops", f"{run.output_dir}/head.skops")
    with pytest.raises(ArtifactError, match=r"has no head\.skops"):
        hftl.load(run.output_dir)
    os.rename(f"{run.output_dir}/head.skops", f"{run.output_dir}/model/head.skops")
    no_skops()
    with pytest.raises(ArtifactError, match="skops, which is not installed"):
        hftl.load(run.output_dir)


@pytest.mark.parametrize("hub", [pytest.param("lfs", marks=pytest.mark.slow), "xet"], indirect=True)
def test_a_pushed_classic_head_comes_back_by_its_id(hub, image_run, text_run):
    run, _ = finished("text", "random_forest", image_run, text_run)
    hftl.push(run.output_dir, "alice/forest")
    given = ["the cat", "a hammer my saw"]
    assert hftl.load("alice/forest").predict(given) == hftl.load(run.output_dir).predict(given)


def test_a_network_whose_logits_are_not_its_layer_s_is_refused_when_that_is_seen(text_run, monkeypatch):
    run, splits, task = hftl.setup_run(with_head(text_run(), "logistic"), hftl.TextClassification)
    model = hftl.build_model(run, task.head)
    forward = model.forward
    model.forward = lambda inputs: {"logits": 2 * forward(inputs)["logits"]}
    monkeypatch.setenv("HFTL_CACHE", run.output_dir + "_cache")
    with pytest.raises(AdaptError, match="one linear layer"):
        hftl.fit(hftl.create_accelerator(run), model, task, splits, run)
