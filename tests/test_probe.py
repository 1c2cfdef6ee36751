"""scikit-learn heads: fit, cross-validation, invalid features, saved files; compared with scikit-learn."""

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
from hftl.heads import sklearn_head
from hftl.heads.classifiers import CLASSIFIERS
from hftl.heads.sklearn_head import SklearnHead
from hftl.heads.sklearn_probe import Probe, calibrate, fit_classifier
from hftl.reporting import write_report

LINEAR = [name for name, spec in CLASSIFIERS.items() if spec.linear]
NONLINEAR = [name for name, spec in CLASSIFIERS.items() if not spec.linear]


@pytest.fixture(autouse=True)
def few_trees(monkeypatch):
    """Reduces the random forest to 20 trees, a tenth of the run time."""
    spec = CLASSIFIERS["random_forest"]
    make = spec.make
    small = replace(spec, make=lambda *a: make(*a).set_params(n_estimators=20), cv_settings={"n_estimators": 5})
    monkeypatch.setitem(CLASSIFIERS, "random_forest", small)


@pytest.fixture
def no_skops(monkeypatch):
    """Returns a function that hides skops from `importlib.util.find_spec`."""
    find = importlib.util.find_spec
    missing = lambda name, *rest: None if name == "skops" else find(name, *rest)  # noqa: E731
    return lambda: monkeypatch.setattr(importlib.util, "find_spec", missing)


def blobs(rows=120, features=10, classes=3, seed=0, separation=1.0):
    """Returns Gaussian clusters with nonzero mean and feature scales from 0.1 to 100, and their classes."""
    rng = np.random.default_rng(seed)
    labels = np.arange(rows) % classes
    means = separation * rng.standard_normal((classes, features))
    values = means[labels] + rng.standard_normal((rows, features))
    return (values * np.logspace(-1, 2, features) + 5).astype(np.float32), labels


def with_head(run, head, **probe):
    return replace(run, adapt=replace(run.adapt, method="probe", probe=ProbeConfig(classifier=head, **probe)))


def probabilities(fitted: Probe, values) -> np.ndarray:
    """Returns the probabilities of the saved head."""
    if CLASSIFIERS[fitted.head].linear:
        weight, bias = fitted.linear()
        return (torch.tensor(values) @ torch.tensor(weight).T + torch.tensor(bias)).softmax(1).numpy()
    head = SklearnHead(fitted.head, fitted.estimator, fitted.num_classes, fitted.calibration)
    return head(torch.tensor(values)).softmax(1).numpy()


# fitted heads


@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize("head", CLASSIFIERS)
def test_head_matches_calibrated_estimator(head, classes):
    values, labels = blobs(classes=classes)
    new, _ = blobs(seed=1, classes=classes)
    fitted = fit_classifier(values, labels, classes, head)
    predicted = probabilities(fitted, new)
    np.testing.assert_allclose(predicted.sum(1), 1, atol=1e-5)
    if head == "logistic":
        np.testing.assert_allclose(predicted, fitted.estimator.predict_proba(new), atol=1e-5)
    elif not hasattr(fitted.estimator, "decision_function"):
        mixed = (1 - fitted.calibration) * fitted.estimator.predict_proba(new) + fitted.calibration / classes
        np.testing.assert_allclose(predicted, mixed, atol=1e-5)
    else:
        decisions = np.asarray(fitted.estimator.decision_function(new)) / fitted.calibration
        decisions = decisions if decisions.ndim == 2 else np.stack([-decisions / 2, decisions / 2], 1)
        np.testing.assert_allclose(predicted, torch.tensor(decisions).softmax(1).numpy(), atol=1e-5)
    if head != "svm":  # scikit-learn's SVC predicts by one-vs-one votes first
        assert (predicted.argmax(1) == fitted.estimator.predict(new)).mean() > 0.99
    assert {**fitted.settings, "accuracy": fitted.accuracy, "loss": fitted.loss} in fitted.tried
    assert all(fitted.accuracy >= tried["accuracy"] for tried in fitted.tried)
    assert json.loads(json.dumps(fitted.record()))["settings"] == fitted.settings


@pytest.mark.parametrize("head", CLASSIFIERS)
def test_cross_validation_matches_held_out_scores(head):
    values, labels = blobs(600)
    rng = np.random.default_rng(1)
    noisy = np.where(rng.random(600) < 0.2, rng.integers(0, 3, 600), labels)
    fitted = fit_classifier(values[:300], noisy[:300], 3, head)
    predicted = probabilities(fitted, values[300:])
    accuracy = (predicted.argmax(1) == noisy[300:]).mean()
    loss = -np.log(np.maximum(predicted[np.arange(300), noisy[300:]], 1e-12)).mean()
    assert abs(accuracy - fitted.accuracy) < 0.08 and abs(loss - fitted.loss) < 0.2, (accuracy, loss, fitted.record())
    assert loss < np.log(3), "worse than uniform probabilities"


@pytest.mark.parametrize("head", ["logistic", "lda", "knn", "svm"])
def test_class_without_training_rows_returns_zero_probability(head):
    values, labels = blobs()
    sparse_labels = np.where(labels == 2, 3, labels)  # no rows of classes 2 and 4
    predicted = probabilities(fit_classifier(values, sparse_labels, 5, head), values)
    assert predicted.shape == (120, 5) and predicted[:, [2, 4]].max() < 1e-6
    expected = probabilities(fit_classifier(values, labels, 3, head), values)
    np.testing.assert_allclose(predicted[:, [0, 1, 3]], expected, atol=1e-5)


def test_fit_classifier_same_seed_returns_same_head():
    values, labels = blobs(separation=0.3)
    first, second, other = (fit_classifier(values, labels, 3, "random_forest", seed=seed) for seed in (0, 0, 1))
    assert first.tried == second.tried and first.tried != other.tried
    np.testing.assert_array_equal(probabilities(first, values), probabilities(second, values))


def test_svm_precomputed_kernel_matches_libsvm():
    from sklearn.model_selection import StratifiedKFold, cross_val_predict
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler
    from sklearn.svm import SVC

    values, labels = blobs(separation=0.4)
    fitted = fit_classifier(values, labels, 3, "svm")
    folds = StratifiedKFold(5, shuffle=True, random_state=0)
    for tried in fitted.tried:
        model = make_pipeline(StandardScaler(), SVC(C=tried["C"], gamma=tried["gamma"]))
        decisions = cross_val_predict(model, values, labels, cv=folds, method="decision_function")
        assert (decisions.argmax(1) == labels).mean() == pytest.approx(tried["accuracy"], abs=0.01)


@pytest.mark.parametrize("decision", [True, False])
def test_calibrate_returns_minimum_log_loss(decision):
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 3, 400)
    outputs = rng.standard_normal((400, 3)) + 1.5 * np.eye(3)[codes]
    outputs = outputs * 7 if decision else np.eye(3)[outputs.argmax(1)]  # unanimous votes
    best = calibrate(outputs, codes, decision)

    def loss(calibration):
        return -sklearn_head.logits(outputs, calibration, decision)[np.arange(400), codes].mean() + (
            np.log(np.exp(sklearn_head.logits(outputs, calibration, decision)).sum(1)).mean()
        )

    assert loss(best) < min(loss(best * 1.2), loss(best / 1.2))
    if decision:
        assert calibrate(10 * outputs, codes, True) == pytest.approx(10 * best, rel=1e-3)
    assert np.isfinite(calibrate(100 * np.eye(3)[codes], codes, True)), "all rows are classified correctly"


# invalid input


def test_fit_classifier_rejects_invalid_features(capsys):
    values, labels = blobs()
    nonfinite = values.copy()
    nonfinite[[3, 7], 0] = np.nan, np.inf
    with pytest.raises(FeatureError, match=r"2 training row\(s\) are NaN or infinite: 3, 7"):
        fit_classifier(nonfinite, labels, 3)
    with pytest.raises(FeatureError, match="features are equal in all training rows"):
        fit_classifier(np.ones_like(values), labels, 3)
    with pytest.raises(FeatureError, match=r"all 120 training rows have the class \[0\]"):
        fit_classifier(values, np.zeros(120, dtype=int), 3)
    with pytest.raises(FeatureError, match=r"class\(es\) 2 have a single training row.*adapt\.method frozen"):
        fit_classifier(values[:9], np.array([0, 0, 0, 0, 1, 1, 1, 1, 2]), 3)
    capsys.readouterr()
    for head in CLASSIFIERS:  # few rows, a constant feature, more features than rows
        few = np.concatenate([values[:7], np.ones((7, 3), dtype=np.float32)], 1)
        fitted = fit_classifier(few, np.array([0, 0, 0, 1, 1, 1, 1]), 2, head)
        assert fitted.folds == 3 and np.isfinite(probabilities(fitted, few)).all(), head
        assert "3 folds instead of 5" in capsys.readouterr().out


def test_max_cv_rows_limits_cross_validation_only(monkeypatch):
    monkeypatch.setitem(CLASSIFIERS, "ridge", replace(CLASSIFIERS["ridge"], max_cv_rows=60))
    values, labels = blobs(300)
    labels[:6] = 3
    labels[6:][labels[6:] == 3] = 0
    fitted = fit_classifier(values, labels, 4, "ridge")
    assert fitted.rows == 60 and fitted.folds == 5
    repeated = fit_classifier(values, labels, 4, "ridge").estimator
    np.testing.assert_array_equal(fitted.estimator[-1].coef_, repeated[-1].coef_)
    assert fitted.estimator[0].n_samples_seen_ == 300


def test_setup_rejects_unusable_probe(text_run, tmp_path, no_skops):
    no_skops()
    (tmp_path / "rows.csv").write_text(
        "text,label\n" + "".join(f"a cat {n},{'xy'[n % 2]}\n" for n in range(20)) + "a,z\n"
    )
    run = with_data(
        with_head(text_run(), "svm", num_folds=1), source=str(tmp_path / "rows.csv"), validation_fraction=0.0
    )
    with pytest.raises(ConfigError) as caught:
        hftl.setup_run(run, hftl.TextClassification)
    assert "adapt.probe.num_folds: 1" in str(caught.value)
    with pytest.raises(ConfigError) as caught:
        hftl.setup_run(with_head(run, "svm"), hftl.TextClassification)
    message = str(caught.value)
    assert "skops, which is not installed. Install it: uv pip install 'hftl[probe]'" in message
    assert "class(es) z" in message
    with pytest.raises(ConfigError) as caught:
        hftl.setup_run(with_head(run, "ridge"), hftl.TextClassification)
    assert "skops" not in str(caught.value)


def test_probe_rejects_multi_layer_head_unless_pooled(text_run, tiny_bert, tmp_path):
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


def test_probe_ignores_and_logs_step_settings(text_run, capsys):
    run, _, _ = hftl.setup_run(
        with_head(text_run(num_epochs=3, batch_size_per_device=64), "ridge"), hftl.TextClassification
    )
    assert run.train.num_epochs is run.train.lr is run.train.head_lr is run.train.freeze_backbone_ratio is None
    assert "train.num_epochs, train.lr, train.head_lr are ignored" in capsys.readouterr().out


# complete runs

CELLS = [("text", head) for head in CLASSIFIERS] + [("image", head) for head in ("logistic", "lda", *NONLINEAR)]


def run_recipe(modality, head, image_run, text_run, **options):
    """Runs the recipe, and returns the configuration and the metrics."""
    nets = {"lda": "test_vit", "svm": "test_convnext"}
    run = image_run(nets.get(head, "test_resnet")) if modality == "image" else text_run(**options)
    run = with_head(run, head)
    metrics = run_undrawn(f"{modality}_classification", run)
    return run, metrics


def read_predictions(folder, split="test"):
    import pyarrow.parquet as pq

    return [row for row in pq.read_table(f"{folder}/predictions.parquet").to_pylist() if row["split"] == split]


def read_test_inputs(modality, images, texts):
    """Returns the files or texts of the test split."""
    if modality == "image":
        return sorted(str(file) for file in (images / "test").rglob("*.png"))
    return [line.rpartition(",")[0] for line in (texts / "test.csv").read_text().splitlines()[1:]]


@pytest.mark.parametrize(("modality", "head"), CELLS)
def test_saved_head_matches_run_predictions(modality, head, image_run, text_run, images, texts):
    pooling = "mean" if head in ("ridge", "knn") else "auto"
    run, metrics = run_recipe(modality, head, image_run, text_run, pooling=pooling)
    folder = run.output_dir
    model = hftl.load(folder)
    predictions = model.predict(read_test_inputs(modality, images, texts))
    for prediction, row in zip(predictions, read_predictions(folder), strict=True):
        # the classifier amplifies the rounding of features, which differs between batch shapes and processors
        np.testing.assert_allclose(prediction["probabilities"], row["probabilities"], atol=2e-4)
    assert metrics["test/accuracy"] > 0.4 and np.isfinite(metrics["test/loss"])
    assert (model.model.sklearn_head is None) == (head in LINEAR)
    report = json.loads(open(f"{folder}/report.json").read())
    assert report["training"]["selection"]["head"] == head and max(report["verified"].values()) < 1e-4
    assert ("model/head" in report["verified"]) == (head in NONLINEAR) and report["adapt"]["backbone_trainable"] == 0
    card = open(f"{folder}/model/README.md").read()
    assert "5-fold cross-validation" in card and ("hftl.load" in card) == (head in NONLINEAR)
    assert ("transformers.pipeline(" in card) == (head in LINEAR)
    if head not in ("logistic", "knn"):
        return
    page = write_report(Path(folder)).read_text()
    assert f"{head}: 5-fold cross-validation" in page and "settings tried" in page


def pipeline_probabilities(folder, modality, rows, names) -> np.ndarray:
    """Returns the probabilities [N, K] of transformers.pipeline, with a modeling file if there is one in the folder."""
    import transformers

    options = {"trust_remote_code": True} if list(folder.glob("modeling_*.py")) else {}
    pipe = transformers.pipeline(f"{modality}-classification", str(folder), **options)
    outputs = pipe(rows, top_k=None if modality == "text" else len(names))
    scores = [{output["label"]: output["score"] for output in row} for row in outputs]
    return np.array([[row[name] for name in names] for row in scores])


def timm_probabilities(folder, files) -> np.ndarray:
    """Returns the probabilities [N, K] of timm with its recorded preprocessing."""
    import timm
    from PIL import Image
    from timm.data import create_transform, resolve_data_config

    weights = {"source": "", "file": f"{folder}/model.safetensors"}  # timm 1.0.19 unpickles local-dir: folders
    options = {"pretrained_cfg_overlay": weights} if timm.__version__ == "1.0.19" else {}
    net = timm.create_model(f"local-dir:{folder}", pretrained=True, **options).eval()
    transform = create_transform(**resolve_data_config(net.pretrained_cfg, model=net))
    with torch.no_grad():
        return net(torch.stack([transform(Image.open(file).convert("RGB")) for file in files])).softmax(1).numpy()


def sklearn_probabilities(run, task_class) -> tuple[np.ndarray, list[str]]:
    """Returns the probabilities [N, K] of scikit-learn's logistic regression on cached features, and class names."""
    from accelerate import Accelerator
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    from hftl.features.cache import compute_features

    settings = json.loads(open(f"{run.output_dir}/report.json").read())["training"]["selection"]["settings"]
    splits = hftl.load_splits(run.data)
    task = task_class(splits)
    model, accelerator = hftl.build_model(run, task.head), Accelerator()
    train, test = (
        compute_features(accelerator, model, task, splits[name], run, split=name) for name in ("train", "test")
    )
    reference = make_pipeline(StandardScaler(), LogisticRegression(**settings, max_iter=10_000, tol=1e-9))
    reference.fit(train.values.astype(np.float64), train.labels)
    return reference.predict_proba(test.values.astype(np.float64)), list(task.head.labels)


@pytest.mark.parametrize("modality", ["text", "image"])
def test_logistic_model_matches_sklearn_in_pipeline(modality, image_run, text_run, images, texts):
    run, _ = run_recipe(modality, "logistic", image_run, text_run, pooling="mean")
    task_class = hftl.ImageClassification if modality == "image" else hftl.TextClassification
    expected, names = sklearn_probabilities(run, task_class)
    rows = read_test_inputs(modality, images, texts)
    folder = Path(run.output_dir, "model")
    np.testing.assert_allclose(pipeline_probabilities(folder, modality, rows, names), expected, atol=1e-5)
    if modality == "image":
        np.testing.assert_allclose(timm_probabilities(folder, rows), expected, atol=1e-5)


@pytest.mark.slow
@pytest.mark.real
def test_logistic_model_matches_sklearn_on_real_data(shared, minilm, tmp_path):
    data = hftl.DataConfig(source=str(shared / "text" / "trec6"))
    run = hftl.RunConfig(
        data, hftl.ModelConfig(name=minilm), hftl.AdaptConfig("probe"), output_dir=str(tmp_path / "run")
    )
    metrics = load_recipe("text_classification").main(run)
    expected, names = sklearn_probabilities(run, hftl.TextClassification)
    rows = hftl.load_splits(data)["test"]["text"][:100]
    predicted = pipeline_probabilities(Path(run.output_dir, "model"), "text", list(rows), names)
    np.testing.assert_allclose(predicted, expected[:100], atol=1e-5)
    assert metrics["test/accuracy"] > 0.88


def test_export_and_transformers_reject_nonlinear_head(image_run, text_run):
    run, _ = run_recipe("image", "knn", image_run, text_run)
    with pytest.raises(ConfigError, match=r"export: .*knn.*logistic"):
        export_folder(run.output_dir)
    from transformers import AutoModelForImageClassification

    with pytest.raises(ValueError, match="no classifier head"):
        AutoModelForImageClassification.from_pretrained(f"{run.output_dir}/model")


def test_probe_resume_restarts_or_raises_run_complete(text_run, monkeypatch):
    run = replace(with_head(text_run(), "ridge"), resume="auto")
    main = load_recipe("text_classification").main

    def interrupt(*_, **__):
        raise KeyboardInterrupt("SIGTERM")

    with monkeypatch.context() as patch:
        patch.setattr("hftl.training.probe.fit_classifier", interrupt)
        with pytest.raises(KeyboardInterrupt):
            main(run)
    metrics = main(run)
    with pytest.raises(RunComplete) as caught:
        main(run)
    assert caught.value.metrics == metrics


@pytest.mark.slow
@pytest.mark.parametrize("head", ["logistic", "svm"])
def test_two_processes_match_single_process_run(head, forks, texts, tiny_bert, tmp_path):
    predicted, metrics = {}, {}
    for processes in (1, 2):
        folder = tmp_path / str(processes)
        settings = {"adapt__probe__classifier": head, "train__batch_size_per_device": 8, "train__trackers": "[]"}
        arguments = flags(texts, tiny_bert, folder, "probe", **settings)
        environment = {"HFTL_CACHE": str(tmp_path / f"cache{processes}")}
        logs = tmp_path / f"logs{processes}"
        statuses, output = forks.run(arguments, logs, processes=processes, environment=environment)
        assert set(statuses) == {0}, output
        predicted[processes] = np.array([row["probabilities"] for row in read_predictions(folder)])
        metrics[processes] = json.loads((folder / "metrics.json").read_text())
    np.testing.assert_allclose(predicted[1], predicted[2], atol=1e-4)
    assert metrics[1] == pytest.approx(metrics[2], abs=1e-4)


# saved files


class Untrusted:
    """Class that no saved head contains."""


@pytest.fixture(scope="module")
def knn_head():
    values, labels = blobs(40)
    fitted = fit_classifier(values, labels, 3, "knn")
    return SklearnHead("knn", fitted.estimator, 3, fitted.calibration)


@pytest.mark.parametrize("content_type", ["class", "estimator", "function", "pickle", "truncated"])
def test_from_bytes_rejects_untrusted_or_damaged_content(content_type, knn_head, tmp_path):
    import pickle
    from functools import partial

    import skops.io
    from sklearn.linear_model import LogisticRegression

    marker = tmp_path / "ran"
    head = {"kind": "knn", "estimator": knn_head.estimator, "num_outputs": 3, "calibration": 0.1}
    untrusted = {
        "class": Untrusted(),
        "estimator": LogisticRegression(),
        "function": partial(os.mkdir, str(marker)),
    }
    if content_type in untrusted:
        content = skops.io.dumps(head | {"estimator": untrusted[content_type]})
    else:
        content = pickle.dumps(knn_head.estimator) if content_type == "pickle" else knn_head.to_bytes()[:-100]
    messages = {"class": "Untrusted", "estimator": "LogisticRegression", "function": "partial|mkdir"}
    with pytest.raises(ArtifactError, match=messages.get(content_type, "cannot be loaded")):
        SklearnHead.from_bytes(content)
    assert not marker.exists()


@pytest.mark.parametrize("head", NONLINEAR)
def test_head_file_round_trip_matches_without_pickle(head):
    import io

    values, labels = blobs()
    fitted = fit_classifier(values, labels, 3, head)
    original = SklearnHead(head, fitted.estimator, 3, fitted.calibration)
    content = original.to_bytes()
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        for name in archive.namelist():
            assert name == "schema.json" or np.load(io.BytesIO(archive.read(name)), allow_pickle=False) is not None
    reloaded = SklearnHead.from_bytes(content)
    assert torch.equal(original(torch.tensor(values)), reloaded(torch.tensor(values))) and reloaded.kind == head


def test_load_without_head_file_or_skops_raises(image_run, text_run, no_skops):
    run, _ = run_recipe("text", "svm", image_run, text_run)
    os.rename(f"{run.output_dir}/model/head.skops", f"{run.output_dir}/head.skops")
    with pytest.raises(ArtifactError, match=r"has no head\.skops"):
        hftl.load(run.output_dir)
    os.rename(f"{run.output_dir}/head.skops", f"{run.output_dir}/model/head.skops")
    no_skops()
    with pytest.raises(ArtifactError, match="skops, which is not installed"):
        hftl.load(run.output_dir)


@pytest.mark.parametrize("hub", [pytest.param("lfs", marks=pytest.mark.slow), "xet"], indirect=True)
def test_pushed_sklearn_head_matches_local_predictions(hub, image_run, text_run):
    run, _ = run_recipe("text", "random_forest", image_run, text_run)
    hftl.push(run.output_dir, "alice/forest")
    inputs = ["the cat", "a hammer my saw"]
    assert hftl.load("alice/forest").predict(inputs) == hftl.load(run.output_dir).predict(inputs)


def test_fit_rejects_logits_other_than_linear_head_output(text_run, monkeypatch):
    run, splits, task = hftl.setup_run(with_head(text_run(), "logistic"), hftl.TextClassification)
    model = hftl.build_model(run, task.head)
    forward = model.forward
    model.forward = lambda inputs: {"logits": 2 * forward(inputs)["logits"]}
    monkeypatch.setenv("HFTL_CACHE", run.output_dir + "_cache")
    with pytest.raises(AdaptError, match="one linear layer"):
        hftl.fit(hftl.create_accelerator(run), model, task, splits, run)
