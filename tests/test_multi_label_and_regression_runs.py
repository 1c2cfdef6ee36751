"""Runs with multi-label and regression targets: saved models, metrics, cards, reports and comparisons.

References: timm and transformers without hftl for saved models, scikit-learn for metrics.
"""

import json
from dataclasses import replace

import numpy as np
import pyarrow.parquet as pq
import pytest
from conftest import WORDS, run_undrawn
from launch import flags, launch
from PIL import Image
from sklearn.metrics import average_precision_score, r2_score

import hftl
from hftl.cli.main import main
from hftl.config.schema import AdaptConfig, AugmentConfig, DataConfig, ModelConfig, TrainConfig
from hftl.inference.batch_inference import evaluate_saved
from hftl.reporting import write_report
from hftl.reporting.run_record import RunRecord
from hftl.run.testing import check_task
from hftl.selection.results import judge

CLASSES = list(WORDS)
LABELS = {
    "number": {"label_column": "length"},
    "numbers": {"label_columns": ["length", "weight"]},
    "indicators": {"label_columns": CLASSES},
    "lists": {"label_column": "kinds"},
}


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Folder of 32x32 images with red, green and blue squares: `kinds` lists their names, `length` is their area."""
    folder, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for split, count in {"train": 40, "validation": 10, "test": 11}.items():
        (folder / split).mkdir()
        lines = []
        for number in range(count):
            pixels, labels = rng.integers(0, 60, (32, 32, 3), dtype=np.uint8), []
            for bit, name in enumerate(CLASSES):
                if number >> bit & 1:
                    labels.append(name)
                    pixels[10 * bit : 10 * bit + 8, 4:28, bit] += 180
            Image.fromarray(pixels).save(folder / split / f"{number:02d}.png")
            lines.append(json.dumps({"file_name": f"{number:02d}.png", "kinds": labels, "length": 0.5 + len(labels)}))
        (folder / split / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture(scope="module")
def runs(tables, images, tiny_bert, tiny_timm, tmp_path_factory):
    """Completed runs by name, without reports."""
    folder, runs = tmp_path_factory.mktemp("runs"), {}
    no_augmentation = AugmentConfig(crop_scale=1.0, hflip=0.0, color_jitter=0.0)
    for name, labels, method, model in (
        ("numbers", "numbers", "lora", ModelConfig(tiny_bert, pooling="default")),
        ("indicators", "indicators", "frozen", ModelConfig(tiny_bert, pooling="mean")),
        ("image_lists", "lists", "full", ModelConfig(tiny_timm["test_resnet"])),
        ("image_number", "number", "lora", ModelConfig(tiny_timm["test_vit"])),
    ):
        is_image = name.startswith("image")
        run = hftl.RunConfig(
            data=DataConfig(source=str(images if is_image else tables), augment=no_augmentation, **LABELS[labels]),
            model=model,
            adapt=AdaptConfig(method=method),
            train=TrainConfig(num_epochs=1, lr=1e-3, head_lr=1e-2, batch_size_per_device=8, trackers=[]),
            output_dir=str(folder / name),
        )
        run_undrawn("image_classification" if is_image else "text_classification", run)
        runs[name] = folder / name
    return runs


COMPARE_LOGITS = """
import json, sys, glob, torch, timm, transformers, pyarrow.parquet as pq
from PIL import Image
from timm.data import create_transform, resolve_data_config
def assert_close(actual, expected):
    torch.testing.assert_close(actual, expected.reshape(actual.shape).to(actual), rtol=1e-3, atol=1e-3)
def text_logits(run, folder):
    texts = [json.loads(line)["text"] for line in open(folder + "/test.jsonl")]
    tokens = transformers.AutoTokenizer.from_pretrained(run)(texts, padding=True, return_tensors="pt")
    model = transformers.AutoModelForSequenceClassification.from_pretrained(run, trust_remote_code=True).eval()
    return [model(**tokens).logits], texts
def image_logits(run, folder):
    files = sorted(glob.glob(folder + "/test/*.png"))
    weights = {"source": "", "file": run + "/model.safetensors"}  # timm 1.0.19 unpickles local-dir: folders
    model = timm.create_model("local-dir:" + run, pretrained=True, pretrained_cfg_overlay=weights).eval()
    transform = create_transform(**resolve_data_config(model.pretrained_cfg, model=model))
    pixels = torch.stack([transform(Image.open(file).convert("RGB")) for file in files])
    wrapper = transformers.AutoModelForImageClassification.from_pretrained(run).eval()
    return [model(pixels), wrapper(pixels).logits], files
torch.set_grad_enabled(False)
for run, folder in json.loads(sys.argv[1]):
    rows = [row for row in pq.read_table(run + "/predictions.parquet").to_pylist() if row["split"] == "test"]
    is_regression, is_image = "probabilities" not in rows[0], "image" in run.rpartition("/")[2]
    expected = torch.tensor([row["prediction" if is_regression else "probabilities"] for row in rows])
    all_logits, inputs = (image_logits if is_image else text_logits)(run + "/model", folder)
    for logits in all_logits:
        assert_close(logits if is_regression else logits.sigmoid(), expected)
    task = "image-classification" if is_image else "text-classification"
    pipe = transformers.pipeline(task, run + "/model", top_k=9, trust_remote_code=True)
    scores = {label["label"]: label["score"] for label in pipe(inputs[:1])[0]}
    assert_close(torch.tensor([scores[name] for name in pipe.model.config.id2label.values()]), expected[0])
    print("equal", len(inputs))
"""


def test_saved_models_match_predictions_without_hftl(runs, tables, images, run_without_hftl):
    """Probabilities of multi-label models, and predictions of regression models in target units."""
    arguments = [[str(run), str(images if name.startswith("image") else tables)] for name, run in runs.items()]
    printed = run_without_hftl(COMPARE_LOGITS, json.dumps(arguments))
    assert printed.count("equal 21") == 2 and printed.count("equal 11") == 2


def test_load_preserves_thresholds_and_target_units(runs, tables):
    texts = [json.loads(line)["text"] for line in open(tables / "validation.jsonl")]
    for name, run in runs.items():
        rows = [row for row in pq.read_table(run / "predictions.parquet").to_pylist() if row["split"] == "validation"]
        if name.startswith("image"):
            continue
        for saved in ("model", "adapter"):
            if not (run / saved).is_dir():
                continue
            for row, loaded in zip(rows, hftl.load(run / saved).predict(texts), strict=True):
                key = "probabilities" if name == "indicators" else "prediction"
                assert loaded[key] == pytest.approx(row[key], rel=1e-3, abs=1e-4), (name, saved)
    assert hftl.load(runs["indicators"]).task.target.thresholds != [0.5] * 3, "thresholds were not tuned"


def test_metrics_match_sklearn_and_lie_in_intervals(runs):
    for name, run in runs.items():
        record, rows = RunRecord(run), pq.read_table(run / "predictions.parquet").to_pylist()
        rows = [row for row in rows if row["split"] == "test"]
        if "prediction" in rows[0] and "probabilities" not in rows[0]:
            labels, predictions = (np.array([row[key] for row in rows]) for key in ("label", "prediction"))
            assert record.metrics["test/r2"] == pytest.approx(r2_score(labels, predictions), abs=1e-6)
        else:
            labels = np.array([[name in row["label"] for name in CLASSES] for row in rows])
            probabilities = np.array([row["probabilities"] for row in rows])
            expected = average_precision_score(labels, probabilities)
            assert record.metrics["test/map"] == pytest.approx(expected, abs=1e-6)
        intervals = record.intervals("test")
        assert set(record.primary_metrics) - {"subset_accuracy"} <= set(intervals), (name, intervals)
        for metric, (low, high) in intervals.items():
            assert low <= high and low - 0.2 * abs(low) <= record.metrics[f"test/{metric}"] <= high + 0.2 * abs(high)


def test_cards_reports_and_commands_contain_metrics(runs, tables, capsys, tmp_path):
    for name, words in {
        "numbers": ("text-classification", "rmse", "top_k=2"),
        "indicators": ("text-classification", "average precision", "threshold", "top_k=3"),
        "image_lists": ("image-classification", "average precision", "top_k=3"),
    }.items():
        card = (runs[name] / "model" / "README.md").read_text()
        missing = [word for word in words if word not in card]
        assert not missing, (name, missing, card)
        page = write_report(runs[name]).read_text()
        assert ("Targets and predictions" if name == "numbers" else "average precision") in page
        assert "Largest errors" in page and "The data cannot be" not in page
        main(["evaluate", str(runs[name])])
        out = capsys.readouterr().out
        assert ("test/rmse" if name == "numbers" else "test/map") in out, out
    main(["predict", str(runs["indicators"]), str(tables / "test.jsonl")])
    header, *lines = capsys.readouterr().out.splitlines()
    assert "prediction" in header and len(lines) == 21
    with pytest.raises(hftl.HftlError, match="3 is neither 0 nor 1"):
        invalid = tmp_path / "invalid.jsonl"
        invalid.write_text('{"text": "my cat", "animal": 3, "food": 0, "tool": 1}\n')
        evaluate_saved(str(runs["indicators"]), str(invalid), "train")


def test_compare_of_identical_runs_by_r2_is_inconclusive(runs):
    comparison = judge({"lora": {0: runs["numbers"]}, "frozen": {0: runs["numbers"]}}, "test", "one epoch", {})
    assert comparison.metric == "r2" and comparison.conclusion == "not distinguishable"
    assert comparison.results[0].score == pytest.approx(RunRecord(runs["numbers"]).metrics["test/r2"])


def test_rank_and_check_accept_multi_label_and_regression(tables, tiny_bert, tmp_path):
    data = DataConfig(source=str(tables), **LABELS["numbers"])
    ranking = hftl.rank(data, [tiny_bert], output=None, model=ModelConfig(pooling="mean"))
    assert ranking.kind == "values" and np.isfinite(ranking.scores["head"]["linear probe"][tiny_bert].value)
    for labels in ("lists", "numbers"):
        checked = hftl.check(replace(data, **{"label_columns": None} | LABELS[labels]), output=tmp_path / labels)
        assert not checked["unlabelled"].checked and checked["leaks"].checked


def test_check_task_accepts_image_regression(images, tiny_timm, tmp_path):
    run = hftl.RunConfig(
        data=DataConfig(source=str(images), **LABELS["number"]),
        model=ModelConfig(tiny_timm["test_resnet"]),
        train=TrainConfig(batch_size_per_device=8, trackers=[]),
        output_dir=str(tmp_path / "run"),
    )
    run, splits, task = hftl.setup_run(run, hftl.ImageClassification)
    check_task(task, splits, run)


def test_two_processes_match_metrics_of_all_predictions(tables, tiny_bert, forks, tmp_path):
    """21 rows in batches of 4 are uneven on two processes; thresholds are tuned on the rows of both."""
    settings = {"train.max_steps": 1, "train.batch_size_per_device": 4, "train.trackers": "[]", "model.pooling": "mean"}
    jobs = []
    for column in ("kinds", "length"):
        options = flags(tables, tiny_bert, tmp_path / column, **settings, **{"data.label_column": column})
        jobs.append(("recipe", {"recipe": "text_classification", "flags": options}, tmp_path / "out"))
    launch(2, jobs, forks=forks, logs=tmp_path / "logs")
    for column in ("kinds", "length"):
        record = RunRecord(tmp_path / column)
        assert record.environment["processes"] == 2 and len(record.answers["test"].rows) == 21
        for metric, value in record.answers["test"].computed().items():
            assert record.metrics[f"test/{metric}"] == pytest.approx(value, abs=1e-9), metric
        loaded = hftl.load(tmp_path / column)
        assert len(set(getattr(loaded.task.target, "thresholds", [0.0, 1.0]))) > 1
