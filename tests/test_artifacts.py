"""Saved artifacts: loaded by timm, transformers and peft in a process without hftl, against predictions.parquet."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import load_recipe, run_undrawn

IMAGE = """
import json, sys, glob, torch, pyarrow.parquet as pq
from PIL import Image
import timm, transformers
from timm.data import create_transform, resolve_data_config
def check(run, images, method, base):
    rows = [row for row in pq.read_table(run + "/predictions.parquet").to_pylist() if row["split"] == "test"]
    files = sorted(glob.glob(images + "/test/*/*.png"))
    assert len(files) == len(rows)
    folder = run + "/model"
    weights = {"source": "", "file": folder + "/model.safetensors"}  # timm 1.0.19 unpickles local-dir: folders
    old = {"pretrained_cfg_overlay": weights} if timm.__version__ == "1.0.19" else {}
    model = timm.create_model("local-dir:" + folder, pretrained=True, **old).eval()
    transform = create_transform(**resolve_data_config(model.pretrained_cfg, model=model))
    pixels = torch.stack([transform(Image.open(file).convert("RGB")) for file in files])
    with torch.no_grad():
        logits = model(pixels)
        other = transformers.AutoModelForImageClassification.from_pretrained(run + "/model").eval()(pixels).logits
    torch.testing.assert_close(logits, other)
    expected = torch.tensor([row["probabilities"] for row in rows])
    torch.testing.assert_close(logits.softmax(-1), expected, atol=1e-4, rtol=1e-3)
    pipe = transformers.pipeline("image-classification", run + "/model")
    for file, row in zip(files[:3], rows):
        first = pipe(file)[0]
        assert first["label"] == row["prediction"] and abs(first["score"] - row["confidence"]) < 1e-3, (first, row)
    if method == "lora":
        import peft
        if old:
            old["pretrained_cfg_overlay"]["file"] = base.removeprefix("local-dir:") + "/model.safetensors"
        net = timm.create_model(base, pretrained=True, num_classes=3, **old)
        net = peft.PeftModel.from_pretrained(net, run + "/adapter").eval()
        with torch.no_grad():
            torch.testing.assert_close(net(pixels), logits, atol=1e-4, rtol=1e-4)
    print("equal", len(files))
for run in json.loads(sys.argv[1]):
    check(*run)
"""

TEXT = """
import json, sys, csv, torch, pyarrow.parquet as pq
import transformers
def check(run, table, method, pooled, base):
    rows = [row for row in pq.read_table(run + "/predictions.parquet").to_pylist() if row["split"] == "test"]
    texts = [row["text"] for row in csv.DictReader(open(table))]
    assert len(texts) == len(rows)
    trust = {"trust_remote_code": True} if pooled == "yes" else {}
    pipe = transformers.pipeline("text-classification", run + "/model", **trust)
    for text, row in zip(texts, rows):
        first = pipe(text)[0]
        assert first["label"] == row["prediction"] and abs(first["score"] - row["confidence"]) < 1e-3, (first, row)
    tokenizer = transformers.AutoTokenizer.from_pretrained(run + "/model")
    inputs = tokenizer(texts, padding=True, return_tensors="pt")
    model = transformers.AutoModelForSequenceClassification.from_pretrained(run + "/model", **trust).eval()
    with torch.no_grad():
        logits = model(**inputs).logits
    expected = torch.tensor([row["probabilities"] for row in rows])
    torch.testing.assert_close(logits.softmax(-1), expected, atol=1e-4, rtol=1e-3)
    if method == "lora":
        import peft
        if pooled == "yes":
            from transformers.dynamic_module_utils import get_class_from_dynamic_module
            name = "modeling_pooled_text.PooledTextForSequenceClassification"
            kind = get_class_from_dynamic_module(name, run + "/adapter")
            config = transformers.AutoConfig.from_pretrained(run + "/adapter", trust_remote_code=True)
            net = kind.from_pretrained(base, config=config)
        else:
            net = transformers.AutoModelForSequenceClassification.from_pretrained(base, num_labels=3)
        net = peft.PeftModel.from_pretrained(net, run + "/adapter").eval()
        with torch.no_grad():
            torch.testing.assert_close(net(**inputs).logits, logits, atol=1e-4, rtol=1e-4)
    print("equal", len(texts))
for run in json.loads(sys.argv[1]):
    check(*run)
"""


def test_image_artifacts_load_without_hftl(image_run, images, tmp_path, run_without_hftl):
    cases = [
        ("test_resnet", "full"),
        ("test_resnet", "lora"),
        ("test_vit", "lora"),
        ("test_convnext", "lora"),
        ("test_vit", "frozen"),
    ]
    runs = []
    for net, method in cases:
        run = replace(image_run(net, method), output_dir=str(tmp_path / f"{net}-{method}"))
        run_undrawn("image_classification", run)
        runs.append([run.output_dir, str(images), method, run.model.name])
        verified = json.loads((Path(run.output_dir) / "report.json").read_text())["verified"]
        assert set(verified) == {"model/timm", "model/transformers"} | ({"adapter/peft"} if method == "lora" else set())
    printed = run_without_hftl(IMAGE, json.dumps(runs))
    assert printed.count("equal 10") == len(cases)


def test_text_artifacts_load_without_hftl(text_run, texts, tmp_path, run_without_hftl):
    cases = [("full", "default"), ("lora", "default"), ("lora", "mean"), ("frozen", "cls")]
    runs = []
    for method, pooling in cases:
        run = replace(text_run(method, pooling), output_dir=str(tmp_path / f"{method}-{pooling}"))
        run_undrawn("text_classification", run)
        pooled = "no" if pooling == "default" else "yes"
        runs.append([run.output_dir, str(texts / "test.csv"), method, pooled, run.model.name])
    printed = run_without_hftl(TEXT, json.dumps(runs))
    assert printed.count("equal 13") == len(cases)


def test_run_writes_all_files_and_logs_primary_metrics(text_run, tmp_path, capsys):
    run = text_run("lora", "mean")
    metrics = load_recipe("text_classification").main(run)
    folder = tmp_path / "run"
    for name in (
        "config.yaml",
        "history.jsonl",
        "environment.json",
        "metrics.json",
        "predictions.parquet",
        "report.html",
        "report.json",
        "model/README.md",
        "adapter/README.md",
        "model/hftl_config.yaml",
        "checkpoints/best/weights.safetensors",
    ):
        assert (folder / name).is_file(), name
    assert json.loads((folder / "metrics.json").read_text()) == metrics
    assert {"validation/accuracy", "test/accuracy", "test/macro_f1", "test/loss"} <= set(metrics)
    from hftl.config.parse import load_config

    assert load_config(folder / "config.yaml").train.lr == 1e-3
    records = [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]
    output = capsys.readouterr().out
    assert "validation/weighted_f1" in {name for record in records for name in record}
    assert "validation/accuracy" in output and "validation/macro_f1" in output and "weighted_f1" not in output
    assert not list(folder.rglob("*.bin")) and not list(folder.rglob("*.pt")) and not list(folder.rglob("*.pkl"))


def test_save_rejects_model_with_different_logits(image_run, tmp_path, monkeypatch):
    """The saved weights and metrics stay on disk."""
    from hftl.errors import ArtifactError
    from hftl.models.timm_model import TimmModel

    def save_changed_weights(self, folder, save=TimmModel.save):
        import torch

        with torch.no_grad():
            next(self.net.get_classifier().parameters()).add_(1.0)
        save(self, folder)

    monkeypatch.setattr(TimmModel, "save", save_changed_weights)
    with pytest.raises(ArtifactError, match="differs from the trained model"):
        load_recipe("image_classification").main(image_run())
    assert (tmp_path / "run" / "model" / "model.safetensors").is_file()
    assert (tmp_path / "run" / "metrics.json").is_file()
