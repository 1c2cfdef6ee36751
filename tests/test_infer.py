"""The task is found from columns and labels, with the reason; a name in the configuration wins."""

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
def test_columns_say_the_task(task, why, columns, config, capsys):
    assert infer_task(splits(columns, **config)) is TASKS[task]
    said = capsys.readouterr().out
    assert f"task: {task} (" in said and why in said


@pytest.mark.parametrize("kind", [NUMBER, Value("int64"), TEXT])
@pytest.mark.parametrize("name", dict.fromkeys(ROLES["label"].usual_names + ROLES["score"].usual_names))
def test_pairs_with_usual_label_name_are_text_classification(name, kind):
    pairs = {"sentence1": TEXT, "sentence2": TEXT, name: kind}
    assert infer_task(splits(pairs)) is hftl.TextClassification
    assert infer_task(splits({"first": TEXT, "second": TEXT, name: kind}, **PAIR_COLUMNS)) is hftl.TextClassification


def test_pairs_ignore_case_of_names():
    assert infer_task(splits({"Query": TEXT, "Passage": TEXT})) is hftl.TextEmbedding
    assert infer_task(splits({"Sentence1": TEXT, "Sentence2": TEXT, "Score": NUMBER})) is hftl.TextClassification


def test_scores_of_captioned_images_stay_retrieval():
    # image-text tables come with the similarity that some model gave each pair
    columns = {"image": Image(), "caption": TEXT, "similarity": NUMBER}
    assert infer_task(splits(columns)) is TASKS["image_text_retrieval"]


def test_answers_without_starts_are_question_answering():
    columns = {"question": TEXT, "context": TEXT, "answers": TEXT}
    assert infer_task(splits(columns)) is TASKS["question_answering"]
    assert infer_task(splits(columns | {"label": TEXT})) is hftl.TextClassification


USUAL_ROLES = {
    "image_classification": ("image", "label"),
    "semantic_segmentation": ("image", "mask"),
    "object_detection": ("image", "objects"),
    "text_classification": ("text", "label"),
    "token_classification": ("words", "tags"),
    "question_answering": ("question", "context", "answers"),
    "image_text_classification": ("image", "text", "label"),
    "image_text_retrieval": ("image", "captions", "match"),
}


def usual_cells():
    """Yields task and columns by role, so that each role of each task has each of its usual names once at least."""
    for task, roles in USUAL_ROLES.items():
        usual = {role: ROLES[role].usual_names for role in roles}
        for number in range(max(map(len, usual.values()))):
            yield task, {role: names[number % len(names)] for role, names in usual.items()}
    for pair in TEXT_PAIRS:
        yield "text_embedding", dict(zip(("question", "context"), pair, strict=True))


def test_auto_task_accepts_every_usual_name(image_run, tiny_bert):
    run = replace(image_run(batch_size_per_device=2), task="auto")
    both = replace(run, model=replace(run.model, text_name=tiny_bert))
    texts = replace(run, model=replace(run.model, name=tiny_bert))
    wrong = []
    for task, names in usual_cells():
        expected = {task}
        if names.get("match") == "label":  # a usual name of labels too
            expected = {"image_text_classification", "image_classification"}
        model = both if task.startswith("image_text") else run if "image" in names else texts
        try:
            found = hftl.setup_run(model, rows=tiny_rows(names))[2].name
        except HftlError as error:
            found = error.problems[0]
        if found not in expected:
            wrong.append((task, names, found))
    assert not wrong, "\n".join(map(str, wrong))


def test_every_task_can_be_found():
    parameters = test_columns_say_the_task.pytestmark[0].args[1]
    assert {task for task, *_ in parameters} == set(TASKS)


def test_neither_images_nor_texts_is_an_error_that_says_both():
    with pytest.raises(DataError) as refused:
        infer_task(splits({"height": NUMBER, "label": TEXT}))
    assert any("data.image_column" in problem for problem in refused.value.problems)
    assert any("data.text_column" in problem for problem in refused.value.problems)


def test_the_name_in_the_configuration_wins_and_is_checked(image_run):
    run, _, task = hftl.setup_run(image_run("test_vit"))
    assert task.name == run.task == "image_classification"
    with pytest.raises(ConfigError, match="Did you mean 'image_classification'"):
        hftl.setup_run(replace(image_run("test_vit"), task="image_clasification"))
    with pytest.raises(ConfigError, match="this recipe is for image_classification"):
        hftl.setup_run(replace(image_run("test_vit"), task="object_detection"), hftl.ImageClassification)
    with pytest.raises(ConfigError, match="data.text_column"):
        hftl.setup_run(replace(image_run("test_vit"), task="text_classification"))
    assert RunConfig().task == "auto"


def test_the_recipe_for_any_task_trains(text_run, tmp_path):
    run = text_run("full", num_epochs=1)
    metrics = load_recipe("auto").main(replace(run, output_dir=str(tmp_path / "run")))
    assert "test/accuracy" in metrics
    assert "task: text_classification" in (tmp_path / "run" / "config.yaml").read_text()
