"""Token classification: metrics against seqeval, labels and loss per word, logs of tag schemes, early errors."""

import random
import warnings
from dataclasses import replace

import pytest
import torch
from window_data import write_tagged

import hftl
from hftl.errors import ConfigError, DataError
from hftl.run.testing import check_task
from hftl.tasks.targets.tagging.bio_tags import TagScheme
from hftl.tasks.targets.tagging.metrics import EntityMetrics

BIO = ["O", "B-a", "I-a", "B-b", "I-b", "B-c-d", "I-c-d"]
IOBES = ["O", *(f"{prefix}-{kind}" for prefix in "BIES" for kind in "ab")]


@pytest.fixture(scope="module")
def tagged(tmp_path_factory):
    return write_tagged(tmp_path_factory.mktemp("tagged"))


@pytest.fixture
def tag_run(tagged, text_run):
    def make(method="full", **train):
        return replace(text_run(method, **train), data=hftl.DataConfig(source=str(tagged)))

    return make


def make_splits(*rows, column="tags"):
    """Returns train and validation with the same rows (words, tags)."""
    table = [{"tokens": words, column: tags} for words, tags in rows]
    return {"train": table, "validation": table}


def setup_rows(run, rows, **data):
    data = {"source": "given"} | data
    run = replace(run, data=hftl.DataConfig(**data), train=replace(run.train, batch_size_per_device=1))
    return hftl.setup_run(run, hftl.TokenClassification, rows)


@pytest.mark.parametrize("tags", [BIO, IOBES], ids=["BIO", "IOBES"])
def test_entity_metrics_match_seqeval(tags):
    """Random tag sequences, in one accumulator and in three merged accumulators of different sizes."""
    from seqeval.metrics import accuracy_score
    from seqeval.metrics.sequence_labeling import get_entities, precision_recall_fscore_support

    rng, scheme = random.Random(0), TagScheme.from_tags(tags)
    for _ in range(60):
        true = [[rng.randrange(len(tags)) for _ in range(rng.randint(1, 12))] for _ in range(rng.randint(3, 8))]
        predicted = [[tag if rng.random() < 0.6 else rng.randrange(len(tags)) for tag in row] for row in true]
        single, metrics = EntityMetrics(tags, None), [EntityMetrics(tags, None) for _ in range(3)]
        for row, pair in enumerate(zip(true, predicted, strict=True)):
            single.add(*pair)
            metrics[0 if row < 4 else row % 2 + 1].add(*pair)
        metrics[0].merge(metrics[1])
        metrics[0].merge(metrics[2])
        values = single.compute()
        assert metrics[0].compute() == values
        names = [[[tags[tag_id] for tag_id in row] for row in rows] for rows in (true, predicted)]
        for row, row_tags in zip(true, names[0], strict=True):
            assert [(e.type, e.first, e.end - 1) for e in scheme.entities(row)] == get_entities(row_tags)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for average, prefix in (("micro", ""), ("macro", "macro_")):
                scores = precision_recall_fscore_support(*names, average=average, zero_division=0)
                for name, score in zip(("precision", "recall", "f1"), scores, strict=False):
                    assert values[prefix + name] == pytest.approx(score, abs=1e-9), (average, name)
            per_type = precision_recall_fscore_support(*names, average=None, zero_division=0)
        present = [name for name in scheme.types if single.num_true[name] or single.num_predicted[name]]
        assert [values[f"{name}_f1"] for name in present] == pytest.approx(per_type[2].tolist(), abs=1e-9)
        assert values["accuracy"] == pytest.approx(accuracy_score(*names), abs=1e-9)


def test_tag_scheme_without_prefix_returns_runs_or_words():
    entities = TagScheme.from_tags(["O", "PER", "LOC"]).entities([1, 1, 0, 2, 1])
    assert [(e.type, e.first, e.end) for e in entities] == [("PER", 0, 2), ("LOC", 3, 4), ("PER", 4, 5)]
    entities = TagScheme.from_tags(["NOUN", "VERB"]).entities([0, 0, 1])
    assert [(e.first, e.end) for e in entities] == [(0, 1), (1, 2), (2, 3)]
    assert EntityMetrics(["O"], None).compute()["f1"] == 0.0


def test_check_task_accepts_token_classification(tag_run):
    run, splits, task = hftl.setup_run(tag_run(), hftl.TokenClassification)
    assert max(len(row["tokens"]) for row in splits["train"]) > 62  # one row has several windows
    check_task(task, splits, run)


def test_tagging_loss_averages_one_label_per_word(tag_run, tiny_bert):
    run, splits, task = hftl.setup_run(tag_run(), hftl.TokenClassification)
    model = hftl.build_model(run, task.head).eval()
    rows = task.encode(splits["train"], model.processor, None, 40)
    batch = task.collate(rows.fetch([0, 1, 2, 5], 0))
    assert batch["labels"].shape == batch["inputs"]["input_ids"].shape and batch["labels"].shape[1] > 2
    counts = (batch["labels"] != -100).sum((1, 2)).tolist()
    assert counts == [len(row) for row in batch["tags"]] == [len(splits["train"][i]["tokens"]) for i in (0, 1, 2, 5)]
    with torch.no_grad():
        outputs = model(batch["inputs"])
    losses = task.loss(outputs, batch)
    for row in range(4):
        labeled = batch["labels"][row] != -100
        expected = torch.nn.functional.cross_entropy(outputs["logits"][row][labeled], batch["labels"][row][labeled])
        torch.testing.assert_close(losses[row], expected)


def test_tag_formats_return_equal_tag_ids(tag_run):
    """ClassLabel numbers in another order, names, and whitespace-separated strings are equivalent."""
    from datasets import ClassLabel, Dataset, Features, List, Value

    words, tags = ["my", "dog", "bread"], ["O", "B-animal", "B-food"]
    _, _, task = setup_rows(tag_run(), make_splits((words, tags), (words, tags)))
    assert task.target.tags == ["O", "B-animal", "B-food"]
    order = ["B-food", "B-animal", "O"]
    features = Features({"tokens": List(Value("string")), "tags": List(ClassLabel(names=order))})
    numbered = Dataset.from_dict({"tokens": [words], "tags": [[2, 1, 0]]}, features=features)
    texts = Dataset.from_dict({"tokens": [" ".join(words)], "tags": [" ".join(tags)]})
    for rows in (numbered, texts, Dataset.from_dict({"tokens": [words], "tags": [tags]})):
        assert task.target.numbered(rows)["tags"][0] == [0, 1, 2]
    with pytest.raises(DataError, match=r"unknown tag.*'B-tool'.*Tags of the model: O, B-animal, B-food"):
        task.target.numbered(Dataset.from_dict({"tokens": [words], "tags": [["O", "B-tool", "O"]]}))


def test_setup_accepts_whitespace_separated_words(tag_run):
    rows = [{"text": "my dog eats bread", "tags": "O B-animal O B-food"}] * 8
    run = replace(tag_run(), data=hftl.DataConfig(source="rows", text_column="text", label_column="tags"))
    _, splits, task = hftl.setup_run(run, hftl.TokenClassification, rows={"train": rows, "validation": rows})
    assert task.target.tags == ["O", "B-animal", "B-food"]


def test_tag_scheme_reads_bmes_entities():
    scheme = TagScheme.from_tags(["O", "B-a", "M-a", "E-a", "S-a"])
    entities = scheme.entities([0, 1, 2, 2, 3, 4, 0])
    assert scheme.types == ("a",) and [(e.first, e.end) for e in entities] == [(1, 5), (5, 6)]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([(["my", "dog"], ["O", "B-a"]), (["my", "cat"], ["O"])], r"row 1: unequal numbers of words and tags: 2 and 1"),
        ([(["my", "dog"], ["O", "B-a"]), ([], [])], r"column 'tokens' has 1 row\(s\) without words, at row 1"),
        ([(["my", "dog"], ["O", "B-a"]), (["my"], None)], r"no tags"),
        ([(["my", "dog"], ["O", "O"]), (["my"], ["O"])], r"only one tag \('O'\)"),
    ],
)
def test_setup_with_invalid_tags_raises(rows, message, tag_run):
    with pytest.raises(ConfigError, match=message):
        setup_rows(tag_run(), make_splits(*rows))


def test_unknown_tag_raises_and_unused_tag_is_logged(tag_run, capsys):
    rows = make_splits((["my", "dog"], ["O", "B-a"]), (["cat"], ["I-a"]))
    rows["validation"] = [{"tokens": ["cat"], "tags": ["B-b"]}]
    with pytest.raises(ConfigError, match=r"validation has 1 row\(s\) with invalid tags \(1 x unknown tag\)"):
        setup_rows(tag_run(), rows)
    from datasets import ClassLabel, Dataset, Features, List, Value

    features = Features({"tokens": List(Value("string")), "ner_tags": List(ClassLabel(names=["O", "B-a", "I-a"]))})
    table = Dataset.from_dict({"tokens": [["my", "dog"]] * 2, "ner_tags": [[0, 1]] * 2}, features=features)
    setup_rows(tag_run(), {"train": table, "validation": table})
    assert "tags without training words, which the model does not learn: I-a" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("tags", "message"),
    [
        (["O", "I-a", "I-a", "B-b", "I-a"], "2 training word(s) have I- (or M-, E-, L-) without an entity"),
        (["I-a", "I-a", "B-a", "O", "I-b"], "tags are IOB1"),
        (["B-a", "E-a", "O", "S-b", "O"], "tags are IOBES; 2 entity types: a, b"),
        (["PER", "PER", "O", "LOC", "O"], "tags have no prefix"),
    ],
)
def test_setup_logs_tag_scheme(tags, message, tag_run, capsys):
    """Invalid transitions are counted and logged, since the conlleval rule decodes them."""
    setup_rows(tag_run(), make_splits((["my", "dog", "cat", "a", "b"], tags)))
    assert message in capsys.readouterr().out


def test_invalid_tag_rows_are_skipped(tag_run):
    valid = (["my", "dog"], ["O", "B-a"])
    invalid = [(["my", "cat"], ["O"]), ([], []), (["my"], [None])]
    rows = make_splits(*[valid] * 9, *invalid)
    run, splits, _ = setup_rows(tag_run(), rows, on_error="skip", max_skipped_fraction=0.3)
    assert [len(rows) for rows in splits.values()] == [9, 9]
    reasons = sorted(row["reason"] for row in run.quarantine if row["split"] == "train")
    assert reasons == ["no tags", "no words", "unequal numbers of words and tags: 2 and 1"]


@pytest.mark.parametrize("entities", [[{"type": "a", "score": 0.5}], []])
def test_table_writer_accepts_initially_empty_lists(entities, tmp_path):
    """The type of a list column follows from the first non-empty list, if there is any."""
    import pyarrow.parquet as pq

    from hftl.evaluation.evaluate import TableWriter

    rows = [{"row": number, "entities": entities if number > 20_000 else []} for number in range(20_004)]
    with TableWriter(tmp_path / "rows.parquet") as writer:
        for number in range(0, len(rows), 5001):
            writer.write(rows[number : number + 5001])
    assert pq.read_table(tmp_path / "rows.parquet").to_pylist() == rows
