"""Task detection (`task: auto`) by columns and labels; the reference is the table of usual column names (`ROLES`)."""

from dataclasses import replace

import pytest
from conftest import load_recipe
from datasets import ClassLabel, Dataset, Features, Image, List, Value
from tiny_tables import ANSWERS, NUMBER, TEXT, tiny_rows

import hftl
from hftl.config.schema import DataConfig, RunConfig
from hftl.data.roles import ROLES, TEXT_PAIRS
from hftl.data.splits import Splits
from hftl.errors import ConfigError, DataError, HftlError
from hftl.tasks.auto_task import infer_task
from hftl.tasks.registry import TASKS

BOXES = List({"bbox": List(NUMBER), "category": ClassLabel(names=["a", "b"])})
PAIR_COLUMNS = {"text_column": "first", "text_pair_column": "second"}


def splits(columns, **config):
    rows = Dataset.from_dict({name: [] for name in columns}, features=Features(columns))
    return Splits({"train": rows}, DataConfig(source="here", **config))


@pytest.mark.parametrize(
    ("task", "reason", "columns", "config"),
    [
        ("image_classification", "images", {"image": Image(), "label": ClassLabel(names=["a", "b"])}, {}),
        ("image_classification", "images", {"image": Image(), "label": NUMBER, "photographer": TEXT}, {}),
        ("semantic_segmentation", "'mask' contains a mask", {"image": Image(), "mask": Image()}, {}),
        ("semantic_segmentation", "'areas'", {"image": Image(), "areas": Image()}, {"label_column": "areas"}),
        ("object_detection", "'objects' contains boxes", {"image": Image(), "objects": BOXES}, {}),
        ("object_detection", "'annotations' contains boxes", {"image": Image(), "annotations": BOXES}, {}),
        ("object_detection", "'cars' contains boxes", {"image": Image(), "cars": BOXES}, {"label_column": "cars"}),
        ("semantic_segmentation", "'seg_map' contains", {"image": Image(), "seg_map": Image()}, {}),
        (
            "image_classification",
            "images",
            {"image": Image(), "objects": BOXES, "kind": TEXT},
            {"label_column": "kind"},
        ),
        ("text_classification", "texts in column 'review'", {"review": TEXT, "label": Value("int64")}, {}),
        ("text_classification", "text pairs", {"premise": TEXT, "hypothesis": TEXT, "label": NUMBER}, {}),
        ("text_embedding", "without labels", {"query": TEXT, "passage": TEXT}, {}),
        ("token_classification", "one tag per word", {"tokens": List(TEXT), "ner_tags": List(Value("int64"))}, {}),
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
        ("image_text_retrieval", "'sentences'", {"image": Image(), "sentences": List(TEXT)}, {}),
        ("image_text_retrieval", "'description'", {"image": Image(), "description": TEXT}, {}),
        ("image_text_retrieval", "'Alt_Text'", {"image": Image(), "Alt_Text": TEXT}, {}),
        ("image_classification", "images", {"image": Image(), "description": TEXT, "label": TEXT}, {}),
        ("token_classification", "'tags'", {"sentence": List(TEXT), "tags": List(TEXT)}, {}),
        ("token_classification", "'my_tag'", {"words": List(TEXT), "my_tag": List(TEXT)}, {}),
        ("question_answering", "'passage'", {"query": TEXT, "passage": TEXT, "answers": ANSWERS}, {}),
        ("question_answering", "'spans'", {"question": TEXT, "context": TEXT, "spans": ANSWERS}, {}),
    ],
)
def test_infer_task_returns_task_and_logs_reason(task, reason, columns, config, capsys):
    assert infer_task(splits(columns, **config)) is TASKS[task]
    printed = capsys.readouterr().out
    assert f"task: {task} (" in printed and reason in printed


@pytest.mark.parametrize("feature", [NUMBER, Value("int64"), TEXT])
@pytest.mark.parametrize("name", dict.fromkeys(ROLES["label"].usual_names + ROLES["score"].usual_names))
def test_pairs_with_usual_label_name_are_text_classification(name, feature):
    pairs = {"sentence1": TEXT, "sentence2": TEXT, name: feature}
    assert infer_task(splits(pairs)) is hftl.TextClassification
    pairs = {"first": TEXT, "second": TEXT, name: feature}
    assert infer_task(splits(pairs, **PAIR_COLUMNS)) is hftl.TextClassification


def test_pairs_ignore_case_of_names():
    assert infer_task(splits({"Query": TEXT, "Passage": TEXT})) is hftl.TextEmbedding
    assert infer_task(splits({"Sentence1": TEXT, "Sentence2": TEXT, "Score": NUMBER})) is hftl.TextClassification


def test_captioned_images_with_scores_are_retrieval():
    # public image-text tables contain similarity scores computed by a model
    columns = {"image": Image(), "caption": TEXT, "similarity": NUMBER}
    assert infer_task(splits(columns)) is TASKS["image_text_retrieval"]


def test_answers_without_starts_are_question_answering():
    columns = {"question": TEXT, "context": TEXT, "answers": TEXT}
    assert infer_task(splits(columns)) is TASKS["question_answering"]
    assert infer_task(splits(columns | {"label": TEXT})) is hftl.TextClassification


TASK_ROLES = {
    "image_classification": ("image", "label"),
    "semantic_segmentation": ("image", "mask"),
    "object_detection": ("image", "objects"),
    "text_classification": ("text", "label"),
    "token_classification": ("words", "tags"),
    "question_answering": ("question", "context", "answers"),
    "image_text_classification": ("image", "text", "label"),
    "image_text_retrieval": ("image", "captions", "match"),
}


def usual_names():
    """Yields tasks with column names by role; every usual name of every role of a task occurs at least once."""
    for task, roles in TASK_ROLES.items():
        usual = {role: ROLES[role].usual_names for role in roles}
        for index in range(max(map(len, usual.values()))):
            yield task, {role: names[index % len(names)] for role, names in usual.items()}
    for pair in TEXT_PAIRS:
        yield "text_embedding", dict(zip(("question", "context"), pair, strict=True))


def test_auto_task_accepts_every_usual_name(image_run, tiny_bert):
    image = replace(image_run(batch_size_per_device=2), task="auto")
    image_text = replace(image, model=replace(image.model, text_name=tiny_bert))
    text = replace(image, model=replace(image.model, name=tiny_bert))
    failures = []
    for task, names in usual_names():
        expected = {task}
        if names.get("match") == "label":  # also a usual name of the label role
            expected = {"image_text_classification", "image_classification"}
        run = image_text if task.startswith("image_text") else image if "image" in names else text
        try:
            result = hftl.setup_run(run, rows=tiny_rows(names))[2].name
        except HftlError as error:
            result = error.problems[0]
        if result not in expected:
            failures.append((task, names, result))
    assert not failures, "\n".join(map(str, failures))


def test_infer_task_cases_cover_every_task():
    cases = test_infer_task_returns_task_and_logs_reason.pytestmark[0].args[1]
    assert {task for task, *_ in cases} == set(TASKS)


def test_infer_task_without_image_and_text_raises_both():
    with pytest.raises(DataError) as caught:
        infer_task(splits({"height": NUMBER, "label": TEXT}))
    assert any("data.image_column" in problem for problem in caught.value.problems)
    assert any("data.text_column" in problem for problem in caught.value.problems)


def test_configured_task_overrides_detection_and_is_validated(image_run):
    run, _, task = hftl.setup_run(image_run("test_vit"))
    assert task.name == run.task == "image_classification"
    with pytest.raises(ConfigError, match="Did you mean 'image_classification'"):
        hftl.setup_run(replace(image_run("test_vit"), task="image_clasification"))
    with pytest.raises(ConfigError, match="this recipe is for image_classification"):
        hftl.setup_run(replace(image_run("test_vit"), task="object_detection"), hftl.ImageClassification)
    with pytest.raises(ConfigError, match="data.text_column"):
        hftl.setup_run(replace(image_run("test_vit"), task="text_classification"))
    assert RunConfig().task == "auto"


def test_auto_recipe_trains_detected_task(text_run, tmp_path):
    run = text_run("full", num_epochs=1)
    metrics = load_recipe("auto").main(replace(run, output_dir=str(tmp_path / "run")))
    assert "test/accuracy" in metrics
    assert "task: text_classification" in (tmp_path / "run" / "config.yaml").read_text()
