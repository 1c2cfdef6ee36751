"""Data sources, column detection, tokenization and image rows; references: timm, transformers and the tokenizer."""

import csv
import json
import random
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, Value
from PIL import Image as PILImage
from PIL import ImageOps

from hftl.config.schema import AugmentConfig, DataConfig, ModelConfig, RunConfig
from hftl.data.columns import find_column, find_text_columns
from hftl.data.source import load_splits
from hftl.errors import DataError
from hftl.loading.loader import Share, make_loader, train_batches
from hftl.preprocessing.image_transforms import ImageProcessor, ImageRows
from hftl.preprocessing.tokenization import tokenize
from hftl.tasks.registry import ImageClassification, TextClassification

ROWS = [{"text": f"row {number}", "label": "abc"[number % 3]} for number in range(30)]


def draw(file: Path, size=(20, 12), mode="RGB", seed=0) -> Path:
    """Writes an image of random pixels."""
    file.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    PILImage.fromarray(pixels).convert(mode).save(file)
    return file


def write(file: Path, rows: list[dict]) -> Path:
    """Writes a table in the format of the file's ending."""
    file.parent.mkdir(parents=True, exist_ok=True)
    if file.suffix == ".parquet":
        Dataset.from_list(rows).to_parquet(file)
    elif file.suffix in (".csv", ".tsv"):
        with file.open("w", newline="") as opened:
            table = csv.DictWriter(opened, rows[0], delimiter="\t" if file.suffix == ".tsv" else ",")
            table.writeheader()
            table.writerows(rows)
    elif file.suffix == ".jsonl":
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        file.write_text(json.dumps(rows))
    return file


def load(source, **options):
    return load_splits(DataConfig(source=str(source), **{"validation_fraction": 0.0} | options))


def image_paths(rows) -> list[str]:
    return [value["path"] for value in rows.cast_column("image", Image(decode=False))["image"]]


# Sources


@pytest.mark.parametrize("name", ["val", "valid", "dev", "validation", "Validation"])
def test_load_splits_accepts_usual_validation_names(name, tmp_path):
    for split in ("train", name, "test"):
        for label in ("cat", "dog"):
            draw(tmp_path / "images" / split / label / "0.png")
        write(tmp_path / "tables" / f"{split}.csv", ROWS[:3])
    assert list(load(tmp_path / "tables")) == ["train", "validation", "test"]
    splits = load(tmp_path / "images")
    assert list(splits) == ["train", "validation", "test"]
    assert all(rows.features["label"].names == ["cat", "dog"] and len(rows) == 2 for rows in splits.values())


@pytest.mark.parametrize("lone", ["train", "val", "test"])
def test_class_folders_share_indices_over_splits(lone, tmp_path):
    for split in ("train", "val", "test"):
        for label in ("cat", "dog") if split != lone else ("dog",):
            draw(tmp_path / split / label / "0.png")
    for rows in load(tmp_path).values():
        assert rows.features["label"].names == ["cat", "dog"]
        assert rows["label"][:] == [["cat", "dog"].index(Path(path).parent.name) for path in image_paths(rows)]


def test_flat_image_folder_returns_no_labels(tmp_path):
    draw(tmp_path / "train" / "0.png")
    draw(tmp_path / "train" / "1.png")
    assert load(tmp_path)["train"].column_names == ["image"]


def test_metadata_labels_override_folders(tmp_path):
    for number in range(2):
        draw(tmp_path / "train" / "all" / f"{number}.png")
    write(tmp_path / "train" / "metadata.csv", [{"file_name": f"all/{n}.png", "label": "xy"[n]} for n in range(2)])
    assert load(tmp_path)["train"]["label"][:] == ["x", "y"]


def test_class_folders_without_splits_return_training_rows(tmp_path):
    for number, label in enumerate(["cat", "dog", "dog"]):
        draw(tmp_path / label / f"{number}.png")
    rows = load(tmp_path)["train"]
    assert [rows.features["label"].names[value] for value in rows["label"]] == ["cat", "dog", "dog"]


def test_load_splits_logs_ignored_files_and_folders(tmp_path, capsys):
    for split in ("train", "train_old", "extra"):
        draw(tmp_path / "images" / split / "cat" / "0.png")
        draw(tmp_path / "images" / split / "dog" / "0.png")
    (tmp_path / "images" / "sample_submission.csv").write_text("a,b\n1,2\n")
    rows = load(tmp_path / "images")["train"]
    assert {Path(path).parts[-3] for path in image_paths(rows)} == {"train"}
    printed = capsys.readouterr().out
    assert "'train_old' is ignored" in printed and "'extra' is ignored" in printed
    write(tmp_path / "tables" / "train.csv", ROWS)
    write(tmp_path / "tables" / "notes.csv", ROWS)
    assert len(load(tmp_path / "tables")["train"]) == len(ROWS)
    assert "'notes.csv' is ignored" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["csv", "tsv", "parquet", "jsonl", "json"])
def test_table_formats_return_equal_rows(kind, tmp_path):
    for split, rows in (("train", ROWS[:9]), ("dev", ROWS[9:12]), ("test", ROWS[12:15])):
        write(tmp_path / "tables" / f"{split}.{kind}", rows)
    splits = load(tmp_path / "tables")
    assert [rows.to_list() for rows in splits.values()] == [ROWS[:9], ROWS[9:12], ROWS[12:15]]
    single = load(tmp_path / "tables" / f"train.{kind}")
    assert list(single) == ["train"] and single["train"].to_list() == ROWS[:9]
    single = write(tmp_path / "single" / f"anything.{kind}", ROWS[:9])
    assert load(single.parent)["train"].to_list() == ROWS[:9]


def test_shards_are_concatenated(tmp_path):
    write(tmp_path / "train-00000-of-00002.parquet", ROWS[:5])
    write(tmp_path / "train-00001-of-00002.parquet", ROWS[5:9])
    assert load(tmp_path)["train"].to_list() == ROWS[:9]


def test_csv_null_words_are_text_and_empty_cells_missing(tmp_path):
    words = ["None", "NA", "null", "n/a", "nan", "NULL"]
    rows = [{"text": word, "label": word} for word in words] + [{"text": "", "label": ""}]
    for kind in ("csv", "tsv"):
        train = load(write(tmp_path / f"train.{kind}", rows))["train"]
        assert train["text"][:] == train["label"][:] == [*words, None]


def test_paths_with_glob_characters_are_literal(tmp_path):
    file = write(tmp_path / "a[1]*" / "train [v2].csv", ROWS)
    assert len(load(file)["train"]) == len(load(file.parent)["train"]) == len(ROWS)
    for label in ("cat", "dog"):
        draw(tmp_path / "im[0]" / label / "0.png")
    assert len(load(tmp_path / "im[0]")["train"]) == 2


def test_saved_dataset_returns_splits_or_training_rows(tmp_path, capsys):
    rows = Dataset.from_list(ROWS)
    DatasetDict(train=rows, dev=rows.select(range(3)), unsupervised=rows).save_to_disk(tmp_path / "dict")
    rows.save_to_disk(tmp_path / "single")
    assert {name: len(split) for name, split in load(tmp_path / "dict").items()} == {"train": 30, "validation": 3}
    assert "'unsupervised' is ignored" in capsys.readouterr().out
    assert load(tmp_path / "single")["train"].to_list() == ROWS


def test_labels_json_names_integer_and_orders_text_labels(tmp_path):
    names = ("zero", "one", "two")
    for content, labels, expected in (
        (names, (2, 0, 2), names),
        (names, ("two", "zero"), names),
        (names, (7, 8), ("7", "8")),  # names without matching labels are ignored
    ):
        folder = tmp_path / str(labels)
        rows = [{"text": "x", "label": label} for label in labels]
        file = write(folder / "train.csv", rows)
        (folder / "labels.json").write_text(json.dumps(content))
        for source in (folder, file):
            task = TextClassification(load(source))
            assert task.head.labels == expected and task.head.num_outputs == len(expected)


@pytest.mark.parametrize("content", ["{}", "[1, 2]", "not json"])
def test_invalid_labels_json_raises(content, tmp_path):
    (tmp_path / "labels.json").write_text(content)
    with pytest.raises(DataError, match=r"labels\.json"):
        load(write(tmp_path / "train.csv", ROWS))


def test_source_without_train_is_valid_for_evaluation(tmp_path):
    write(tmp_path / "test.csv", ROWS)
    with pytest.raises(DataError, match=r"no training rows \(splits found: test\)"):
        load(tmp_path)
    splits = load_splits(DataConfig(source=str(tmp_path)), training=False)
    assert list(splits) == ["test"] and splits["test"].to_list() == ROWS


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("train.csv", "", "is empty"),
        ("train.csv", "text,label\n", "no rows"),
        ("train.csv", 'a,b\n1,"x\n', "EOF inside string"),
        ("train.parquet", "x", "Parquet"),
        ("train.jsonl", "{", "JSON"),
        ("train.xlsx", "x", "allowed: .csv"),
    ],
)
def test_unreadable_table_raises_with_path_and_reason(name, content, message, tmp_path):
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=message) as caught:
        load(tmp_path / name)
    assert str(tmp_path / name) in str(caught.value) and len(caught.value.problems) == 1


def test_tables_without_split_names_raise(tmp_path):
    write(tmp_path / "a.csv", ROWS)
    write(tmp_path / "b.csv", ROWS)
    with pytest.raises(DataError, match=r"a\.csv, b\.csv"):
        load(tmp_path)
    write(tmp_path / "train.csv", ROWS)
    write(tmp_path / "train.jsonl", ROWS)
    with pytest.raises(DataError, match=r"train\.csv, train\.jsonl in .* could each be train"):
        load(tmp_path)


# Columns


STRING, INTEGER = Value("string"), Value("int64")


@pytest.mark.parametrize(
    ("role", "features", "name", "why"),
    [
        ("image", {"photo": Image(), "label": INTEGER}, "photo", "only Image column"),
        ("image", {"a": Image(), "image": Image()}, "image", "by name"),
        ("image", {"image": STRING, "where": Image()}, "where", "only Image column"),
        ("text", {"title": STRING, "Review": STRING, "label": INTEGER}, "Review", "by name"),
        ("text", {"content": STRING, "text": STRING}, "text", "by name"),
        ("text", {"remark": STRING, "stars": INTEGER}, "remark", "only text column"),
        ("label", {"text": STRING, "kind": ClassLabel(2)}, "kind", "only ClassLabel column"),
        ("label", {"text": STRING, "Category": STRING, "id": INTEGER}, "Category", "by name"),
        ("label", {"coarse_label": ClassLabel(2), "fine_label": ClassLabel(9)}, "fine_label", "by name"),
    ],
)
def test_find_column_returns_match_with_reason(role, features, name, why):
    column = find_column(role, Features(features), None)
    assert (column.name, column.why) == (name, why)


@pytest.mark.parametrize(
    ("role", "features"),
    [
        ("text", {"title": STRING, "body": STRING, "label": INTEGER}),
        ("image", {"left": Image(), "right": Image()}),
        ("image", {"front": STRING, "image": STRING}),  # strings, before load_splits converts paths
        ("label", {"text": STRING, "size": INTEGER, "stars": INTEGER}),
        ("label", {"a": ClassLabel(2), "b": ClassLabel(2)}),
    ],
)
def test_find_column_ambiguous_raises_with_columns_and_flag(role, features):
    with pytest.raises(DataError) as caught:
        find_column(role, Features(features), None)
    message = str(caught.value)
    assert f"--data.{role}_column NAME" in message
    for name in features:
        assert name in message


@pytest.mark.parametrize("role", ["image", "text", "label"])
def test_find_column_configured_returns_it_or_suggests(role):
    features = Features({"headline": STRING, "other": STRING, "image": Image(), "label": ClassLabel(2)})
    assert find_column(role, features, "other").why == f"set by data.{role}_column"
    with pytest.raises(DataError) as caught:
        find_column(role, features, "headlines")
    assert f"data.{role}_column: there is no column 'headlines'. Did you mean 'headline'?" in str(caught.value)
    assert "image (Image)" in str(caught.value)


@pytest.mark.parametrize(
    "pair",
    [
        ("sentence1", "sentence2"),
        ("premise", "hypothesis"),
        ("question1", "question2"),
        ("question", "sentence"),
        ("text_a", "text_b"),
        ("query", "passage"),
    ],
)
def test_find_text_columns_returns_usual_pairs_in_order(pair):
    features = Features({"id": INTEGER, pair[1]: STRING, pair[0]: STRING, "label": INTEGER})
    first, second = find_text_columns(features, None, None)
    assert (first.name, second.name) == pair and "pair" in first.why


def test_find_text_columns_configured_returns_no_pair():
    features = Features({"premise": STRING, "hypothesis": STRING})
    assert find_text_columns(features, "premise", None)[1] is None
    first, second = find_text_columns(features, "hypothesis", "premise")
    assert (first.name, second.name) == ("hypothesis", "premise")
    with pytest.raises(DataError, match="text_pair_column.*'premis'.*Did you mean 'premise'"):
        find_text_columns(features, "hypothesis", "premis")


def test_column_choices_are_logged_with_reason(images, texts, tmp_path, capsys):
    ImageClassification(load(images))
    printed = capsys.readouterr().out
    assert "images from column 'image' (only Image column)" in printed
    assert "labels from column 'label' (only ClassLabel column); 3 classes" in printed
    assert "named by the dataset: blue, green, red" in printed
    TextClassification(load(texts))
    printed = capsys.readouterr().out
    assert "texts from column 'text' (by name)" in printed
    assert "labels from column 'label' (by name); 3 classes from train: animal, food, tool" in printed
    assert "train 60, validation 12, test 13 rows" in printed
    rows = [{"premise": "a", "hypothesis": "b", "label": number % 2} for number in range(4)]
    TextClassification(load(write(tmp_path / "nli.csv", rows)))
    printed = capsys.readouterr().out
    assert "'premise' ('premise' and 'hypothesis' are a text pair)" in printed
    assert "second text of each pair" in printed


# Validation split


def write_imbalanced(folder: Path, counts=None) -> Path:
    """Writes shuffled training rows of imbalanced classes, numbered by `id`, and 9 test rows."""
    labels = [label for label, count in (counts or {"a": 60, "b": 29, "c": 11}).items() for _ in range(count)]
    random.Random(1).shuffle(labels)
    write(folder / "train.csv", [{"id": row, "text": "x", "label": label} for row, label in enumerate(labels)])
    write(folder / "test.csv", [{"id": 1000 + row, "text": "y", "label": "abc"[row % 3]} for row in range(9)])
    return folder


@pytest.mark.parametrize("fraction", [0.1, 0.25, 0.5])
def test_validation_split_preserves_class_fractions(fraction, tmp_path):
    source = write_imbalanced(tmp_path)
    original, split = load(source), load(source, validation_fraction=fraction)
    assert list(original) == ["train", "test"] and list(split) == ["train", "validation", "test"]
    assert split["test"].to_list() == original["test"].to_list()
    assert sorted(split["train"]["id"][:] + split["validation"]["id"][:]) == original["train"]["id"][:]
    assert len(split["validation"]) == round(100 * fraction)
    counts = Counter(split["validation"]["label"])
    for label, count in Counter(original["train"]["label"]).items():
        assert abs(counts[label] - count * fraction) <= 1


def test_validation_split_depends_on_data_seed(tmp_path):
    source = write_imbalanced(tmp_path)
    options = {"validation_fraction": 0.2, "max_train_samples_per_class": 5}
    for split in ("train", "validation"):
        first, repeated, changed = (load(source, seed=seed, **options)[split]["id"][:] for seed in (0, 0, 1))
        assert first == repeated != changed


def test_existing_validation_split_is_preserved(texts):
    assert len(load(texts, validation_fraction=0.5)["validation"]) == 12


def test_validation_split_single_row_class_is_random(tmp_path, capsys):
    splits = load(write_imbalanced(tmp_path, {"a": 20, "b": 1}), validation_fraction=0.2)
    assert len(splits["validation"]) == 4 and "at random" in capsys.readouterr().out


def test_validation_split_too_few_rows_raises_with_advice(tmp_path):
    with pytest.raises(DataError, match="data.validation_fraction 0"):
        load(write(tmp_path / "train.csv", ROWS[:1]), validation_fraction=0.1)


@pytest.mark.parametrize("limit", [1, 20, 1000])
def test_max_samples_per_class_preserves_validation(limit, tmp_path):
    source = write_imbalanced(tmp_path)
    full, limited = (
        load(source, validation_fraction=0.2),
        load(source, validation_fraction=0.2, max_train_samples_per_class=limit),
    )
    counts = Counter(full["train"]["label"])
    assert Counter(limited["train"]["label"]) == {label: min(count, limit) for label, count in counts.items()}
    assert set(limited["train"]["id"]) <= set(full["train"]["id"])
    for split in ("validation", "test"):
        assert limited[split]["id"][:] == full[split]["id"][:]


def test_max_samples_per_class_subsets_are_nested(tmp_path):
    """Learning curves over the number of labels need nested subsets."""
    source = write_imbalanced(tmp_path)
    small, medium, large = (set(load(source, max_train_samples_per_class=count)["train"]["id"]) for count in (2, 5, 10))
    assert small < medium < large


@pytest.mark.parametrize("kind", ["csv", "parquet", "jsonl"])
def test_tables_are_memory_mapped(kind, tmp_path):
    rows = [{"text": f"{number} " * 200, "label": number % 3} for number in range(3000)]
    file = write(tmp_path / f"train.{kind}", rows)
    load(file)  # fills the cache
    before = pa.total_allocated_bytes()
    splits = load(file, validation_fraction=0.1, max_train_samples_per_class=500)
    task = TextClassification(splits)
    assert pa.total_allocated_bytes() - before < sum(len(row["text"]) for row in rows) / 10
    assert all(rows.cache_files for rows in splits.values()) and task.head.num_outputs == 3


def test_image_folders_are_not_loaded_into_memory(images):
    before = pa.total_allocated_bytes()
    splits = load(images)
    assert all(rows.cache_files for rows in splits.values())
    assert all(Path(path).is_file() and Path(path).is_relative_to(images) for path in image_paths(splits["train"]))
    assert pa.total_allocated_bytes() - before < 100_000


def test_embedded_digits_are_constant():
    splits, other_seed = (load_splits(DataConfig(source="embedded:digits", seed=seed)) for seed in (0, 1))
    assert {name: len(rows) for name, rows in splits.items()} == {"train": 997, "validation": 200, "test": 600}
    for name, rows in splits.items():
        fractions = np.bincount(rows["label"], minlength=10) / len(rows)
        assert np.abs(fractions - 0.1).max() < 0.01
        assert rows["label"][:] == other_seed[name]["label"][:]
    first = splits["test"][0]["image"]
    assert first.size == (8, 8) and first.mode == "L"
    # the splits are equal for all scikit-learn versions
    assert {name: rows["label"][:10] for name, rows in splits.items()} == DIGITS
    pixels = {name: {np.asarray(image).tobytes() for image in rows["image"]} for name, rows in splits.items()}
    assert len(pixels["test"]) == 600 and not pixels["test"] & (pixels["train"] | pixels["validation"])


DIGITS = {
    "train": [2, 8, 5, 9, 1, 7, 8, 1, 9, 5],
    "validation": [8, 8, 5, 7, 3, 3, 8, 9, 0, 7],
    "test": [5, 4, 7, 9, 2, 8, 5, 9, 7, 4],
}


# Texts


@pytest.fixture(scope="module")
def tokenizer(tiny_bert):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_bert)


def test_tokenize_twice_returns_cached_rows(tokenizer, texts):
    rows = load(texts)["train"]
    first = tokenize(rows, tokenizer, ["text"], 16, ["label"])
    [file] = first.dataset.cache_files
    written = Path(file["filename"]).stat().st_mtime_ns
    tokenizer(["cat dog"], padding="max_length", max_length=9, truncation=True)  # changes the tokenizer's state
    repeated = tokenize(load(texts)["train"], tokenizer, ["text"], 16, ["label"])
    assert repeated.dataset.cache_files == [file] and Path(file["filename"]).stat().st_mtime_ns == written
    assert repeated.fetch([3, 1], 0) == first.fetch([3, 1], 0)
    assert tokenize(rows, tokenizer, ["text"], 8, ["label"]).dataset.cache_files != [file]


def test_tokenize_cache_key_covers_vocabulary(tokenizer, tiny_bert, texts):
    from transformers import AutoTokenizer

    extended = AutoTokenizer.from_pretrained(tiny_bert)
    extended.add_tokens(["the cat"])
    rows = load(texts)["train"]
    first, second = (tokenize(rows, used, ["text"], 16, ["label"]) for used in (tokenizer, extended))
    assert first.dataset.cache_files != second.dataset.cache_files


def test_tokenize_matches_tokenizer(tokenizer, texts):
    rows = load(texts)["train"]
    encoded = tokenize(rows, tokenizer, ["text"], 64, ["label"])
    examples = encoded.fetch(list(range(60)), 0)
    assert [example["input_ids"] for example in examples] == tokenizer(rows["text"][:])["input_ids"]
    assert [len(example["input_ids"]) for example in examples] == encoded.lengths.tolist()
    assert [example["label"] for example in examples] == rows["label"][:]
    assert set(examples[0]) == {"input_ids", "token_type_ids", "label"}


@pytest.mark.parametrize("limit", [4, 9])
def test_tokenize_truncates_and_logs(limit, tokenizer, texts, capsys):
    rows = load(texts)["train"]
    full, truncated = (tokenize(rows, tokenizer, ["text"], size, []) for size in (64, limit))
    assert truncated.lengths.max() == limit < full.lengths.max()
    assert truncated.lengths.tolist() == np.minimum(full.lengths, limit).tolist()
    assert {example["input_ids"][-1] for example in truncated.fetch(range(60), 0)} == {tokenizer.sep_token_id}
    count = int((full.lengths >= limit).sum())
    assert f"{count} of 60 texts reach the limit of {limit} tokens" in capsys.readouterr().out


def test_tokenize_pairs_truncates_longer_text(tokenizer, tmp_path):
    rows = [{"text_a": "cat", "text_b": "dog " * 20, "label": 0}, {"text_a": "cat " * 20, "text_b": "dog", "label": 1}]
    rows = load(write(tmp_path / "train.csv", rows))["train"]
    examples = tokenize(rows, tokenizer, ["text_a", "text_b"], 10, ["label"]).fetch([0, 1], 0)
    cat, dog, sep = tokenizer.convert_tokens_to_ids(["cat", "dog", "[SEP]"])
    ids, type_ids = examples[0]["input_ids"], examples[0]["token_type_ids"]
    assert ids == [tokenizer.cls_token_id, cat, sep, *[dog] * 6, sep] and type_ids == [0] * 3 + [1] * 7
    assert examples[1]["input_ids"] == [tokenizer.cls_token_id, *[cat] * 6, sep, dog, sep]


def test_collate_pads_to_longest_text(tokenizer, texts):
    task = TextClassification(load(texts))
    rows = task.encode(load(texts)["train"], tokenizer, None, None)
    for numbers in ([0, 1, 2], [5], list(range(20))):
        batch = task.collate(rows.fetch(numbers, 0))
        lengths = rows.lengths[numbers]
        assert batch["inputs"]["input_ids"].shape == (len(numbers), lengths.max())
        assert batch["inputs"]["attention_mask"].sum(1).tolist() == lengths.tolist()
        assert (batch["inputs"]["input_ids"] == tokenizer.pad_token_id).sum() == (lengths.max() - lengths).sum()


# Images


SIZES = [((40, 30), "RGB"), ((17, 61), "RGB"), ((32, 32), "L"), ((50, 20), "RGBA"), ((33, 35), "P"), ((5, 5), "RGB")]


@pytest.fixture(scope="module")
def varied_images(tmp_path_factory) -> Path:
    """Images of several sizes and modes."""
    folder = tmp_path_factory.mktemp("varied")
    for number, (size, mode) in enumerate(SIZES):
        draw(folder / "ab"[number % 2] / f"{number}.png", size, mode, number)
    return folder


@pytest.fixture(scope="module")
def processor(tiny_timm) -> ImageProcessor:
    from hftl.models.build import build_model
    from hftl.models.task_model import HeadSpec

    return build_model(RunConfig(model=ModelConfig(tiny_timm["test_resnet"])), HeadSpec("timm", 2)).processor


def pixels(rows, numbers=None, epoch=0):
    return torch.stack([example["pixel_values"] for example in rows.fetch(list(numbers or range(len(rows))), epoch)])


def test_eval_pixels_match_timm_and_transformers(processor, tiny_timm, varied_images):
    import timm
    from timm.data import create_transform, resolve_data_config
    from transformers import AutoImageProcessor

    dataset = load(varied_images)["train"]
    computed = pixels(ImageRows(dataset, "image", processor, None))
    opened = [PILImage.open(path).convert("RGB") for path in image_paths(dataset)]
    name = tiny_timm["test_resnet"]
    config = resolve_data_config(model=timm.create_model(name, pretrained=True))
    transform = create_transform(**config, is_training=False)
    assert torch.equal(computed, torch.stack([transform(image) for image in opened]))
    reference = AutoImageProcessor.from_pretrained(name.removeprefix("local-dir:"))
    assert torch.equal(computed, torch.cat([reference(image, return_tensors="pt")["pixel_values"] for image in opened]))


def test_eval_pixels_ignore_epoch_batch_and_global_rng(processor, varied_images):
    dataset = load(varied_images)["train"]
    first = pixels(ImageRows(dataset, "image", processor, None))
    torch.manual_seed(9)
    random.seed(9)
    other = ImageRows(dataset, "image", processor, None)
    assert torch.equal(first, torch.cat([pixels(other, [number], epoch=number) for number in range(len(SIZES))]))


def test_image_rows_apply_exif_orientation(processor, tmp_path):
    original = PILImage.open(draw(tmp_path / "original.png", (40, 30)))
    exif = original.getexif()
    exif[0x0112] = 6
    rotated = tmp_path / "rotated" / "a" / "0.png"
    rotated.parent.mkdir(parents=True)
    original.save(rotated, exif=exif)
    upright = ImageOps.exif_transpose(PILImage.open(rotated))
    assert upright.size == (30, 40)
    computed = pixels(ImageRows(load(tmp_path / "rotated")["train"], "image", processor, None), [0])
    assert torch.equal(computed[0], processor.transform(False)(upright))


def test_training_pixels_depend_on_seed_epoch_and_row(processor, varied_images):
    dataset = load(varied_images)["train"]
    rows = ImageRows(dataset, "image", processor, 3)
    first = pixels(rows)
    random.seed(7)
    np.random.seed(7)
    torch.manual_seed(7)
    one_by_one = torch.cat([pixels(rows, [number]) for number in reversed(range(len(SIZES)))]).flip(0)
    assert torch.equal(first, one_by_one)
    for changed in (pixels(rows, epoch=1), pixels(ImageRows(dataset, "image", processor, 4))):
        assert all(not torch.equal(before, after) for before, after in zip(first, changed, strict=True))


def test_augmentation_preserves_global_rng_state(processor, varied_images):
    def state():
        return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()

    before = state()
    pixels(ImageRows(load(varied_images)["train"], "image", processor, 3))
    assert before == state()


def test_make_loader_any_worker_count_matches(processor, images):
    splits = load(images)
    task = ImageClassification(splits)
    rows = task.encode(splits["train"], processor, 5, None)

    def batches(workers, epoch):
        def keys():
            return train_batches(len(rows), None, Share(0, 1, 8), 5, epoch)

        return list(make_loader(rows, keys, task.collate, device="cpu", num_workers=workers))

    def by_row(loaded):
        pairs = [zip(batch["index"].tolist(), batch["inputs"]["pixel_values"], strict=True) for batch in loaded]
        return {row: image for pair in pairs for row, image in pair}

    expected, with_workers, next_epoch = batches(0, 1), batches(2, 1), by_row(batches(0, 2))
    for first, second in zip(expected, with_workers, strict=True):
        assert torch.equal(first["inputs"]["pixel_values"], second["inputs"]["pixel_values"])
        assert all(torch.equal(first[name], second[name]) for name in ("index", "weight", "labels"))
    epoch = by_row(expected)
    assert epoch.keys() == next_epoch.keys() == set(range(36))
    assert not any(torch.equal(epoch[row], next_epoch[row]) for row in epoch)


def test_disabled_augmentation_is_deterministic(processor, images):
    off = AugmentConfig(crop_scale=1.0, hflip=0.0, color_jitter=0.0)
    dataset = load(images)["train"]

    def augmented(augment, epoch):
        return pixels(ImageRows(dataset, "image", replace(processor, augment=augment), 0), range(4), epoch)

    assert torch.equal(augmented(off, 0), augmented(off, 1))
    assert not torch.equal(augmented(replace(off, color_jitter=0.2), 0), augmented(replace(off, color_jitter=0.2), 1))
    assert torch.allclose(augmented(replace(off, hflip=1.0), 0).flip(-1), augmented(off, 0), atol=0.1)


def test_image_truncated_after_loading_raises_with_row(processor, tmp_path):
    file = draw(tmp_path / "a" / "0.png", (200, 200))
    draw(tmp_path / "b" / "0.png")
    dataset = load(tmp_path)["train"]
    file.write_bytes(file.read_bytes()[:5000])  # a valid header with truncated pixels
    with pytest.raises(DataError, match=rf"row 0.*{file}.*cannot be decoded"):
        ImageRows(dataset, "image", processor, None).fetch([1, 0], 0)


def test_single_channel_processor_returns_grayscale(varied_images):
    config = {"input_size": (1, 16, 16), "interpolation": "bilinear", "mean": (0.5,), "std": (0.5,), "crop_pct": 1.0}
    rows = ImageRows(load(varied_images)["train"], "image", ImageProcessor(config, AugmentConfig()), None)
    assert pixels(rows).shape == (len(SIZES), 1, 16, 16)
