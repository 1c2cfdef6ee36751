"""The page of a run: right numbers, nothing from outside, nothing run, nothing lost where something is missing."""

import base64
import json
import shutil
from html.parser import HTMLParser
from io import BytesIO

import numpy as np
import pytest
from conftest import load_recipe

from hftl import DataConfig, ModelConfig, RunConfig, get_run_folder
from hftl.artifacts import save_run as publish
from hftl.cli.main import main
from hftl.config.parse import dump_config
from hftl.errors import ArtifactError, ConfigError
from hftl.evaluation.evaluate import TableWriter
from hftl.reporting import compare_reports, write_report
from hftl.tasks.targets.single_label.metrics import ClassificationMetrics

HOSTILE = ["<script>alert(1)</script>", "$x_$ & </style> --> ]]>", "\" onmouseover='alert(1)' 中文"]
TEXT = '<img src=x onerror=alert(1)> <a href="https://example.com">{number}</a> </blockquote>'


class Page(HTMLParser):
    """What a browser would see: elements with attributes, tables by caption, and all text."""

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
    """A run folder as `evaluate` and `publish` leave it, of a model that is right where its drawn logits say so."""
    rng = np.random.default_rng(seed)
    data = folder / "data"
    (folder / "model").mkdir(parents=True)
    data.mkdir(exist_ok=True)
    writer, metrics, counted = TableWriter(folder / "predictions.parquet"), {}, {}
    for split in ("train", "validation", "test"):
        logits = rng.normal(0, 2, (rows, len(names)))
        shares = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
        labels = (rng.random((rows, 1)) > shares.cumsum(1)).sum(1).clip(0, len(names) - 1)
        shares = np.exp(logits * sharpness) / np.exp(logits * sharpness).sum(1, keepdims=True)
        lines = [json.dumps({"text": TEXT.format(number=n), "label": names[k]}) for n, k in enumerate(labels)]
        (data / f"{split}.jsonl").write_text("\n".join(lines))
        counted[split] = rows
        if split == "train":
            continue
        found = ClassificationMetrics(len(names))
        np.add.at(found.confusion, (labels, shares.argmax(1)), 1)
        loss = -np.log(shares[np.arange(rows), labels]).mean()
        metrics |= {f"{split}/{name}": value for name, value in ({"loss": loss} | found.compute()).items()}
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
                for n, (label, row) in enumerate(zip(labels, shares, strict=True))
            ]
        )
    writer.close()
    run = RunConfig(DataConfig(source=str(data)), ModelConfig(name="some/model"), output_dir=str(folder))
    (folder / "config.yaml").write_text(dump_config(run))
    adapted = {"method": "full", "backbone": 90, "adapters": 0, "head": 10, "trainable": 25, "total": 100}
    training = {"steps": 4, "seconds": 65.2, "best": {"step": 2, "metric": "validation/accuracy", "value": 0.5}}
    facts = {"adapt": adapted, "training": training | {"peak_resident_bytes": 3 * 2**20}, "rows": counted}
    state = {"inputs": {"columns": ["text"]}, "target": {"column": "label", "names": names, "values": names}}
    head = {"labels": names, "problem_type": "single_label_classification"}
    described = {"task": "text_classification", "state": state, "head": head}
    history = [{"step": s, "train/loss": 1 / s, "validation/accuracy": 0.5, "lr/head": 0.1 / s} for s in (1, 2, 4)]
    (folder / "metrics.json").write_text(json.dumps(metrics))
    (folder / "report.json").write_text(json.dumps(facts))
    (folder / "environment.json").write_text(json.dumps({"python": "3.x", "packages": {"hftl": "0"}}))
    (folder / "model" / "hftl.json").write_text(json.dumps(described))
    (folder / "history.jsonl").write_text("\n".join(map(json.dumps, history)))
    return folder


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A run whose class names and texts try to break out of the page."""
    return make_run(tmp_path_factory.mktemp("runs") / "hostile", HOSTILE, sharpness=2.0)


@pytest.fixture(scope="module")
def page(made):
    return Page(write_report(made))


def change(folder, name, edit):
    values = json.loads((folder / name).read_text())
    edit(values)
    (folder / name).write_text(json.dumps(values))


def judged(folder, split):
    """Labels, predictions and probabilities of a split, read without hftl."""
    import pyarrow.parquet as pq

    rows = [row for row in pq.read_table(folder / "predictions.parquet").to_pylist() if row["split"] == split]
    return *([row[name] for row in rows] for name in ("label", "prediction")), np.array(
        [row["probabilities"] for row in rows]
    )


# the page and its numbers


def test_every_section_is_there_and_linked(page):
    wanted = ["summary", "learning-curves", "classes", "confusion", "calibration", "most-confident-errors"]
    assert page.titles == [*wanted, "data", "training", "configuration-and-environment"]
    linked = [attributes["href"] for tag, attributes in page.elements if tag == "a"]
    assert linked == [f"#{title}" for title in page.titles]


def test_metrics_are_those_on_disk_with_intervals_around_them(page, made):
    metrics = json.loads((made / "metrics.json").read_text())
    head, *rows = page.tables["Metrics"]
    for row in rows:
        for split, cell in zip(head[1:], row[1:], strict=True):
            value = metrics[f"{split}/{row[0]}"]
            assert cell.startswith(f"{value:.4f}")
            if row[0] != "loss":
                low, high = map(float, cell.partition("[")[2].rstrip("]").split(","))
                assert low < value < high


def test_classes_are_scored_as_scikit_learn_does(page, made):
    from sklearn.metrics import precision_recall_fscore_support

    labels, predictions, _ = judged(made, "test")
    found = precision_recall_fscore_support(labels, predictions, labels=HOSTILE)
    for k, row in enumerate(page.tables["Classes of test"][1:]):
        precision, recall, f1, support = (float(values[k]) for values in found)
        assert row[:3] == [HOSTILE[k], str(k), str(int(support))]
        assert row[4].startswith(f"{precision:.4f}") and row[5].startswith(f"{recall:.4f}") and row[6] == f"{f1:.4f}"


def test_the_most_confused_pairs_are_counted(page, made):
    from sklearn.metrics import confusion_matrix

    labels, predictions, _ = judged(made, "test")
    counts = confusion_matrix(labels, predictions, labels=HOSTILE)
    rows = page.tables["Most confused"][1:]
    assert [int(row[2]) for row in rows] == sorted((counts - np.diag(counts.diagonal())).ravel(), reverse=True)[:6]
    assert all(counts[HOSTILE.index(row[0]), HOSTILE.index(row[1])] == int(row[2]) for row in rows)


def test_calibration_is_measured_on_test_with_the_temperature_of_validation(page, made):
    from sklearn.metrics import log_loss

    from hftl.evaluation.calibration import fit_temperature, soften

    labels, _, shares = judged(made, "validation")
    temperature = fit_temperature(shares, [HOSTILE.index(label) for label in labels])
    assert temperature == pytest.approx(2.0, rel=0.3)  # the model was made twice as sure as is right
    _, before, after = page.tables["Calibration on test"]
    assert after[0] == f"temperature {temperature:.2f}"
    labels, _, shares = judged(made, "test")
    codes = [HOSTILE.index(label) for label in labels]
    assert float(before[2]) == pytest.approx(log_loss(codes, shares), abs=1e-4)
    assert float(after[2]) == pytest.approx(log_loss(codes, soften(shares, temperature)), abs=1e-4)
    metrics = json.loads((made / "metrics.json").read_text())
    assert float(before[2]) == pytest.approx(metrics["test/loss"], abs=1e-4)


def test_errors_come_surest_first_with_their_text(page, made):
    labels, predictions, shares = judged(made, "test")
    wrong = sorted((-shares[n].max(), n) for n in range(len(labels)) if labels[n] != predictions[n])
    shown = [part.split()[0] for part in page.text.split("row ")[1:]]
    shown = [int(word) for word in shown if word.isdecimal()][:24]
    assert shown == [n for _, n in wrong[:24]]
    assert TEXT.format(number=wrong[0][1]) in page.text


def test_training_says_parameters_time_and_memory(page):
    assert ["trainable", "25"] in page.tables["Parameters"]
    assert ["training, evaluations included", "1 min 05 s"] in page.tables["Time and memory"]
    assert ["peak memory, resident, main process", "3 MiB"] in page.tables["Time and memory"]
    assert page.tables["Rows of each class"][0] == ["class", "train", "validation", "test"]


def test_equal_runs_give_equal_pages(made, page, tmp_path):
    assert write_report(made, tmp_path / "again.html").read_text(encoding="utf-8") == page.raw


# nothing from outside, nothing run


def test_what_comes_from_data_is_text(page):
    tags = {tag for tag, _ in page.elements}
    assert not tags & {"script", "iframe", "object"}
    assert all(name in page.text for name in HOSTILE)
    for tag, attributes in page.elements:
        assert not [name for name in attributes if name.startswith("on")], (tag, attributes)
        assert tag != "img" or attributes["src"].startswith("data:")


def test_nothing_is_loaded_from_elsewhere(page):
    for tag, attributes in page.elements:
        for name in ("src", "href", "xlink:href", "srcset", "action", "data", "poster"):
            assert attributes.get(name, "#").startswith(("#", "data:")), (tag, attributes)
    style = page.raw[page.raw.index("<style>") : page.raw.index("</style>")]
    assert "url(" not in style and "@import" not in style
    policy = next(a["content"] for t, a in page.elements if a.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'")


# what is missing


def test_a_data_source_that_is_gone_is_said(made, tmp_path):
    folder = shutil.copytree(made, tmp_path / "run")
    (folder / "config.yaml").write_text((folder / "config.yaml").read_text().replace("hostile/data", "hostile/gone"))
    page = Page(write_report(folder))
    assert "does not exist" in page.text and "start it in the same folder" in page.text
    assert "most-confident-errors" in page.titles and TEXT.format(number=0) not in page.text
    assert page.tables["Rows of each class"][0] == ["class", "validation", "test"]  # from the predictions


@pytest.mark.parametrize("what", ["one label", "one row"])
def test_changed_data_are_not_shown(tmp_path, what):
    folder = make_run(tmp_path / "run", rows=30)
    lines = (folder / "data" / "test.jsonl").read_text().splitlines()
    label = json.loads(lines[7])["label"]
    lines[7] = json.dumps({"text": "new", "label": "dog" if label != "dog" else "cat"})
    (folder / "data" / "test.jsonl").write_text("\n".join(lines if what == "one label" else lines[1:]))
    page = Page(write_report(folder))
    assert "has changed since the run" in page.text and "example.com" not in page.text


def test_predictions_of_another_run_give_no_intervals(made, tmp_path):
    folder = shutil.copytree(made, tmp_path / "run")
    change(folder, "metrics.json", lambda metrics: metrics.update({k: v / 2 for k, v in metrics.items()}))
    page = Page(write_report(folder))
    assert "predictions.parquet does not give the metrics of test" in page.text
    assert not any("[" in cell for row in page.tables["Metrics"] for cell in row)


def test_a_run_without_classes_has_the_sections_it_can_have(made, tmp_path):
    folder = shutil.copytree(made, tmp_path / "run")
    for file in ("predictions.parquet", "history.jsonl", "model/hftl.json"):
        (folder / file).unlink()
    (folder / "metrics.json").write_text(json.dumps({"validation/rmse": 1.5, "validation/r2": None}))
    page = Page(write_report(folder))
    assert page.titles == ["summary", "data", "training", "configuration-and-environment"]
    assert page.tables["Metrics"] == [["metric", "validation"], ["rmse", "1.5000"], ["r2", "–"]]


def test_what_is_no_run_is_refused(tmp_path, made, capsys):
    with pytest.raises(ArtifactError, match="Did you mean 'hostile'"):
        write_report(made.parent / "hostlie")
    with pytest.raises(ArtifactError, match="it has no config.yaml, metrics.json, report.json"):
        write_report(tmp_path)
    with pytest.raises(ConfigError, match="must end in .html"):
        write_report(made, tmp_path / "page.pdf")
    with pytest.raises(SystemExit) as left:
        main(["report", str(tmp_path / "none")])
    assert left.value.code == 2 and "there is no run folder" in capsys.readouterr().err


# side by side


def disturb(folder, rows):
    """Makes the run one of seed 1, whose first `rows` test rows are predicted as the last class."""
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
    values = {f"{split}/{name}": v for split, found in counts.items() for name, v in found.compute().items()}
    change(folder, "metrics.json", lambda metrics: metrics.update(values))
    before, _, training = (folder / "config.yaml").read_text().partition("train:")
    (folder / "config.yaml").write_text(before + "train:" + training.replace("seed: 0", "seed: 1"))
    return folder


def test_runs_on_the_same_rows_are_compared_row_by_row(tmp_path, capsys):
    from scipy.stats import binomtest

    first = make_run(tmp_path / "a" / "run")
    second = disturb(shutil.copytree(first, tmp_path / "b" / "run"), 60)
    main(["report", str(first), str(second), "--output", str(tmp_path / "both.html")])
    assert capsys.readouterr().out.strip() == str(tmp_path / "both.html")
    page = Page(tmp_path / "both.html")
    assert "not measured on the same" not in page.text
    labels, before, _ = judged(first, "test")
    after = judged(second, "test")[1]
    gained = sum(b == t != a for t, a, b in zip(labels, before, after, strict=True))
    lost = sum(a == t != b for t, a, b in zip(labels, before, after, strict=True))
    p = binomtest(gained, gained + lost).pvalue
    assert page.tables["Row by row"][1][:3] == ["b/run", str(gained), str(lost)]
    assert float(page.tables["Row by row"][1][4].removeprefix("< ")) == pytest.approx(p, abs=1e-4)
    metrics = [json.loads((run / "metrics.json").read_text())["test/accuracy"] for run in (first, second)]
    assert [row[2][:6] for row in page.tables["Runs"][1:]] == [f"{value:.4f}" for value in metrics]
    assert page.tables["Configuration"][1:] == [["train.seed", "0", "1"]]
    over_seeds = next(rows for caption, rows in page.tables.items() if caption.startswith("Over seeds"))
    assert over_seeds[1][2] == f"{np.mean(metrics):.4f} ± {np.std(metrics, ddof=1):.4f}"


def test_runs_on_other_rows_are_not_compared_silently(tmp_path):
    runs = [make_run(tmp_path / "one"), make_run(tmp_path / "two", seed=1), make_run(tmp_path / "three", rows=40)]
    page = Page(compare_reports(runs, tmp_path / "compare.html"))
    assert "not measured on the same rows" in page.text and "three (40)" in page.text
    assert "Row by row" not in page.tables
    change(runs[1], "metrics.json", lambda metrics: [metrics.pop(name) for name in list(metrics) if "test/" in name])
    page = Page(compare_reports(runs, tmp_path / "compare.html"))
    assert "not measured on the same split: one on test, two on validation, three on test" in page.text


# real runs


def test_a_text_run_ends_with_its_page(text_run, capsys):
    run = text_run()
    metrics = load_recipe("text_classification").main(run)
    page = Page(get_run_folder(run) / "report.html")
    assert f"report: {run.output_dir}" in capsys.readouterr().out
    assert f"{metrics['test/accuracy']:.4f}" in page.text and "most-confident-errors" in page.titles
    memory = json.loads((get_run_folder(run) / "report.json").read_text())["training"]["peak_resident_bytes"]
    assert 2**27 < memory < 2**37  # torch alone takes more than 128 MiB


def test_an_image_run_shows_its_errors(image_run):
    from PIL import Image

    run = image_run()
    load_recipe("image_classification").main(run)
    page = Page(get_run_folder(run) / "report.html")
    shown = [attributes["src"] for tag, attributes in page.elements if tag == "img"]
    wrong = sum(a != b for a, b in zip(*judged(get_run_folder(run), "test")[:2], strict=True))
    assert wrong and len(shown) == wrong
    for source in shown:
        with Image.open(BytesIO(base64.b64decode(source.partition(",")[2]))) as image:
            assert max(image.size) <= 176
    assert "24 pixels" in page.text


def test_a_page_that_cannot_be_drawn_loses_nothing(text_run, monkeypatch, capsys):
    def broken(*_, **__):
        raise RuntimeError("no ink")

    monkeypatch.setattr(publish, "write_report", broken)
    run = text_run(max_steps=1, num_epochs=None)
    assert load_recipe("text_classification").main(run)
    said = capsys.readouterr().out
    assert f"not drawn (RuntimeError: no ink); the run is complete, `hftl report {run.output_dir}` tries again" in said
    main(["report", run.output_dir])
    assert (get_run_folder(run) / "report.html").is_file()


# looked at


@pytest.mark.browser
@pytest.mark.parametrize("width", [1280, 400])
def test_a_browser_shows_the_pages_without_complaint(chromium, made, page, tmp_path, width):
    other = make_run(tmp_path / ("a-rather-long-name-of-a-run" * 3), [f"class_{k:02d}_{'x' * 40}" for k in range(77)])
    pages = [made / "report.html", write_report(other), compare_reports([made, other], tmp_path / "compare.html")]
    for path in pages:
        tab = chromium.new_page(viewport={"width": width, "height": 800})
        said, asked = [], []
        tab.on("console", lambda message, said=said: said.append(message.text))
        tab.on("pageerror", lambda error, said=said: said.append(str(error)))
        tab.on("dialog", lambda dialog, said=said: (said.append("dialog"), dialog.dismiss()))
        tab.on("request", lambda request, asked=asked: asked.append(request.url))
        tab.goto(path.as_uri())
        assert not said
        assert [url for url in asked if not url.startswith("data:")] == [path.as_uri()]
        assert tab.evaluate("document.documentElement.scrollWidth") <= width
        assert tab.evaluate("document.scripts.length") == 0
        tab.close()
