"""Escaping of names with markup, YAML or terminal control sequences in model card, report and terminal output."""

import csv
import io
import re

import pytest
import yaml
from conftest import load_recipe

import hftl
from hftl.config.schema import DataConfig

NAMES = (
    "<script>alert(1)</script>",
    "](javascript:alert(2)) [x",
    "---\nlicense: evil\n---",
    "\x1b]0;owned\x07 | `cell` \u202e",
    '" onload="alert(3)',
)


@pytest.fixture(scope="module")
def hostile_run(texts, tiny_bert, tmp_path_factory):
    """Run folder with hostile classes, texts and columns, and the printed output."""
    from contextlib import redirect_stdout

    root = tmp_path_factory.mktemp("hostile")
    for split, count in {"train": 30, "dev": 10, "test": 20}.items():
        out = io.StringIO()
        table = csv.writer(out)
        table.writerow(["text", "label", NAMES[0]])
        table.writerows([f"the cat {NAMES[n % 5]}", NAMES[n % 5], "x"] for n in range(count))
        (root / f"{split}.csv").write_text(out.getvalue(), newline="")
    run = hftl.RunConfig(
        DataConfig(source=str(root)),
        hftl.ModelConfig(name=tiny_bert),
        train=hftl.TrainConfig(max_steps=1, batch_size_per_device=8, trackers=[]),
        output_dir=str(root / "run"),
    )
    printed = io.StringIO()
    with redirect_stdout(printed):
        load_recipe("text_classification").main(run)
    return root / "run", printed.getvalue()


def test_model_card_escapes_names(hostile_run):
    card = (hostile_run[0] / "model" / "README.md").read_text()
    _, front, body = card.split("---\n", 2)
    assert yaml.safe_load(front).get("license") is None and "hftl" in yaml.safe_load(front)["tags"]
    body = body.partition("<details>")[0]
    assert "\x1b" not in card and "\u202e" not in card
    prose = re.sub("`[^`\\n]*`", "", re.sub(r"```.*?```", "", body, flags=re.DOTALL))  # without code
    assert "<script" not in prose and not re.search(r"(?<!\\)\]\(javascript", prose)
    assert "\n---\n" not in body
    table = body.partition("| class |")[2].partition("\n\n")[0].splitlines()[1:]
    cells = [re.split(r"(?<!\\)\|", line) for line in table]
    assert len(table) == 6 and len({len(row) for row in cells}) == 1


def test_report_escapes_names(hostile_run):
    page = (hostile_run[0] / "report.html").read_text()
    assert "<script>alert" not in page and "\x1b" not in page
    assert not re.search(r"<[a-z]+[^>]* onload=", page) and 'href="javascript:' not in page
    assert "&lt;script&gt;" in page


def test_terminal_output_escapes_control_characters(hostile_run, capsys):
    from hftl.inference.batch_inference import predict_to_file

    folder, run_output = hostile_run
    predict_to_file(str(folder), "the cat")
    for printed in (run_output, capsys.readouterr().out):
        assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e]", printed)
    assert "\\x1b]0;owned\\x07" in run_output


def test_labels_preserve_raw_names(hostile_run):
    assert set(hftl.load(hostile_run[0]).labels) == set(NAMES)
