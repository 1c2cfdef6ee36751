"""Reports and comparison pages: numbers against scikit-learn and scipy, escaping, missing files, and a browser."""

import base64
import json
import re
import shutil
from html.parser import HTMLParser
from io import BytesIO

import numpy as np
import pytest
from conftest import load_recipe

from hftl import DataConfig, ModelConfig, RunConfig, get_run_folder
from hftl.artifacts import save_run
from hftl.cli.main import main
from hftl.config.parse import dump_config
from hftl.errors import ArtifactError, ConfigError
from hftl.evaluation.evaluate import TableWriter
from hftl.reporting import compare_reports, write_report
from hftl.tasks.targets.single_label.metrics import ClassificationMetrics

HOSTILE = ["<script>alert(1)</script>", "$x_$ & </style> --> ]]>", "\" onmouseover='alert(1)' 中文"]
TEXT = '<img src=x onerror=alert(1)> <a href="https://example.com">{number}</a> </blockquote>'


class Page(HTMLParser):
    """Parsed page: elements with attributes, tables by caption, and all text."""

    def __init__(self, path):
        super().__init__()
        self.elements, self.text, self.tables = [], "", {}
        self.raw = path.read_text(encoding="utf-8")
        self.open, self.table = None, None
        self.feed(self.raw)

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag == "table":
            self.table = {"caption": "", "rows": []}
        elif self.table is not None and tag == "tr":
            self.table["rows"].append([])
        elif self.table is not None and tag in ("td", "th"):
            self.table["rows"][-1].append("")
        self.open = tag if tag in ("caption", "td", "th") else self.open if tag == "small" else None

    def handle_endtag(self, tag):
        if tag == "table":
            self.tables[self.table["caption"].split(" (")[0]] = self.table["rows"]
            self.table = None
        if tag in ("caption", "td", "th"):
            self.open = None

    def handle_data(self, data):
        self.text += data
        if self.table is not None and self.open == "caption":
            self.table["caption"] += data
        elif self.table is not None and self.open in ("td", "th", "small"):
            self.table["rows"][-1][-1] += data

    @property
    def titles(self):
        return [attributes["id"] for tag, attributes in self.elements if tag == "h2"]


def make_run(folder, names=("cat", "dog", "owl"), rows=120, seed=0, sharpness=1.0):
    """Writes a run folder like `save_run`, with labels sampled from random logits; `sharpness` scales the logits."""
    rng = np.random.default_rng(seed)
    data = folder / "data"
    (folder / "model").mkdir(parents=True)
    data.mkdir(exist_ok=True)
    writer, metrics, row_counts = TableWriter(folder / "predictions.parquet"), {}, {}
    for split in ("train", "validation", "test"):
        logits = rng.normal(0, 2, (rows, len(names)))
        probabilities = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
        labels = (rng.random((rows, 1)) > probabilities.cumsum(1)).sum(1).clip(0, len(names) - 1)
        probabilities = np.exp(logits * sharpness) / np.exp(logits * sharpness).sum(1, keepdims=True)
        lines = [json.dumps({"text": TEXT.format(number=n), "label": names[k]}) for n, k in enumerate(labels)]
        (data / f"{split}.jsonl").write_text("\n".join(lines))
        row_counts[split] = rows
        if split == "train":
            continue
        accumulator = ClassificationMetrics(len(names))
        np.add.at(accumulator.confusion, (labels, probabilities.argmax(1)), 1)
        loss = -np.log(probabilities[np.arange(rows), labels]).mean()
        metrics |= {f"{split}/{name}": value for name, value in ({"loss": loss} | accumulator.compute()).items()}
        writer.write(
            [
                {
                    "split": split,
                    "row": n,
                    "label": names[label],
                    "prediction": names[int(row.argmax())],
                    "confidence": float(row.max()),
                    "probabilities": row.tolist(),
                }
                for n, (label, row) in enumerate(zip(labels, probabilities, strict=True))
            ]
        )
    writer.close()
    run = RunConfig(DataConfig(source=str(data)), ModelConfig(name="some/model"), output_dir=str(folder))
    (folder / "config.yaml").write_text(dump_config(run))
    parameters = {"method": "full", "backbone": 90, "adapters": 0, "head": 10, "trainable": 25, "total": 100}
    training = {"steps": 4, "seconds": 65.2, "best": {"step": 2, "metric": "validation/accuracy", "value": 0.5}}
    facts = {"adapt": parameters, "training": training | {"peak_resident_bytes": 3 * 2**20}, "rows": row_counts}
    state = {"inputs": {"columns": ["text"]}, "target": {"column": "label", "names": names, "values": names}}
    head = {"labels": names, "problem_type": "single_label_classification"}
    description = {"task": "text_classification", "state": state, "head": head}
    history = [{"step": s, "train/loss": 1 / s, "validation/accuracy": 0.5, "lr/head": 0.1 / s} for s in (1, 2, 4)]
    (folder / "metrics.json").write_text(json.dumps(metrics))
    (folder / "report.json").write_text(json.dumps(facts))
    (folder / "environment.json").write_text(json.dumps({"python": "3.x", "packages": {"hftl": "0"}}))
    (folder / "model" / "hftl.json").write_text(json.dumps(description))
    (folder / "history.jsonl").write_text("\n".join(map(json.dumps, history)))
    return folder


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    """Run folder whose class names and texts contain HTML and JavaScript."""
    return make_run(tmp_path_factory.mktemp("runs") / "hostile", HOSTILE, sharpness=2.0)


@pytest.fixture(scope="module")
def page(run_folder):
    return Page(write_report(run_folder))


def edit_json(file, edit):
    values = json.loads(file.read_text())
    edit(values)
    file.write_text(json.dumps(values))


def read_class_predictions(folder, split):
    """Returns labels, predictions and probabilities of a split, read without hftl."""
    import pyarrow.parquet as pq

    rows = [row for row in pq.read_table(folder / "predictions.parquet").to_pylist() if row["split"] == split]
    return *([row[name] for row in rows] for name in ("label", "prediction")), np.array(
        [row["probabilities"] for row in rows]
    )


# the page and its numbers


def test_report_links_every_section(page):
    first = ["summary", "learning-curves", "per-class-metrics", "confusion-matrix", "calibration"]
    last = ["most-confident-errors", "data", "training", "configuration-and-environment"]
    assert page.titles == first + last
    links = [attributes["href"] for tag, attributes in page.elements if tag == "a"]
    assert links == [f"#{title}" for title in page.titles]


def test_metrics_table_matches_metrics_json_with_intervals(page, run_folder):
    metrics = json.loads((run_folder / "metrics.json").read_text())
    head, *rows = page.tables["Metrics"]
    for row in rows:
        for split, cell in zip(head[1:], row[1:], strict=True):
            value = metrics[f"{split}/{row[0]}"]
            assert cell.startswith(f"{value:.4f}")
            if row[0] != "loss":
                low, high = map(float, cell.partition("[")[2].rstrip("]").split(","))
                assert low < value < high


def test_per_class_metrics_match_scikit_learn(page, run_folder):
    from sklearn.metrics import precision_recall_fscore_support

    labels, predictions, _ = read_class_predictions(run_folder, "test")
    expected = precision_recall_fscore_support(labels, predictions, labels=HOSTILE)
    for k, row in enumerate(page.tables["Classes of test"][1:]):
        precision, recall, f1, support = (float(values[k]) for values in expected)
        assert row[:3] == [HOSTILE[k], str(k), str(int(support))]
        assert row[4].startswith(f"{precision:.4f}") and row[5].startswith(f"{recall:.4f}") and row[6] == f"{f1:.4f}"


def test_most_confused_classes_match_scikit_learn(page, run_folder):
    from sklearn.metrics import confusion_matrix

    labels, predictions, _ = read_class_predictions(run_folder, "test")
    counts = confusion_matrix(labels, predictions, labels=HOSTILE)
    rows = page.tables["Most confused classes"][1:]
    assert [int(row[2]) for row in rows] == sorted((counts - np.diag(counts.diagonal())).ravel(), reverse=True)[:6]
    assert all(counts[HOSTILE.index(row[0]), HOSTILE.index(row[1])] == int(row[2]) for row in rows)


def test_calibration_uses_temperature_of_validation(page, run_folder):
    from sklearn.metrics import log_loss

    from hftl.evaluation.calibration import fit_temperature, soften

    labels, _, probabilities = read_class_predictions(run_folder, "validation")
    temperature = fit_temperature(probabilities, [HOSTILE.index(label) for label in labels])
    assert temperature == pytest.approx(2.0, rel=0.3)  # logits were multiplied by 2
    _, before, after = page.tables["Calibration on test"]
    assert after[0] == f"temperature {temperature:.2f}"
    labels, _, probabilities = read_class_predictions(run_folder, "test")
    codes = [HOSTILE.index(label) for label in labels]
    assert float(before[2]) == pytest.approx(log_loss(codes, probabilities), abs=1e-4)
    assert float(after[2]) == pytest.approx(log_loss(codes, soften(probabilities, temperature)), abs=1e-4)
    metrics = json.loads((run_folder / "metrics.json").read_text())
    assert float(before[2]) == pytest.approx(metrics["test/loss"], abs=1e-4)


def test_errors_are_sorted_by_confidence(page, run_folder):
    labels, predictions, probabilities = read_class_predictions(run_folder, "test")
    wrong = sorted((-probabilities[n].max(), n) for n in range(len(labels)) if labels[n] != predictions[n])
    words = [text.split()[0] for text in page.text.split("row ")[1:]]
    listed = [int(word) for word in words if word.isdecimal()][:24]
    assert listed == [n for _, n in wrong[:24]]
    assert TEXT.format(number=wrong[0][1]) in page.text


def test_training_section_lists_parameters_time_and_memory(page):
    assert ["trainable", "25"] in page.tables["Parameters"]
    assert ["training including evaluations", "1 min 05 s"] in page.tables["Time and memory"]
    assert ["peak memory, resident, main process", "3 MiB"] in page.tables["Time and memory"]
    assert page.tables["Rows per class"][0] == ["class", "train", "validation", "test"]


def test_report_is_deterministic(run_folder, page, tmp_path):
    assert write_report(run_folder, tmp_path / "again.html").read_text(encoding="utf-8") == page.raw


# escaping and external resources


def test_report_escapes_class_names_and_texts(page):
    tags = {tag for tag, _ in page.elements}
    assert not tags & {"script", "iframe", "object"}
    assert all(name in page.text for name in HOSTILE)
    for tag, attributes in page.elements:
        assert not [name for name in attributes if name.startswith("on")], (tag, attributes)
        assert tag != "img" or attributes["src"].startswith("data:")


def test_report_loads_no_external_resources(page):
    for tag, attributes in page.elements:
        for name in ("src", "href", "xlink:href", "srcset", "action", "data", "poster"):
            assert attributes.get(name, "#").startswith(("#", "data:")), (tag, attributes)
    style = page.raw[page.raw.index("<style>") : page.raw.index("</style>")]
    assert "url(" not in style and "@import" not in style
    policy = next(a["content"] for t, a in page.elements if a.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'")


# missing or changed files


def test_report_warns_about_missing_data_source(run_folder, tmp_path):
    folder = shutil.copytree(run_folder, tmp_path / "run")
    (folder / "config.yaml").write_text((folder / "config.yaml").read_text().replace("hostile/data", "hostile/gone"))
    page = Page(write_report(folder))
    assert "does not exist" in page.text and "in the working directory of the run" in page.text
    assert "most-confident-errors" in page.titles and TEXT.format(number=0) not in page.text
    assert page.tables["Rows per class"][0] == ["class", "validation", "test"]  # from the predictions


@pytest.mark.parametrize("change", ["one label", "one row"])
def test_report_omits_rows_of_changed_data(tmp_path, change):
    folder = make_run(tmp_path / "run", rows=30)
    lines = (folder / "data" / "test.jsonl").read_text().splitlines()
    label = json.loads(lines[7])["label"]
    lines[7] = json.dumps({"text": "new", "label": "dog" if label != "dog" else "cat"})
    (folder / "data" / "test.jsonl").write_text("\n".join(lines if change == "one label" else lines[1:]))
    page = Page(write_report(folder))
    assert "has changed since the run" in page.text and "example.com" not in page.text


def test_predictions_of_other_run_return_no_intervals(run_folder, tmp_path):
    folder = shutil.copytree(run_folder, tmp_path / "run")
    edit_json(folder / "metrics.json", lambda metrics: metrics.update({k: v / 2 for k, v in metrics.items()}))
    page = Page(write_report(folder))
    assert "predictions.parquet does not reproduce the test metrics" in page.text
    assert not any("[" in cell for row in page.tables["Metrics"] for cell in row)


def test_run_without_predictions_has_remaining_sections(run_folder, tmp_path):
    folder = shutil.copytree(run_folder, tmp_path / "run")
    for file in ("predictions.parquet", "history.jsonl", "model/hftl.json"):
        (folder / file).unlink()
    (folder / "metrics.json").write_text(json.dumps({"validation/rmse": 1.5, "validation/r2": None}))
    page = Page(write_report(folder))
    assert page.titles == ["summary", "data", "training", "configuration-and-environment"]
    assert page.tables["Metrics"] == [["metric", "validation"], ["rmse", "1.5000"], ["r2", "–"]]


def test_report_rejects_invalid_folder_or_output(tmp_path, run_folder, capsys):
    with pytest.raises(ArtifactError, match="Did you mean 'hostile'"):
        write_report(run_folder.parent / "hostlie")
    with pytest.raises(ArtifactError, match="not a finished run: config.yaml, metrics.json, report.json missing"):
        write_report(tmp_path)
    with pytest.raises(ConfigError, match="allowed: .html"):
        write_report(run_folder, tmp_path / "page.pdf")
    with pytest.raises(SystemExit) as caught:
        main(["report", str(tmp_path / "none")])
    assert caught.value.code == 2 and re.search("run folder .* does not exist", capsys.readouterr().err)


# comparison pages


def change_predictions(folder, rows):
    """Changes the run to seed 1, and the predictions of the first `rows` test rows to the last class."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    names = json.loads((folder / "model" / "hftl.json").read_text())["head"]["labels"]
    table = pq.read_table(folder / "predictions.parquet").to_pylist()
    counts = {"validation": ClassificationMetrics(len(names)), "test": ClassificationMetrics(len(names))}
    for row in table:
        if row["split"] == "test" and row["row"] < rows:
            row["prediction"] = names[-1]
        counts[row["split"]].confusion[names.index(row["label"]), names.index(row["prediction"])] += 1
    pq.write_table(pa.Table.from_pylist(table), folder / "predictions.parquet")
    values = {f"{split}/{name}": v for split, each in counts.items() for name, v in each.compute().items()}
    edit_json(folder / "metrics.json", lambda metrics: metrics.update(values))
    before, _, training = (folder / "config.yaml").read_text().partition("train:")
    (folder / "config.yaml").write_text(before + "train:" + training.replace("seed: 0", "seed: 1"))
    return folder


def test_comparison_matches_mcnemar_test(tmp_path, capsys):
    from scipy.stats import binomtest

    first = make_run(tmp_path / "a" / "run")
    second = change_predictions(shutil.copytree(first, tmp_path / "b" / "run"), 60)
    main(["report", str(first), str(second), "--output", str(tmp_path / "both.html")])
    assert capsys.readouterr().out.strip() == str(tmp_path / "both.html")
    page = Page(tmp_path / "both.html")
    assert "evaluated on different" not in page.text
    labels, before, _ = read_class_predictions(first, "test")
    after = read_class_predictions(second, "test")[1]
    gained = sum(b == t != a for t, a, b in zip(labels, before, after, strict=True))
    lost = sum(a == t != b for t, a, b in zip(labels, before, after, strict=True))
    p = binomtest(gained, gained + lost).pvalue
    _, row = page.tables["Per-example agreement"]
    assert row[:3] == ["b/run", str(gained), str(lost)]
    assert float(row[4].removeprefix("< ")) == pytest.approx(p, abs=1e-4)
    metrics = [json.loads((run / "metrics.json").read_text())["test/accuracy"] for run in (first, second)]
    assert [row[2][:6] for row in page.tables["Runs"][1:]] == [f"{value:.4f}" for value in metrics]
    assert page.tables["Configuration"][1:] == [["train.seed", "0", "1"]]
    seeds = next(rows for caption, rows in page.tables.items() if caption.startswith("Over seeds"))
    assert seeds[1][2] == f"{np.mean(metrics):.4f} ± {np.std(metrics, ddof=1):.4f}"


def test_comparison_warns_about_different_rows(tmp_path):
    runs = [make_run(tmp_path / "one"), make_run(tmp_path / "two", seed=1), make_run(tmp_path / "three", rows=40)]
    page = Page(compare_reports(runs, tmp_path / "compare.html"))
    assert "evaluated on different rows" in page.text and "three (40)" in page.text
    assert "Per-example agreement" not in page.tables
    remove_test = lambda metrics: [metrics.pop(name) for name in list(metrics) if "test/" in name]  # noqa: E731
    edit_json(runs[1] / "metrics.json", remove_test)
    page = Page(compare_reports(runs, tmp_path / "compare.html"))
    assert "evaluated on different splits: one on test, two on validation, three on test" in page.text


# real runs


def test_text_run_writes_report(text_run, capsys):
    run = text_run()
    metrics = load_recipe("text_classification").main(run)
    page = Page(get_run_folder(run) / "report.html")
    assert f"report: wrote {run.output_dir}" in capsys.readouterr().out
    assert f"{metrics['test/accuracy']:.4f}" in page.text and "most-confident-errors" in page.titles
    memory = json.loads((get_run_folder(run) / "report.json").read_text())["training"]["peak_resident_bytes"]
    assert 2**27 < memory < 2**37  # torch takes more than 128 MiB


def test_image_run_report_shows_thumbnails_of_errors(image_run):
    from PIL import Image

    run = image_run()
    load_recipe("image_classification").main(run)
    page = Page(get_run_folder(run) / "report.html")
    sources = [attributes["src"] for tag, attributes in page.elements if tag == "img"]
    wrong = sum(a != b for a, b in zip(*read_class_predictions(get_run_folder(run), "test")[:2], strict=True))
    assert wrong and len(sources) == wrong
    for source in sources:
        with Image.open(BytesIO(base64.b64decode(source.partition(",")[2]))) as image:
            assert max(image.size) <= 176
    assert "24 pixels" in page.text


def test_failed_report_preserves_run(text_run, monkeypatch, capsys):
    def fail(*_, **__):
        raise RuntimeError("broken")

    monkeypatch.setattr(save_run, "write_report", fail)
    run = text_run(max_steps=1, num_epochs=None)
    assert load_recipe("text_classification").main(run)
    output = capsys.readouterr().out
    assert "not written (RuntimeError: broken); the run is complete" in output
    assert f"`hftl report {run.output_dir}`" in output
    main(["report", run.output_dir])
    assert (get_run_folder(run) / "report.html").is_file()


# browser


@pytest.mark.browser
@pytest.mark.parametrize("width", [1280, 400])
def test_browser_renders_pages_without_errors(chromium, run_folder, page, tmp_path, width):
    other = make_run(tmp_path / ("a-rather-long-name-of-a-run" * 3), [f"class_{k:02d}_{'x' * 40}" for k in range(77)])
    pages = [
        run_folder / "report.html",
        write_report(other),
        compare_reports([run_folder, other], tmp_path / "compare.html"),
    ]
    for path in pages:
        tab = chromium.new_page(viewport={"width": width, "height": 800})
        messages, requests = [], []
        tab.on("console", lambda message, messages=messages: messages.append(message.text))
        tab.on("pageerror", lambda error, messages=messages: messages.append(str(error)))
        tab.on("dialog", lambda dialog, messages=messages: (messages.append("dialog"), dialog.dismiss()))
        tab.on("request", lambda request, requests=requests: requests.append(request.url))
        tab.goto(path.as_uri())
        assert not messages
        assert [url for url in requests if not url.startswith("data:")] == [path.as_uri()]
        assert tab.evaluate("document.documentElement.scrollWidth") <= width
        assert tab.evaluate("document.scripts.length") == 0
        tab.close()
