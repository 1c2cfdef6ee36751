"""The task is found from columns and labels, with the reason; a name in the configuration wins."""

from dataclasses import replace

import pytest
from conftest import load_recipe
from datasets import ClassLabel, Dataset, Features, Image, List, Value

import hftl
from hftl.config.schema import DataConfig, RunConfig
from hftl.data.splits import Splits
from hftl.errors import ConfigError, DataError
from hftl.tasks.auto_task import infer_task
from hftl.tasks.registry import TASKS

TEXT, NUMBER = Value("string"), Value("float64")
BOXES = List({"bbox": List(NUMBER), "category": ClassLabel(names=["a", "b"])})
ANSWERS = {"text": List(TEXT), "answer_start": List(Value("int64"))}


def splits(columns, **config):
    rows = Dataset.from_dict({name: [] for name in columns}, features=Features(columns))
    return Splits({"train": rows}, DataConfig(source="here", **config))


@pytest.mark.parametrize(
    ("task", "why", "columns", "config"),
    [
        ("image_classification", "images", {"image": Image(), "label": ClassLabel(names=["a", "b"])}, {}),
        ("image_classification", "images", {"image": Image(), "label": NUMBER, "photographer": TEXT}, {}),
        ("semantic_segmentation", "'mask' holds an image", {"image": Image(), "mask": Image()}, {}),
        ("semantic_segmentation", "'where'", {"image": Image(), "where": Image()}, {"label_column": "where"}),
        ("object_detection", "'objects' holds boxes", {"image": Image(), "objects": BOXES}, {}),
        ("object_detection", "'annotations' holds boxes", {"image": Image(), "annotations": BOXES}, {}),
        ("object_detection", "'found' holds boxes", {"image": Image(), "found": BOXES}, {"label_column": "found"}),
        ("semantic_segmentation", "'seg_map' holds", {"image": Image(), "seg_map": Image()}, {}),
        (
            "image_classification",
            "images",
            {"image": Image(), "objects": BOXES, "kind": TEXT},
            {"label_column": "kind"},
        ),
        ("text_classification", "texts in column 'review'", {"review": TEXT, "label": Value("int64")}, {}),
        ("text_classification", "pairs of texts", {"premise": TEXT, "hypothesis": TEXT, "label": NUMBER}, {}),
        ("text_embedding", "without labels", {"query": TEXT, "passage": TEXT}, {}),
        ("token_classification", "a tag for each", {"tokens": List(TEXT), "ner_tags": List(Value("int64"))}, {}),
        ("token_classification", "'labels'", {"id": TEXT, "tokens": List(TEXT), "labels": List(TEXT)}, {}),
        ("question_answering", "'answers'", {"question": TEXT, "context": TEXT, "answers": ANSWERS}, {}),
        ("image_text_classification", "column 'text'", {"image": Image(), "text": TEXT, "label": TEXT}, {}),
        (
            "image_text_classification",
            "column 'title'",
            {"image": Image(), "title": TEXT, "label": TEXT},
            {"text_column": "title"},
        ),
        ("image_text_retrieval", "captions", {"image": Image(), "captions": List(TEXT)}, {}),
    ],
)
def test_columns_say_the_task(task, why, columns, config, capsys):
    assert infer_task(splits(columns, **config)) is TASKS[task]
    said = capsys.readouterr().out
    assert f"task: {task} (" in said and why in said


def test_every_task_can_be_found():
    parameters = test_columns_say_the_task.pytestmark[0].args[1]
    assert {task for task, *_ in parameters} == set(TASKS)


def test_neither_images_nor_texts_is_an_error_that_says_both():
    with pytest.raises(DataError) as refused:
        infer_task(splits({"height": NUMBER, "label": TEXT}))
    assert any("data.image_column" in problem for problem in refused.value.problems)
    assert any("data.text_column" in problem for problem in refused.value.problems)


def test_the_name_in_the_configuration_wins_and_is_checked(image_run):
    run, _, task = hftl.prepare(image_run("test_vit"))
    assert task.name == run.task == "image_classification"
    with pytest.raises(ConfigError, match="Did you mean 'image_classification'"):
        hftl.prepare(replace(image_run("test_vit"), task="image_clasification"))
    with pytest.raises(ConfigError, match="this recipe is for image_classification"):
        hftl.prepare(replace(image_run("test_vit"), task="object_detection"), hftl.ImageClassification)
    with pytest.raises(ConfigError, match="data.text_column"):
        hftl.prepare(replace(image_run("test_vit"), task="text_classification"))
    assert RunConfig().task == "auto"


def test_the_recipe_for_any_task_trains(text_run, tmp_path):
    run = text_run("full", num_epochs=1)
    metrics = load_recipe("auto").main(replace(run, output_dir=str(tmp_path / "run")))
    assert "test/accuracy" in metrics
    assert "task: text_classification" in (tmp_path / "run" / "config.yaml").read_text()
