"""Names that are markup, YAML or commands to a terminal come out as text: in the card, the page and on the screen."""

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
def made(texts, tiny_bert, tmp_path_factory):
    """A run whose classes, texts and columns are hostile, with what it printed."""
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
    said = io.StringIO()
    with redirect_stdout(said):
        load_recipe("text_classification").main(run)
    return root / "run", said.getvalue()


def test_the_card_stays_a_card(made):
    card = (made[0] / "model" / "README.md").read_text()
    _, front, body = card.split("---\n", 2)
    assert yaml.safe_load(front).get("license") is None and "hftl" in yaml.safe_load(front)["tags"]
    body = body.partition("<details>")[0]
    assert "\x1b" not in card and "\u202e" not in card
    prose = re.sub("`[^`\\n]*`", "", re.sub(r"```.*?```", "", body, flags=re.DOTALL))  # code is not markup
    assert "<script" not in prose and not re.search(r"(?<!\\)\]\(javascript", prose)
    assert "\n---\n" not in body
    table = body.partition("| class |")[2].partition("\n\n")[0].splitlines()[1:]
    cells = [re.split(r"(?<!\\)\|", line) for line in table]
    assert len(table) == 6 and len({len(row) for row in cells}) == 1


def test_the_page_runs_nothing(made):
    page = (made[0] / "report.html").read_text()
    assert "<script>alert" not in page and "\x1b" not in page
    assert not re.search(r"<[a-z]+[^>]* onload=", page) and 'href="javascript:' not in page
    assert "&lt;script&gt;" in page


def test_the_screen_is_told_nothing(made, capsys):
    from hftl.inference.batch_inference import predict_to_file

    _, said = made
    predict_to_file(str(made[0]), "the cat")
    for printed in (said, capsys.readouterr().out):
        assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e]", printed)
    assert "\\x1b]0;owned\\x07" in said


def test_predictions_keep_the_names_as_they_are(made):
    assert set(hftl.load(made[0]).labels) == set(NAMES)
