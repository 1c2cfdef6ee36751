"""Tags of words: seqeval's numbers, one loss a word, what is said, and what is refused."""

import random
import warnings
from dataclasses import replace

import pytest
import torch
from window_data import write_tagged

import hftl
from hftl.errors import ConfigError, DataError
from hftl.run.testing import check_task
from hftl.tasks.targets.tagging.bio_tags import TagReader
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


def rows_of(*rows, column="tags"):
    """Returns splits of rows (words, tags), the same in train and validation."""
    made = [{"tokens": words, column: tags} for words, tags in rows]
    return {"train": made, "validation": made}


def open_rows(run, rows, **data):
    data = {"source": "given"} | data
    run = replace(run, data=hftl.DataConfig(**data), train=replace(run.train, batch_size_per_device=1))
    return hftl.setup_run(run, hftl.TokenClassification, rows)


@pytest.mark.parametrize("tags", [BIO, IOBES], ids=["BIO", "IOBES"])
def test_metrics_equal_seqeval(tags):
    """Random tags in any order, in one accumulator and in three uneven ones that are merged."""
    from seqeval.metrics import accuracy_score
    from seqeval.metrics.sequence_labeling import get_entities, precision_recall_fscore_support

    rng, reader = random.Random(0), TagReader.of(tags)
    for _ in range(60):
        true = [[rng.randrange(len(tags)) for _ in range(rng.randint(1, 12))] for _ in range(rng.randint(3, 8))]
        said = [[tag if rng.random() < 0.6 else rng.randrange(len(tags)) for tag in row] for row in true]
        whole, parts = EntityMetrics(tags, None), [EntityMetrics(tags, None) for _ in range(3)]
        for row, pair in enumerate(zip(true, said, strict=True)):
            whole.add(*pair)
            parts[0 if row < 4 else row % 2 + 1].add(*pair)
        parts[0].merge(parts[1])
        parts[0].merge(parts[2])
        found = whole.compute()
        assert parts[0].compute() == found
        named = [[[tags[number] for number in row] for row in rows] for rows in (true, said)]
        for row, words in zip(true, named[0], strict=True):
            assert [(e.kind, e.first, e.end - 1) for e in reader.entities(row)] == get_entities(words)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for average, prefix in (("micro", ""), ("macro", "macro_")):
                scores = precision_recall_fscore_support(*named, average=average, zero_division=0)
                for name, score in zip(("precision", "recall", "f1"), scores, strict=False):
                    assert found[prefix + name] == pytest.approx(score, abs=1e-9), (average, name)
            each = precision_recall_fscore_support(*named, average=None, zero_division=0)
        present = [kind for kind in reader.kinds if whole.true[kind] or whole.said[kind]]
        assert [found[f"{kind}_f1"] for kind in present] == pytest.approx(each[2].tolist(), abs=1e-9)
        assert found["accuracy"] == pytest.approx(accuracy_score(*named), abs=1e-9)


def test_tags_without_prefix_are_runs_or_single_words():
    entities = TagReader.of(["O", "PER", "LOC"]).entities([1, 1, 0, 2, 1])
    assert [(e.kind, e.first, e.end) for e in entities] == [("PER", 0, 2), ("LOC", 3, 4), ("PER", 4, 5)]
    assert [(e.first, e.end) for e in TagReader.of(["NOUN", "VERB"]).entities([0, 0, 1])] == [(0, 1), (1, 2), (2, 3)]
    assert EntityMetrics(["O"], None).compute()["f1"] == 0.0


def test_the_task_passes_the_contract(tag_run):
    run, splits, task = hftl.setup_run(tag_run(), hftl.TokenClassification)
    assert max(len(row["tokens"]) for row in splits["train"]) > 62  # one row has several windows
    check_task(task, splits, run)


def test_each_word_has_one_label_and_the_loss_is_its_mean(tag_run, tiny_bert):
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
        there = batch["labels"][row] != -100
        alone = torch.nn.functional.cross_entropy(outputs["logits"][row][there], batch["labels"][row][there])
        torch.testing.assert_close(losses[row], alone)


def test_numbers_names_and_texts_of_tags_are_one_thing(tag_run, tmp_path):
    """ClassLabel numbers in another order, names, and texts that blanks part give the same rows to the model."""
    from datasets import ClassLabel, Dataset, Features, List, Value

    words, tags = ["my", "dog", "bread"], ["O", "B-animal", "B-food"]
    _, _, task = open_rows(tag_run(), rows_of((words, tags), (words, tags)))
    assert task.target.tags == ["O", "B-animal", "B-food"]
    order = ["B-food", "B-animal", "O"]
    kinds = Features({"tokens": List(Value("string")), "tags": List(ClassLabel(names=order))})
    numbered = Dataset.from_dict({"tokens": [words], "tags": [[2, 1, 0]]}, features=kinds)
    texts = Dataset.from_dict({"tokens": [" ".join(words)], "tags": [" ".join(tags)]})
    for rows in (numbered, texts, Dataset.from_dict({"tokens": [words], "tags": [tags]})):
        assert task.target.numbered(rows)["tags"][0] == [0, 1, 2]
    with pytest.raises(DataError, match=r"unknown tag.*'B-tool'.*Tags of the model: O, B-animal, B-food"):
        task.target.numbered(Dataset.from_dict({"tokens": [words], "tags": [["O", "B-tool", "O"]]}))


def test_texts_whose_words_blanks_part_are_tagged(tag_run):
    rows = [{"text": "my dog eats bread", "tags": "O B-animal O B-food"}] * 8
    run = replace(tag_run(), data=hftl.DataConfig(source="rows", text_column="text", label_column="tags"))
    _, splits, task = hftl.setup_run(run, hftl.TokenClassification, rows={"train": rows, "validation": rows})
    assert task.target.tags == ["O", "B-animal", "B-food"]


def test_bmes_is_read_as_entities():
    reader = TagReader.of(["O", "B-a", "M-a", "E-a", "S-a"])
    entities = list(reader.entities([0, 1, 2, 2, 3, 4, 0]))
    assert reader.kinds == ("a",) and [(each.first, each.end) for each in entities] == [(1, 5), (5, 6)]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([(["my", "dog"], ["O", "B-a"]), (["my", "cat"], ["O"])], r"row 1: words and tags differ in number: 2 and 1"),
        ([(["my", "dog"], ["O", "B-a"]), ([], [])], r"column 'tokens' has 1 row\(s\) without words, at row 1"),
        ([(["my", "dog"], ["O", "B-a"]), (["my"], None)], r"no tags"),
        ([(["my", "dog"], ["O", "O"]), (["my"], ["O"])], r"only one tag \('O'\)"),
    ],
)
def test_rows_that_cannot_be_used_are_named(rows, message, tag_run):
    with pytest.raises(ConfigError, match=message):
        open_rows(tag_run(), rows_of(*rows))


def test_a_tag_that_train_lacks_is_refused_and_one_that_nobody_uses_is_said(tag_run, capsys):
    rows = rows_of((["my", "dog"], ["O", "B-a"]), (["cat"], ["I-a"]))
    rows["validation"] = [{"tokens": ["cat"], "tags": ["B-b"]}]
    with pytest.raises(ConfigError, match=r"validation has 1 row\(s\) whose tags cannot be used \(1 x unknown tag\)"):
        open_rows(tag_run(), rows)
    from datasets import ClassLabel, Dataset, Features, List, Value

    kinds = Features({"tokens": List(Value("string")), "ner_tags": List(ClassLabel(names=["O", "B-a", "I-a"]))})
    one = Dataset.from_dict({"tokens": [["my", "dog"]] * 2, "ner_tags": [[0, 1]] * 2}, features=kinds)
    open_rows(tag_run(), {"train": one, "validation": one})
    assert "will not learn: I-a" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("tags", "said"),
    [
        (["O", "I-a", "I-a", "B-b", "I-a"], "2 word(s) of train go on with an entity"),
        (["I-a", "I-a", "B-a", "O", "I-b"], "tags are IOB1"),
        (["B-a", "E-a", "O", "S-b", "O"], "tags are IOBES; 2 types of entities: a, b"),
        (["PER", "PER", "O", "LOC", "O"], "tags have no prefix"),
    ],
)
def test_how_tags_are_read_is_said(tags, said, tag_run, capsys):
    """Tags out of order are no error: conlleval's rule reads them, and how many there are is said."""
    open_rows(tag_run(), rows_of((["my", "dog", "cat", "a", "b"], tags)))
    assert said in capsys.readouterr().out


def test_bad_rows_are_left_out_on_request(tag_run, capsys):
    good = (["my", "dog"], ["O", "B-a"])
    bad = [(["my", "cat"], ["O"]), ([], []), (["my"], [None])]
    run, splits, _ = open_rows(tag_run(), rows_of(*[good] * 9, *bad), on_error="skip", max_skipped_fraction=0.3)
    assert [len(rows) for rows in splits.values()] == [9, 9]
    reasons = sorted(row["reason"] for row in run.quarantine if row["split"] == "train")
    assert reasons == ["no tags", "no words", "words and tags differ in number: 2 and 1"]


@pytest.mark.parametrize("later", [[{"type": "a", "score": 0.5}], []])
def test_lists_that_are_empty_at_first_are_written(later, tmp_path):
    """Rows without entities do not say what entities are made of; later ones do, or none ever does."""
    import pyarrow.parquet as pq

    from hftl.evaluation.evaluate import TableWriter

    rows = [{"row": number, "entities": later if number > 20_000 else []} for number in range(20_004)]
    with TableWriter(tmp_path / "rows.parquet") as writer:
        for number in range(0, len(rows), 5001):
            writer.write(rows[number : number + 5001])
    assert pq.read_table(tmp_path / "rows.parquet").to_pylist() == rows
