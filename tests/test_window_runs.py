"""Runs of token classification and question answering on windows: saved models, predictions, commands, processes.

References: transformers without hftl for saved models, one process for two.
"""

import json
import random
from dataclasses import replace

import pyarrow.parquet as pq
import pytest
from conftest import load_recipe, run_undrawn
from launch import flags, launch
from window_data import tagged_row, write_questions, write_tagged

import hftl
from hftl.errors import DataError
from hftl.inference.batch_inference import evaluate_saved, predict_to_file
from hftl.reporting import write_report

COMPARE_PREDICTIONS = """
import json, sys, torch, transformers, pyarrow.parquet as pq
def read(run, table):
    rows = [row for row in pq.read_table(run + "/predictions.parquet").to_pylist() if row["split"] == "test"]
    inputs = [json.loads(line) for line in open(table)]
    assert len(rows) == len(inputs)
    return rows, inputs
def compare_tags(run, table):
    rows, inputs = read(run, table)
    pipe = transformers.pipeline("token-classification", run + "/model", ignore_labels=[])
    for row, words in zip(rows, (row["tokens"] for row in inputs)):
        assert row["words"] == words and len(row["tags"]) == len(row["scores"]) == len(words)
        if len(words) > 60:
            continue
        text = " ".join(words)
        starts = {sum(len(word) + 1 for word in words[:number]): number for number in range(len(words))}
        first = {starts[token["start"]]: token for token in pipe(text) if token["start"] in starts}
        assert len(first) == len(words)
        for number, token in first.items():
            assert token["entity"] == row["tags"][number] and abs(token["score"] - row["scores"][number]) < 1e-4
        for entity in row["entities"]:
            assert text[entity["start"] : entity["end"]] == entity["text"]
            assert entity["text"].split() == words[entity["first_word"] : entity["end_word"]]
    print("equal", len(rows), sum(len(row["entities"]) for row in rows))
def compare_answers(run, table):
    rows, inputs = read(run, table)
    card = open(run + "/model/README.md").read()
    code = card.split("## How to use")[1].split("```python")[1].split("```")[0].replace("path/to/model", run + "/model")
    equal = 0
    for row, example in zip(rows, inputs):
        assert example["context"][max(row["start"], 0) : max(row["end"], 0)] == row["answer"]
        if len(example["context"].split()) > 50:
            continue
        names = {}
        exec(code.replace("print", "").replace('"…", "…"', repr((example["question"], example["context"]))), names)
        start, end = (names["offsets"][names[name], side] for side, name in enumerate(("start", "end")))
        assert example["context"][start:end] == row["answer"], (row, example)
        equal += 1
    print("equal", equal, len(rows))
compare_tags(*sys.argv[1:3])
compare_answers(*sys.argv[3:])
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    return {"tags": write_tagged(root / "tags"), "answers": write_questions(root / "answers")}


@pytest.fixture
def window_run(data, text_run, tmp_path):
    def make(kind, method="full", **train):
        run = replace(text_run(method, **train), data=hftl.DataConfig(source=str(data[kind])))
        return replace(run, output_dir=str(tmp_path / kind))

    return make


def test_saved_window_models_match_without_hftl(window_run, data, tmp_path, run_without_hftl):
    """Tags by a transformers pipeline, answers by the code of the model card."""
    tags, answers = window_run("tags", num_epochs=6, lr=3e-3), window_run("answers", num_epochs=8, lr=3e-3)
    metrics = run_undrawn("token_classification", tags)
    assert metrics["test/f1"] > 0.5 and {"test/animal_f1", "test/macro_f1", "test/accuracy"} <= set(metrics)
    metrics = run_undrawn("question_answering", answers)
    assert 0.5 < metrics["test/exact_match"] <= metrics["test/f1"] <= 1
    for kind in ("tags", "answers"):
        verified = json.loads((tmp_path / kind / "report.json").read_text())["verified"]
        assert set(verified) == {"model/transformers"}
    tables = [str(data[kind] / "test.jsonl") for kind in ("tags", "answers")]
    printed = run_without_hftl(COMPARE_PREDICTIONS, tags.output_dir, tables[0], answers.output_dir, tables[1])
    first, second = (line.split() for line in printed.splitlines() if line.startswith("equal "))
    assert first[:2] == ["equal", "9"] and int(first[2]) > 0 and int(second[1]) >= 8

    predictor = hftl.load(tags.output_dir)
    row = predictor.predict("my dog\teats  bread")[0]
    assert row["words"] == ["my", "dog", "eats", "bread"] and row["tags"][1] == "B-animal"
    assert [(e["text"], e["start"]) for e in row["entities"] if e["type"] == "animal"] == [("dog", 3)]
    assert [row["tags"] for row in predictor.predict([["my", "dog", "eats", "bread"]])] == [row["tags"]]
    long = tagged_row(random.Random(5), 150)["tokens"]
    predictions = predictor.predict([{"tokens": long}, {"tokens": ["cat"]}])
    assert predictions[0]["words"] == long and len(predictions[0]["tags"]) == 150
    assert predictions[1]["tags"] == ["B-animal"]
    prediction = hftl.load(answers.output_dir).predict([("my a", "the " * 90 + "cat " + "a " * 90)])[0]
    assert (prediction["answer"], prediction["start"]) == ("cat", 360)  # in the middle of six windows


def test_commands_support_window_models(window_run, capsys, tmp_path):
    tags, answers = window_run("tags", "lora"), window_run("answers", "frozen")
    metrics = run_undrawn("token_classification", tags)
    evaluated = evaluate_saved(tags.output_dir)
    assert write_report(tmp_path / "tags").is_file()
    for name in ("test/f1", "test/accuracy", "test/loss"):
        assert evaluated[name] == pytest.approx(metrics[name], rel=1e-5)
    out = tmp_path / "out.jsonl"
    predict_to_file(tags.output_dir, "my dog eats bread", output=str(out))
    assert json.loads(out.read_text())["words"] == ["my", "dog", "eats", "bread"]
    card = (tmp_path / "tags/model/README.md").read_text()
    assert "pipeline_tag: token-classification" in card and 'pipeline("token-classification"' in card
    assert "| test/f1 |" in card

    load_recipe("question_answering").main(answers)
    assert "report: not written" not in capsys.readouterr().out and (tmp_path / "answers/report.html").is_file()
    predict_to_file(answers.output_dir, "my a", "the cat the", output=str(out))
    prediction = json.loads(out.read_text())
    assert prediction["answer"] == "the cat the"[prediction["start"] : prediction["end"]] and prediction["candidates"]
    with pytest.raises(DataError, match="a pair of texts: INPUT and --pair"):
        predict_to_file(answers.output_dir, "my a")


def test_check_finds_leaks_of_words_and_of_questions(data, tmp_path, capsys):
    import shutil

    for kind, columns in (("tags", "'tokens'"), ("answers", "'question' and 'context'")):
        folder = tmp_path / kind
        shutil.copytree(data[kind], folder)
        first = (folder / "train.jsonl").read_text().splitlines()[5]
        with (folder / "test.jsonl").open("a") as file:
            file.write(first + "\n")
        findings = hftl.check(str(folder), output=tmp_path / f"check-{kind}")
        assert {(entry.split, entry.row) for entry in findings["leaks"].entries} >= {("test", 9)}
        assert f"texts from column(s) {columns}" in capsys.readouterr().out


@pytest.fixture(scope="module")
def launched(tiny_bert, tmp_path_factory, forks):
    """Runs of both tasks with 1 and 2 processes and constant weights; 7 and 9 held-out rows divide unevenly."""
    root = tmp_path_factory.mktemp("launched")
    sources = {
        "token_classification": write_tagged(root / "tagged"),
        "question_answering": write_questions(root / "asked", answerable=0.6),
    }
    constant = {"train__lr": 0, "train__head_lr": 0, "train__weight_decay": 0, "train__num_epochs": 1}
    for world in (1, 2):
        jobs = []
        for name, source in sources.items():
            out = root / str(world) / name
            settings = {"train__batch_size_per_device": 4, "train__seed": 0, **constant}
            jobs.append(("recipe", {"recipe": name, "flags": flags(source, tiny_bert, out / "run", **settings)}, out))
        launch(world, jobs, forks=forks, logs=root / f"logs{world}")
    return root


@pytest.mark.parametrize("name", ["token_classification", "question_answering"])
def test_two_processes_match_evaluation_of_one(name, launched):
    """Equal metrics and thresholds, and equal predictions in row order."""
    results = []
    for world in (1, 2):
        run = launched / str(world) / name / "run"
        state = json.loads((run / "model/hftl.json").read_text())["state"]
        table = pq.read_table(run / "predictions.parquet").to_pylist()
        results.append((json.loads((run / "metrics.json").read_text()), state, table))
    assert results[0] == results[1]
    assert [row["row"] for row in results[1][2] if row["split"] == "test"] == list(range(9))
