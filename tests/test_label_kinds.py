"""Several labels and numbers, from a run to what is made of it: artifacts without hftl, cards, pages, comparisons."""

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

KINDS = list(WORDS)
NUMBERS = {"label_columns": ["length", "weight"]}
DATA = {
    "numbers": {"label_column": "length"},
    "several": NUMBERS,
    "flags": {"label_columns": KINDS},
    "lists": {"label_column": "kinds"},
}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Folder of 32x32 images with red, green and blue squares: `kinds` lists which, `length` is their area."""
    folder, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for split, count in {"train": 40, "validation": 10, "test": 11}.items():
        (folder / split).mkdir()
        lines = []
        for number in range(count):
            pixels, here = rng.integers(0, 60, (32, 32, 3), dtype=np.uint8), []
            for bit, kind in enumerate(KINDS):
                if number >> bit & 1:
                    here.append(kind)
                    pixels[10 * bit : 10 * bit + 8, 4:28, bit] += 180
            Image.fromarray(pixels).save(folder / split / f"{number:02d}.png")
            lines.append(json.dumps({"file_name": f"{number:02d}.png", "kinds": here, "length": 0.5 + len(here)}))
        (folder / split / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture(scope="module")
def runs(tables, pictures, tiny_bert, tiny_timm, tmp_path_factory):
    """Finished runs by name, without pages."""
    folder, made = tmp_path_factory.mktemp("runs"), {}
    still = AugmentConfig(crop_scale=1.0, hflip=0.0, color_jitter=0.0)
    for name, kind, method, model in (
        ("several", "several", "lora", ModelConfig(tiny_bert, pooling="default")),
        ("flags", "flags", "frozen", ModelConfig(tiny_bert, pooling="mean")),
        ("image_lists", "lists", "full", ModelConfig(tiny_timm["test_resnet"])),
        ("image_numbers", "numbers", "lora", ModelConfig(tiny_timm["test_vit"])),
    ):
        image = name.startswith("image")
        run = hftl.RunConfig(
            data=DataConfig(source=str(pictures if image else tables), augment=still, **DATA[kind]),
            model=model,
            adapt=AdaptConfig(method=method),
            train=TrainConfig(num_epochs=1, lr=1e-3, head_lr=1e-2, batch_size_per_device=8, trackers=[]),
            output_dir=str(folder / name),
        )
        run_undrawn("image_classification" if image else "text_classification", run)
        made[name] = folder / name
    return made


READ = """
import json, sys, glob, torch, timm, transformers, pyarrow.parquet as pq
from PIL import Image
from timm.data import create_transform, resolve_data_config
def close(one, other):
    torch.testing.assert_close(one, other.reshape(one.shape).to(one), rtol=1e-3, atol=1e-3)
def of_texts(run, folder):
    texts = [json.loads(line)["text"] for line in open(folder + "/test.jsonl")]
    tokens = transformers.AutoTokenizer.from_pretrained(run)(texts, padding=True, return_tensors="pt")
    model = transformers.AutoModelForSequenceClassification.from_pretrained(run, trust_remote_code=True).eval()
    return [model(**tokens).logits], texts
def of_images(run, folder):
    files = sorted(glob.glob(folder + "/test/*.png"))
    weights = {"source": "", "file": run + "/model.safetensors"}  # timm 1.0.19 unpickles local-dir: folders
    model = timm.create_model("local-dir:" + run, pretrained=True, pretrained_cfg_overlay=weights).eval()
    transform = create_transform(**resolve_data_config(model.pretrained_cfg, model=model))
    pixels = torch.stack([transform(Image.open(file).convert("RGB")) for file in files])
    other = transformers.AutoModelForImageClassification.from_pretrained(run).eval()
    return [model(pixels), other(pixels).logits], files
torch.set_grad_enabled(False)
for run, folder in json.loads(sys.argv[1]):
    rows = [row for row in pq.read_table(run + "/predictions.parquet").to_pylist() if row["split"] == "test"]
    numbers, image = "probabilities" not in rows[0], "image" in run.rpartition("/")[2]
    said = torch.tensor([row["prediction" if numbers else "probabilities"] for row in rows])
    found, inputs = (of_images if image else of_texts)(run + "/model", folder)
    for logits in found:
        close(logits if numbers else logits.sigmoid(), said)
    task = "image-classification" if image else "text-classification"
    pipe = transformers.pipeline(task, run + "/model", top_k=9, trust_remote_code=True)
    first = {each["label"]: each["score"] for each in pipe(inputs[:1])[0]}
    close(torch.tensor([first[name] for name in pipe.model.config.id2label.values()]), said[0])
    print("equal", len(inputs))
"""


def test_artifacts_answer_without_hftl_in_probabilities_and_in_units(runs, tables, pictures, run_without_hftl):
    given = [[str(run), str(pictures if name.startswith("image") else tables)] for name, run in runs.items()]
    said = run_without_hftl(READ, json.dumps(given))
    assert said.count("equal 21") == 2 and said.count("equal 11") == 2


def test_hftl_opens_them_with_thresholds_and_adapters_in_units(runs, tables):
    texts = [json.loads(line)["text"] for line in open(tables / "validation.jsonl")]
    for name, run in runs.items():
        rows = [row for row in pq.read_table(run / "predictions.parquet").to_pylist() if row["split"] == "validation"]
        if name.startswith("image"):
            continue
        for part in ("model", "adapter"):
            if not (run / part).is_dir():
                continue
            for row, other in zip(rows, hftl.load(run / part).predict(texts), strict=True):
                key = "probabilities" if name == "flags" else "prediction"
                assert other[key] == pytest.approx(row[key], rel=1e-3, abs=1e-4), (name, part)
    assert hftl.load(runs["flags"]).task.target.thresholds != [0.5] * 3, "validation chose"


def test_metrics_are_those_of_the_predictions_with_intervals(runs):
    for name, run in runs.items():
        record, rows = RunRecord(run), pq.read_table(run / "predictions.parquet").to_pylist()
        here = [row for row in rows if row["split"] == "test"]
        if "prediction" in here[0] and "probabilities" not in here[0]:
            true, said = (np.array([row[key] for row in here]) for key in ("label", "prediction"))
            assert record.metrics["test/r2"] == pytest.approx(r2_score(true, said), abs=1e-6)
        else:
            true = np.array([[kind in row["label"] for kind in KINDS] for row in here])
            shares = np.array([row["probabilities"] for row in here])
            assert record.metrics["test/map"] == pytest.approx(average_precision_score(true, shares), abs=1e-6)
        intervals = record.intervals("test")
        assert set(record.primary_metrics) - {"subset_accuracy"} <= set(intervals), (name, intervals)
        for metric, (low, high) in intervals.items():
            assert low <= high and low - 0.2 * abs(low) <= record.metrics[f"test/{metric}"] <= high + 0.2 * abs(high)


def test_cards_pages_and_commands_say_what_was_measured(runs, tables, capsys, tmp_path):
    for name, words in {
        "several": ("text-classification", "rmse", "top_k=2"),
        "flags": ("text-classification", "average precision", "threshold", "top_k=3"),
        "image_lists": ("image-classification", "average precision", "top_k=3"),
    }.items():
        card = (runs[name] / "model" / "README.md").read_text()
        missing = [word for word in words if word not in card]
        assert not missing, (name, missing, card)
        page = write_report(runs[name]).read_text()
        assert ("Targets and predictions" if name == "several" else "average precision") in page
        assert "Largest errors" in page and "The data cannot be" not in page
        main(["evaluate", str(runs[name])])
        out = capsys.readouterr().out
        assert ("test/rmse" if name == "several" else "test/map") in out, out
    main(["predict", str(runs["flags"]), str(tables / "test.jsonl")])
    header, *lines = capsys.readouterr().out.splitlines()
    assert "prediction" in header and len(lines) == 21
    with pytest.raises(hftl.HftlError, match="3 is neither 0 nor 1"):
        other = tmp_path / "other.jsonl"
        other.write_text('{"text": "my cat", "animal": 3, "food": 0, "tool": 1}\n')
        evaluate_saved(str(runs["flags"]), str(other), "train")


def test_ways_of_training_are_compared_by_explained_variance(runs):
    found = judge({"lora": {0: runs["several"]}, "frozen": {0: runs["several"]}}, "test", "one epoch", {})
    assert found.metric == "r2" and found.conclusion == "not distinguishable", "it is the same run"
    assert found.results[0].score == pytest.approx(RunRecord(runs["several"]).metrics["test/r2"])


def test_backbones_are_ranked_and_data_checked_for_any_labels(tables, tiny_bert, tmp_path):
    data = DataConfig(source=str(tables), **DATA["several"])
    found = hftl.rank(data, [tiny_bert], output=None, model=ModelConfig(pooling="mean"))
    assert found.kind == "values" and np.isfinite(found.scores["head"]["linear probe"][tiny_bert].value)
    for kind in ("lists", "several"):
        checked = hftl.check(replace(data, **{"label_columns": None} | DATA[kind]), output=tmp_path / kind)
        assert not checked["unlabelled"].looked and checked["leaks"].looked


def test_images_pass_the_contract(pictures, tiny_timm, tmp_path):
    run = hftl.RunConfig(
        data=DataConfig(source=str(pictures), **DATA["numbers"]),
        model=ModelConfig(tiny_timm["test_resnet"]),
        train=TrainConfig(batch_size_per_device=8, trackers=[]),
        output_dir=str(tmp_path / "run"),
    )
    run, splits, task = hftl.setup_run(run, hftl.ImageClassification)
    check_task(task, splits, run)


def test_two_processes_measure_what_one_does(tables, tiny_bert, forks, tmp_path):
    """21 rows in batches of 4 are uneven on two processes; thresholds come from both processes' rows."""
    common = {"train.max_steps": 1, "train.batch_size_per_device": 4, "train.trackers": "[]", "model.pooling": "mean"}
    jobs = []
    for name, column in (("kinds", "kinds"), ("length", "length")):
        spec = {"recipe": "text_classification", "data.label_column": column}
        more = common | {"data.label_column": column}
        jobs.append(
            (
                "recipe",
                {"recipe": spec["recipe"], "flags": flags(tables, tiny_bert, tmp_path / name, **more)},
                tmp_path / "out",
            )
        )
    launch(2, jobs, forks=forks, logs=tmp_path / "logs")
    for name in ("kinds", "length"):
        record = RunRecord(tmp_path / name)
        assert record.environment["processes"] == 2 and len(record.answers["test"].rows) == 21
        for metric, value in record.answers["test"].computed().items():
            assert record.metrics[f"test/{metric}"] == pytest.approx(value, abs=1e-9), metric
        again = hftl.load(tmp_path / name)
        assert len(set(getattr(again.task.target, "thresholds", [0.0, 1.0]))) > 1
