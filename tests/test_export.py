"""Export to ONNX and torch.export: logits against the trained model, and the README code in a process without hftl."""

import csv
import json
import re
import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from conftest import run_python, run_undrawn

from hftl import AdaptConfig, DataConfig, ModelConfig, RunConfig, TrainConfig
from hftl.artifacts.export import export_folder
from hftl.artifacts.export_checks import format_table
from hftl.artifacts.save_model import load_model_and_task
from hftl.cli.main import main
from hftl.errors import ArtifactError, ConfigError, DataError

pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")

CASES = {
    "resnet": ("test_resnet", "full", "auto"),
    "vit": ("test_vit", "lora", "auto"),
    "pooled": ("one text", "lora", "mean"),
    "pairs": ("pairs", "full", "default"),
}
EXPORTS = [("resnet", "onnx"), ("vit", "torch"), ("pooled", "onnx"), ("pairs", "onnx")]


@pytest.fixture(scope="module")
def pairs(texts, tmp_path_factory) -> Path:
    """Tables with columns text, text_pair and label: each text is split after two words."""
    folder = tmp_path_factory.mktemp("pairs")
    for file in texts.glob("*.csv"):
        rows = list(csv.DictReader(file.open(newline="")))
        examples = [(row["text"].split(), row["label"]) for row in rows]
        lines = [f"{' '.join(words[:2])},{' '.join(words[2:])},{label}" for words, label in examples]
        (folder / file.name).write_text("\n".join(["text,text_pair,label", *lines]) + "\n")
    return folder


@pytest.fixture(scope="module")
def runs(images, texts, pairs, tiny_timm, tiny_bert, tmp_path_factory) -> dict[str, Path]:
    """Run folders by case, trained until logits differ between rows."""
    train = TrainConfig(num_epochs=1, lr=1e-2, head_lr=3e-2, batch_size_per_device=12, trackers=[])
    folders = {}
    for case, (net, method, pooling) in CASES.items():
        folders[case] = tmp_path_factory.mktemp("runs") / case
        source = {"one text": texts, "pairs": pairs}.get(net, images)
        model = ModelConfig(tiny_timm.get(net, tiny_bert), pooling=pooling)
        data = DataConfig(str(source), text_pair_column="text_pair" if net == "pairs" else None)
        run = RunConfig(data, model, AdaptConfig(method), train, output_dir=str(folders[case]))
        run_undrawn("image_classification" if net in tiny_timm else "text_classification", run)
    return folders


@pytest.fixture(scope="module")
def exports(runs) -> dict[tuple[str, str], dict]:
    """Reports of `export_folder` by case and format, in the default output folders."""
    return {(case, format): export_folder(runs[case], format) for case, format in EXPORTS}


def random_inputs(model, rows: int, tokens: int) -> dict:
    import torch

    if model.modality == "image":
        return {"pixel_values": torch.randn(rows, *model.processor.data_config["input_size"])}
    ids = torch.randint(5, len(model.processor), (rows, tokens))
    mask = (torch.arange(tokens) < torch.randint(1, tokens + 1, (rows, 1))).long()
    return {"input_ids": ids, "token_type_ids": torch.randint(0, 2, (rows, tokens)), "attention_mask": mask}


def test_export_matches_logits_for_any_batch_size_and_length(runs, exports):
    """Graphs are traced with 2 rows of at most 32 tokens; the model has 64 positions."""
    import onnxruntime
    import torch

    for case, format in exports:
        model, _ = load_model_and_task(runs[case])
        file = runs[case] / "export" / format / ("model.onnx" if format == "onnx" else "model.pt2")
        program = torch.export.load(file).module() if format == "torch" else None
        session = None if program else onnxruntime.InferenceSession(str(file))
        for rows, tokens in ((1, 2), (1, 64), (3, 11), (33, 5)):
            inputs = random_inputs(model, rows, tokens)
            with torch.no_grad():
                expected = model(inputs)["logits"]
                if program:
                    logits = program(inputs)
                else:
                    feed = {name: value.numpy() for name, value in inputs.items()}
                    logits = torch.from_numpy(session.run(["logits"], feed)[0])
            torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4, msg=f"{case} {format} {rows} {tokens}")


def test_export_report_contains_all_measurements(runs, exports):
    for (case, format), report in exports.items():
        folder = runs[case] / "export" / format
        assert report == json.loads((folder / "export.json").read_text())
        metrics = json.loads((runs[case] / "metrics.json").read_text())
        names = ["model.onnx", "model.int8.onnx"] if format == "onnx" else ["model.pt2"]
        assert list(report["files"]) == names
        fp32 = report["files"][names[0]]
        assert fp32["largest_difference"] < 1e-4
        assert fp32["test/accuracy"] == metrics["test/accuracy"]
        assert fp32["test/loss"] == pytest.approx(metrics["test/loss"], abs=1e-4)
        rows = report["measured_on"]["rows"]
        for name in names:
            assert report["files"][name]["megabytes"] == pytest.approx((folder / name).stat().st_size / 1e6, abs=0.01)
            assert (
                report["files"][name]["milliseconds_at_1"] > 0 and report["files"][name][f"milliseconds_at_{rows}"] > 0
            )
        if format == "onnx":  # int8 logits differ, within reasonable bounds
            assert 1e-7 < report["files"]["model.int8.onnx"]["largest_difference"] < 1.0


SERVE = """
import json, os, sys
import contextlib, io
for name in ("timm", "transformers", "datasets", "torchvision"):
    sys.modules[name] = None
outputs = []
for folder, code in json.loads(sys.argv[1]):
    os.chdir(folder)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(code, {})
    outputs.append([line.rsplit(" ", 1) for line in printed.getvalue().splitlines()])
print("OUTPUTS", json.dumps(outputs))
"""


def test_export_readme_code_matches_predictions_of_run(runs, exports, images, texts, pairs):
    """Runs the code of the README in a process without hftl, timm, transformers, datasets and torchvision."""
    tables = {"one text": texts, "pairs": pairs}
    jobs, expected = [], []
    for case, format in exports:
        folder = runs[case] / "export" / format
        (code,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), flags=re.DOTALL)
        net = CASES[case][0]
        if net in tables:
            rows = list(csv.DictReader((tables[net] / "test.csv").open(newline="")))
            inputs = repr([(row["text"], row["text_pair"]) if net == "pairs" else row["text"] for row in rows])
        else:
            inputs = repr([str(file) for file in sorted(images.glob("test/*/*.png"))])
        (example,) = re.findall(r"\[[^\[\]]*(?:a text|photo\.jpg)[^\[\]]*\]", code)
        assert ("its pair" in example) == (net == "pairs")
        predictions = [row for row in pq.read_table(runs[case] / "predictions.parquet").to_pylist()]
        test_rows = [row for row in predictions if row["split"] == "test"]
        jobs.append([str(folder), code.replace(example, inputs)])
        expected.append((case, format, test_rows))
        if format == "onnx":
            jobs.append([str(folder), code.replace(example, inputs).replace("model.onnx", "model.int8.onnx")])
            expected.append((case, "int8", test_rows))
    printed = run_python(SERVE, json.dumps(jobs), hide_hftl=True)
    outputs = json.loads(printed.partition("OUTPUTS ")[2])
    for (case, format, test_rows), rows in zip(expected, outputs, strict=True):
        labels = [label for label, _ in rows]
        if format == "int8":
            correct = sum(label == row["label"] for label, row in zip(labels, test_rows, strict=True))
            reported = exports[case, "onnx"]["files"]["model.int8.onnx"]["test/accuracy"]
            # int8 scales depend on the batch
            assert correct / len(test_rows) == pytest.approx(reported, abs=1.5 / len(test_rows)), case
        else:
            assert labels == [row["prediction"] for row in test_rows], (case, format)
            confidences = [float(confidence) for _, confidence in rows]
            assert confidences == pytest.approx([row["confidence"] for row in test_rows], abs=2e-3), (case, format)


def test_export_command_prints_table_and_accepts_other_data(runs, exports, images, tmp_path, capsys):
    output, arguments = tmp_path / "out", [str(runs["resnet"] / "model"), "--data", str(images), "--split=train"]
    main(["export", *arguments, "--format=torch", "--output", str(output)])
    printed = capsys.readouterr().out
    assert "largest logit difference" in printed and "train/accuracy" in printed
    assert re.search(r"^model.pt2( +\d[\d.]+){4}$", printed, flags=re.MULTILINE)
    assert json.loads((output / "export.json").read_text())["measured_on"]["split"] == "train"
    assert {file.name for file in output.iterdir()} == {"README.md", "config.json", "export.json", "model.pt2"}
    table = format_table(exports["resnet", "onnx"], "test/accuracy")
    assert re.search(r"^model.int8.onnx( +\d[\d.]+){4}$", table, flags=re.MULTILINE)
    assert re.search(r"^vs model.onnx +0\.\d\dx +[+-]\d\.\d{4}( +\d+\.\d\dx){2}$", table, flags=re.MULTILINE)


# errors


def test_export_without_onnxscript_names_missing_package(runs, monkeypatch, capsys):
    from hftl.artifacts import exporters

    monkeypatch.setattr(exporters, "find_spec", lambda name: None if name == "onnxscript" else object())
    with pytest.raises(SystemExit) as caught:
        main(["export", str(runs["resnet"])])
    assert caught.value.code == 2
    assert 'onnx needs onnxscript. Install with: pip install "hftl[export]"' in capsys.readouterr().err
    assert exporters.format_problem("torch") is None


def test_export_rejects_invalid_arguments_before_writing(runs, tmp_path):
    with pytest.raises(ConfigError, match=r"'onxx' is invalid; allowed: onnx, torch\. Did you mean 'onnx'\?"):
        export_folder(runs["resnet"], "onxx", tmp_path / "a")
    with pytest.raises(ArtifactError, match="is not a run folder or model folder"):
        export_folder(tmp_path, "torch", tmp_path / "a")
    with pytest.raises(DataError, match="--split: 'validation' is missing"):
        export_folder(runs["pooled"], "torch", tmp_path / "a", source=str(write_table(tmp_path)), split="validation")
    assert not (tmp_path / "a").exists()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("text")
    with pytest.raises(ConfigError, match="contains files that are not an export"):
        export_folder(runs["resnet"], "torch", tmp_path / "mine")
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "text"


def write_table(folder: Path) -> Path:
    file = folder / "only.csv"
    file.write_text("text,label\n" + "\n".join(f"the {word},{label}" for word, label in (("cat", "animal"),) * 4))
    return file


def test_export_rejects_graph_with_different_logits(runs, tmp_path, monkeypatch):
    from hftl.artifacts import export

    def write_changed_weights(model, inputs, file, format, write=export.write):
        import torch

        head = next(model.net.get_classifier().parameters())
        with torch.no_grad():
            head.add_(1.0)
            write(model, inputs, file, format)
            head.sub_(1.0)

    monkeypatch.setattr(export, "write", write_changed_weights)
    with pytest.raises(ArtifactError, match="differs from the trained model: largest logit difference model.pt2"):
        export_folder(runs["resnet"], "torch", tmp_path)
    assert (tmp_path / "model.pt2").is_file() and not (tmp_path / "export.json").exists()


def test_export_rejects_graph_with_fixed_batch_size(runs, tmp_path, monkeypatch):
    from hftl.artifacts import exporters

    monkeypatch.setattr(exporters, "_axes", lambda name: ())
    with pytest.raises(ArtifactError, match="fails on some batch sizes"):
        export_folder(runs["resnet"], "torch", tmp_path)


def test_export_of_dynamic_control_flow_reports_cause(runs, tmp_path, monkeypatch):
    from hftl.models.timm_model import TimmModel

    def forward(self, inputs):
        logits = self.net(inputs["pixel_values"])
        return {"logits": logits if logits.sum() > 0 else -logits}

    monkeypatch.setattr(TimmModel, "forward", forward)
    with pytest.raises(ArtifactError, match=r"ResNet cannot be exported to torch: \w+: .*data-dependent"):
        export_folder(runs["resnet"], "torch", tmp_path)


def test_failed_quantization_keeps_fp32_export(runs, exports, tmp_path, monkeypatch, capsys):
    from hftl.artifacts import export

    def quantize_and_fail(file, output):
        output.write_bytes(b"half")
        raise NotImplementedError("ConvInteger")

    written = runs["resnet"] / "export" / "onnx" / "model.onnx"
    monkeypatch.setattr(export, "write", lambda model, inputs, file, format: shutil.copy(written, file))
    monkeypatch.setattr(export, "quantize", quantize_and_fail)
    report = export_folder(runs["resnet"], output=tmp_path)
    assert list(report["files"]) == ["model.onnx"] and "ConvInteger" in report["not_quantized"]
    assert "skipped model.int8.onnx" in capsys.readouterr().out and not (tmp_path / "model.int8.onnx").exists()
