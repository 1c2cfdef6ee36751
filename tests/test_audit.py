"""`hftl check` and `quick_check`: findings match planted problems, and the data stay unchanged."""

import json
import shutil
from itertools import combinations

import numpy as np
import pytest
from PIL import Image, ImageFilter
from tiny_tables import tiny_rows

from hftl import DataConfig, ImageClassification, TextClassification, check, load_splits, setup_run
from hftl.audit import near_duplicate_images as near_images
from hftl.audit import near_duplicate_texts as near_texts
from hftl.audit.duplicates import Groups
from hftl.audit.finding import Numbering
from hftl.audit.label_errors import confident_joint, likely_wrong, out_of_fold
from hftl.audit.outliers import NEIGHBOR, distances
from hftl.audit.quick_check import quick_check
from hftl.audit.text_normalization import normalize
from hftl.cli.main import main
from hftl.errors import ConfigError, DataError


def write(folder, tables):
    """Writes CSV tables of (text, label) rows by split."""
    folder.mkdir(parents=True, exist_ok=True)
    for split, rows in tables.items():
        lines = [f'"{text}",{label}' for text, label in rows]
        (folder / f"{split}.csv").write_text("\n".join(["text,label", *lines]) + "\n", encoding="utf-8")
    return folder


def addresses(finding):
    return [(entry.split, entry.row) for entry in finding.entries]


def random_texts(count, seed=0, words=12):
    """Returns random texts with almost no common shingles."""
    rng = np.random.default_rng(seed)
    letters = np.array(list("abcdefghijklmnopqrstuvwxyz"))
    return [" ".join("".join(rng.choice(letters, rng.integers(3, 8))) for _ in range(words)) for _ in range(count)]


def photograph(rng, size=(96, 72)):
    """Returns smooth multi-scale color noise: images differ from each other and are invariant under resizing."""
    out = np.zeros((size[1], size[0], 3))
    for scale in (4, 8, 16, 32):
        coarse = rng.integers(0, 255, (scale, scale, 3), dtype=np.uint8)
        out += np.asarray(Image.fromarray(coarse).resize(size, Image.BICUBIC), float) / scale**0.5
    out = (out - out.min()) / (out.max() - out.min())
    return Image.fromarray((out * 255).astype(np.uint8)).filter(ImageFilter.GaussianBlur(0.5))


# Duplicates


@pytest.mark.parametrize(
    "first, second",
    [
        ("What is HTML ?", "what is html?"),
        ("caf\u00e9  noir", "cafe\u0301 noir"),
        ("\uff21\uff22\uff23", "abc"),
        ("it 's \u201cfine\u201d", "it's fine".replace("'", "' ")),
        ("Stra\u00dfe", "STRASSE"),
    ],
)
def test_normalize_equal_texts_returns_equal_strings(first, second):
    assert normalize(first) == normalize(second)


@pytest.mark.parametrize("first, second", [("c", "c++"), (":)", ":("), ("3.5", "35"), ("not good", "good"), ("a", "")])
def test_normalize_preserves_meaningful_differences(first, second):
    assert normalize(first) != normalize(second)


def test_groups_match_dictionary():
    rng = np.random.default_rng(0)
    keys, usable = rng.integers(0, 60, 100).astype(np.uint64), rng.random(100) < 0.8
    expected = {}
    for number in np.flatnonzero(usable).tolist():
        expected.setdefault(int(keys[number]), []).append(number)
    groups = Groups(keys, keys, usable, "")
    assert sorted(group.tolist() for group in groups.groups) == sorted(
        group for group in expected.values() if len(group) > 1
    )
    assert all(groups.first[number] == group[0] for group in expected.values() for number in group)


# Near-duplicates


def test_near_duplicate_texts_match_all_pairs_search():
    rng = np.random.default_rng(0)
    texts = random_texts(150)
    for text in texts[:100]:  # copies with one to three changed characters
        changed = list(text)
        for position in rng.choice(len(text), rng.integers(1, 4), replace=False):
            changed[position] = "x"
        texts.append("".join(changed))
    pairs, truncated = near_texts.candidates(near_texts.band_hashes(texts))
    similar = near_texts.similar_pairs(pairs, lambda positions: [texts[n] for n in positions])
    shingles = [{text[n : n + 5] for n in range(len(text) - 4)} for text in texts]
    similarities = {
        (a, b): len(shingles[a] & shingles[b]) / len(shingles[a] | shingles[b])
        for a, b in combinations(range(len(texts)), 2)
    }
    expected = {pair for pair, similarity in similarities.items() if similarity >= near_texts.SIMILAR}
    detected = {(a, b) for a, b, _ in similar}
    assert not truncated and detected <= expected and len(expected) > 40
    assert len(detected) >= 0.97 * len(expected)  # each pair is a candidate with a probability of at least 0.99
    assert all(abs(similarity - similarities[a, b]) < 1e-12 for a, b, similarity in similar)


def test_band_hashes_support_any_length_and_script():
    texts = ["", "a", "\u65e5\u672c\u8a9e", "\U0001f600" * 9, "\ud800 lone surrogate", "x" * 5000]
    bands = near_texts.band_hashes(texts)
    assert bands.shape == (6, 16)
    assert (near_texts.band_hashes(texts[:3])[2] == bands[2]).all()  # independent of the other texts


def test_candidates_in_large_bucket_are_linear_in_size():
    texts = ["the very same words again and again"] * 2000
    pairs, _ = near_texts.candidates(near_texts.band_hashes(texts))
    assert 1999 <= len(pairs) < 12 * 2000


def changed_copies(image, rng):
    """Returns resized, recompressed and cropped copies of an image, by kind of change."""
    from io import BytesIO

    def jpeg(original, quality):
        file = BytesIO()
        original.save(file, "JPEG", quality=quality)
        return Image.open(BytesIO(file.getvalue())).convert("RGB")

    width, height = image.size
    w, h = round(width * 0.95), round(height * 0.95)
    x, y = int(rng.integers(0, width - w + 1)), int(rng.integers(0, height - h + 1))
    cropped = image.crop((x, y, x + w, y + h))
    return {
        "half size": image.resize((width // 2, height // 2), Image.BICUBIC),
        "larger": image.resize((width * 3 // 2, height * 3 // 2), Image.BICUBIC),
        "quality 50": jpeg(image, 50),
        "quality 90": jpeg(image, 90),
        "cropped": cropped,
        "cropped, smaller, quality 70": jpeg(cropped.resize((w * 3 // 4, h * 3 // 4), Image.BICUBIC), 70),
    }


def test_near_duplicate_images_match_changed_copies():
    rng = np.random.default_rng(0)
    images = [photograph(rng) for _ in range(60)]
    origin = list(range(60))
    for number in range(20):
        for copy in changed_copies(images[number], rng).values():
            images.append(copy)
            origin.append(number)
    hashes = np.stack([near_images.perceptual_hash(image) for image in images])
    pairs, truncated = near_images.close_hashes(hashes)
    correlated = near_images.correlated_images(pairs, lambda position: images[position])
    expected = {(a, b) for a, b in combinations(range(len(images)), 2) if origin[a] == origin[b]}
    detected = {(a, b) for a, b, _ in correlated}
    with_original = {(a, b) for a, b in expected if a < 60}
    assert not truncated and detected <= expected
    assert len(detected & with_original) >= 0.98 * len(with_original)


def test_close_hashes_match_all_pairs_for_any_block_size(monkeypatch):
    hashes = np.random.default_rng(0).integers(0, 256, (90, 16), dtype=np.uint8)
    hashes[45:] = hashes[:45] ^ (np.random.default_rng(1).random((45, 16)) < 0.3)
    bits = np.unpackbits(hashes, axis=1)
    expected = {(a, b) for a, b in combinations(range(90), 2) if (bits[a] != bits[b]).sum() <= near_images.DIFFERENT}
    monkeypatch.setattr(near_images, "_BLOCK", 32)
    assert set(map(tuple, near_images.close_hashes(hashes)[0].tolist())) == expected


# Label errors and outliers


def test_confident_joint_matches_paper():
    rng = np.random.default_rng(0)
    probabilities = rng.dirichlet(np.full(4, 0.5), 300)
    codes = rng.integers(0, 4, 300)
    thresholds = [probabilities[codes == k, k].mean() for k in range(4)]
    for row, confident in enumerate(confident_joint(probabilities, codes)):
        above = [k for k in range(4) if probabilities[row, k] >= thresholds[k]]
        assert confident == (max(above, key=lambda k: probabilities[row, k]) if above else -1)


def test_likely_wrong_ranks_planted_label_errors_first():
    rng = np.random.default_rng(0)
    true_codes = rng.integers(0, 3, 600)
    features = rng.normal(0, 1, (600, 20)).astype(np.float32)
    features[np.arange(600), true_codes] += 4
    codes = true_codes.copy()
    planted = rng.choice(600, 30, replace=False)
    codes[planted] = (true_codes[planted] + rng.integers(1, 3, 30)) % 3
    ranked = likely_wrong(out_of_fold(features, codes, np.arange(600)), codes)
    assert np.isin(ranked[:30], planted).mean() >= 0.9
    assert len(ranked) < 60


def test_out_of_fold_keeps_duplicates_in_one_fold():
    """Features are noise: a probe can predict a row only if it was fitted to its duplicate."""
    rng = np.random.default_rng(0)
    features = rng.normal(0, 1, (60, 1000)).astype(np.float32)
    features = np.concatenate([features, features])
    codes = np.tile(rng.integers(0, 2, 60), 2)
    grouped = out_of_fold(features, codes, np.tile(np.arange(60), 2))
    ungrouped = out_of_fold(features, codes, np.arange(120))
    labels = np.arange(120), codes
    assert grouped[labels].mean() < 0.6 and ungrouped[labels].mean() > 0.62


def test_outlier_distances_match_scikit_learn():
    from sklearn.neighbors import NearestNeighbors

    rows = np.random.default_rng(0).normal(size=(80, 6)).astype(np.float32)
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    expected = NearestNeighbors(n_neighbors=NEIGHBOR).fit(unit).kneighbors()[0][:, -1]  # excludes the row itself
    assert np.allclose(distances(rows, rows, np.arange(80)), expected, atol=1e-4)


# Check


@pytest.fixture
def planted(tmp_path):
    """Texts with one planted problem of each kind."""
    base = random_texts(60)
    rows = [(text, "ab"[n % 2]) for n, text in enumerate(base)]
    train = [
        *rows[:40],
        (rows[3][0].upper() + " !", "b"),  # 40: duplicate of row 3 with other case and punctuation
        (rows[4][0][:-1] + "q", "a"),  # 41: near-duplicate of row 4
        (rows[5][0], "a"),  # 42: conflicts with row 5 (label b)
        (rows[50][0], "a"),  # 43: duplicate of test row 10
        (rows[41][0], "b"),  # 44: duplicate of validation row 1
        ("  ", "a"),  # 45: empty
        ("<script>alert(1)</script>", "a"),  # 46
        ("<script>alert(1)</script>", "a"),  # 47
    ]
    test = [*rows[40:], (rows[7][0][:-1] + "q", "b")]  # test row 20: near-duplicate of train row 7
    # rows[50] is test row 10; rows[41] is validation row 1 and also in test
    return write(tmp_path / "data", {"train": train, "validation": [rows[0], rows[41]], "test": test})


def test_check_texts_returns_planted_findings(planted, tmp_path):
    result = check(str(planted), output=tmp_path / "out")
    assert addresses(result["leaks"]) == [("test", 1), ("test", 10), ("validation", 0), ("validation", 1)]
    assert addresses(result["duplicates"]) == [("train", 40), ("train", 42), ("train", 47)]
    assert sorted(addresses(result["conflicting_labels"])) == [("train", 5), ("train", 42)]
    assert addresses(result["near_duplicates"]) == [("train", 41)]
    assert result["near_duplicates"].entries[0].other == ("train", 4)
    assert addresses(result["near_leaks"]) == [("test", 20)]
    assert result["near_leaks"].entries[0].other == ("train", 7)
    assert addresses(result["empty"]) == [("train", 45)]
    assert not result["unlabelled"].found and not result["outliers"].checked
    reasons = {entry.row: entry.why for entry in result["duplicates"].entries}
    assert reasons[40] == "duplicate of train row 3" and reasons[47] == "exact copy of train row 46"
    table = json.loads((tmp_path / "out/check.json").read_text())
    assert {finding["name"]: len(finding["rows"]) for finding in table["findings"]} == {
        finding.name: len(finding.entries) for finding in result.findings
    }
    page = result.page.read_text()
    assert "&lt;script&gt;alert" in page and "<script>alert" not in page


def test_check_fix_removes_findings_and_preserves_test(planted, tmp_path):
    before = {file.name: file.read_bytes() for file in planted.iterdir()}
    result = check(str(planted), output=tmp_path / "out", fix=str(tmp_path / "clean"))
    assert {file.name: file.read_bytes() for file in planted.iterdir()} == before
    assert set(result.left_out["train"]) == {0, 5, 40, 42, 43, 44, 45, 47}
    assert set(result.left_out["validation"]) == {1} and not result.left_out["test"]
    config = DataConfig(source=str(tmp_path / "clean"))
    old, new = load_splits(DataConfig(source=str(planted))), load_splits(config)
    assert new["test"]["text"][:] == old["test"]["text"][:]
    remaining = [row for number, row in enumerate(old["train"]["text"][:]) if number not in result.left_out["train"]]
    assert new["train"]["text"][:] == remaining
    again = check(config, output=tmp_path / "again")
    assert not any(again[name].entries for name in ("leaks", "duplicates", "conflicting_labels", "empty"))
    TextClassification(new)  # raises nothing


@pytest.fixture
def planted_images(tmp_path):
    """Class folders of images with one planted problem of each kind."""
    rng = np.random.default_rng(0)
    folder = tmp_path / "images"
    for split, count in {"train": 12, "validation": 2, "test": 4}.items():
        for name in ("cat", "dog"):
            (folder / split / name).mkdir(parents=True)
            for number in range(count):
                photograph(rng).save(folder / split / name / f"{number:02}.png")
    train, test = folder / "train", folder / "test"
    shutil.copy(train / "cat/00.png", train / "cat/20.png")  # row 12: identical file
    Image.open(train / "cat/01.png").save(train / "cat/21.bmp")  # row 13: identical pixels
    shutil.copy(train / "cat/02.png", train / "dog/20.png")  # conflicting label
    shutil.copy(test / "dog/01.png", train / "dog/21.png")  # leak
    Image.open(test / "dog/02.png").save(train / "dog/22.jpg", quality=60)  # near-leak
    (train / "dog/23.png").write_bytes(b"not an image")
    Image.new("RGB", (96, 72), "red").save(train / "dog/24.png")
    Image.open(train / "dog/05.png").convert("L").save(train / "dog/25.png")
    return folder


def test_check_images_returns_and_fixes_planted_findings(planted_images, tmp_path):
    result = check(str(planted_images), output=tmp_path / "out", fix=str(tmp_path / "clean"), fail_on=[])
    rows = load_splits(DataConfig(source=str(planted_images), validation_fraction=0))

    def names(name):
        from datasets import Image as ImageFeature

        stored = {split: part.cast_column("image", ImageFeature(decode=False))["image"] for split, part in rows.items()}
        return {"/".join(stored[s][r]["path"].split("/")[-3:]) for s, r in addresses(result[name])}

    # of cat/01.png and cat/21.bmp the later one
    assert names("duplicates") == {"train/cat/20.png", "train/cat/01.png", "train/dog/20.png"}
    assert names("conflicting_labels") == {"train/cat/02.png", "train/dog/20.png"}
    assert names("leaks") == {"test/dog/01.png"} and names("near_leaks") == {"test/dog/02.png"}
    assert names("unreadable") == {"train/dog/23.png"}
    assert names("outlier_images") == {"train/dog/24.png", "train/dog/25.png"}
    assert names("near_duplicates") == {"train/dog/25.png"}  # gray copy
    assert set(result.failed) == {"unreadable", "leaks", "conflicting_labels"}
    assert "data:image/jpeg" in result.page.read_text()
    clean = load_splits(DataConfig(source=str(tmp_path / "clean"), validation_fraction=0))
    assert {split: len(part) for split, part in clean.items()} == {"train": 26, "validation": 4, "test": 8}
    assert sorted(file.name for file in (tmp_path / "clean/train").iterdir()) == ["cat", "dog"]
    ImageClassification(clean)


@pytest.mark.parametrize(
    "lines, unchecked",
    [
        (
            ["text,score", "one two,0.5", "three four,1.5", "one two,2.5"],
            {"conflicting_labels", "class_imbalance", "unlabelled"},
        ),
        (["text", "one two", "three four", "one two"], {"conflicting_labels", "class_imbalance", "unlabelled"}),
        (["text,label", "one two,a", "three four,a", "one two,a"], set()),
        (["text,label", "one two,a", "three four,", "one two,b"], set()),
    ],
    ids=["regression", "no labels", "one class", "missing label"],
)
def test_check_without_classes_skips_class_findings(lines, unchecked, tmp_path):
    (tmp_path / "train.csv").write_text("\n".join(lines) + "\n")
    config = DataConfig(source=str(tmp_path / "train.csv"), label_column="score" if "score" in lines[0] else None)
    result = check(config, output=tmp_path / "out")
    assert addresses(result["duplicates"]) == [("train", 2)]
    expected = unchecked | {"too_long", "label_errors", "outliers"}
    assert {finding.name for finding in result.findings if not finding.checked} == expected
    is_reported = any("fewer than two classes" in problem for problem in result["class_imbalance"].problems)
    assert is_reported == (lines[0] == "text,label" and not any(line.endswith(",b") for line in lines))


def test_check_with_model_adds_model_findings(texts, tiny_bert, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(texts, data)
    with (data / "train.csv").open("a") as file:
        file.write(f"{'cat ' * 100},animal\n")
    result = check(str(data), tiny_bert, output=tmp_path / "out")
    assert addresses(result["too_long"]) == [("train", 60)] and "102 tokens" in result["too_long"].entries[0].why
    assert result["label_errors"].checked and result["outliers"].checked
    assert all(0 <= (entry.score or 0) < 0.5 for entry in result["label_errors"].entries)


def test_check_with_nan_weights_skips_model_findings_only(images, tiny_timm, tmp_path):
    from pathlib import Path

    from safetensors.torch import load_file, save_file

    folder = tmp_path / "broken"
    shutil.copytree(tiny_timm["test_resnet"].removeprefix("local-dir:"), folder)
    file = next(Path(folder).glob("*.safetensors"))
    save_file({name: tensor * float("nan") for name, tensor in load_file(file).items()}, file)
    result = check(str(images), f"local-dir:{folder}", output=tmp_path / "out")
    assert not result["label_errors"].checked and "NaN" in result["label_errors"].description
    assert result["duplicates"].checked


def test_check_skips_label_errors_of_rare_classes(tmp_path, tiny_bert):
    rows = [(text, "abc"[n % 3]) for n, text in enumerate(random_texts(12, words=3))]
    result = check(str(write(tmp_path / "data", {"train": rows})), tiny_bert, output=tmp_path / "out")
    assert not result["label_errors"].checked and "5 distinct rows" in result["label_errors"].description
    assert not result["outliers"].problems


def test_check_rejects_invalid_arguments(planted, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").touch()
    with pytest.raises(ConfigError, match="Did you mean 'leaks'") as raised:
        check(str(planted), output=tmp_path / "o", fail_on=["leak", "outliers"], fix=str(tmp_path / "full"))
    assert len(raised.value.problems) == 3 and not (tmp_path / "o").exists()
    for data_folder in (planted, planted / "clean"):
        with pytest.raises(ConfigError, match="--fix"):
            check(str(planted), output=tmp_path / "o", fix=str(data_folder))
    with pytest.raises(DataError, match="no text column"):
        (tmp_path / "numbers.csv").write_text("a,b\n1,2\n3,4\n")
        check(str(tmp_path / "numbers.csv"), output=tmp_path / "o")


def test_check_command_exits_with_1_on_named_finding(planted, texts, tmp_path, capsys):
    def status(*arguments):
        with pytest.raises(SystemExit) as raised:
            main(["check", *map(str, arguments), "--output", str(tmp_path / "out")])
        return raised.value.code

    assert status(planted) == 0
    assert status(planted, "--fail_on", "leaks") == 1 == status(planted, "--fail_on")
    assert status(planted, "--fail_on", "outlier_images", "unreadable") == 0
    assert "conflicting_labels  2 rows of train" in capsys.readouterr().out


# Quick check


def test_setup_run_logs_leaks_and_conflicting_labels(planted, text_run, capsys, tmp_path):
    from conftest import with_data

    shutil.copytree(planted, tmp_path / "good")
    lines = (tmp_path / "good/train.csv").read_text().splitlines()
    (tmp_path / "good/train.csv").write_text("\n".join(line for line in lines if '"  "' not in line) + "\n")
    setup_run(with_data(text_run(), source=str(tmp_path / "good")), TextClassification)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("check: ")]
    assert len(lines) == 1
    assert "2 rows of test, 2 rows of validation also in an earlier split" in lines[0]
    assert "2 rows of train with conflicting labels" in lines[0]


def test_quick_check_compares_image_files(planted_images):
    (planted_images / "train/dog/23.png").unlink()
    splits = load_splits(DataConfig(source=str(planted_images)))
    messages = quick_check(splits, ImageClassification(splits))
    assert "1 row of test also in an earlier split" in messages[0]
    assert "2 rows of train with conflicting labels" in messages[0]


def test_quick_check_reads_only_images_of_equal_size(planted_images, tmp_path, monkeypatch):
    from datasets import Dataset, Image

    from hftl.audit import quick_check as module

    rng = np.random.default_rng(0)
    content = [rng.bytes(2_000 + number) for number in range(60)] + [rng.bytes(2_000)]
    rows = Dataset.from_dict({"image": [{"bytes": each, "path": None} for each in content]}).cast_column(
        "image", Image(decode=False)
    )
    hashed, original = [], module.blake2b
    monkeypatch.setattr(
        module, "blake2b", lambda data, **options: hashed.append(len(data)) or original(data, **options)
    )
    keys = module._image_keys({"train": rows}, "image", Numbering({"train": len(rows)}))
    assert hashed == [2_000, 2_000] and len(set(keys.tolist())) == len(rows)
    assert module._file_sizes(rows, "image").tolist() == [len(each) for each in content]


def test_out_of_fold_sample_contains_every_class(monkeypatch):
    from hftl.audit import label_errors as module

    monkeypatch.setattr(module, "FITTED", 200)
    rng = np.random.default_rng(0)
    codes = np.array([0] * 1000 + [1] * 994 + [2] * 6)
    features = (rng.normal(size=(2000, 8)) + 6 * np.eye(8)[codes]).astype(np.float32)
    probabilities = out_of_fold(features, codes, np.arange(2000))
    assert probabilities[np.arange(2000), codes][-6:].min() > 0.3


def test_failed_quick_check_logs_reason_and_run_continues(text_run, monkeypatch, capsys):
    from hftl.audit import quick_check

    monkeypatch.setattr(quick_check, "_leaks", lambda *_: 1 / 0)
    setup_run(text_run(), TextClassification)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("check: ")]
    assert lines == ["check: failed (ZeroDivisionError: division by zero); the run continues without it"]


def test_quick_check_fails_in_one_line_and_skips_custom_tasks(texts):
    splits = load_splits(DataConfig(source=str(texts)))
    task = TextClassification(splits)
    assert quick_check(splits, object()) == []
    task.inputs.columns = ["missing"]
    (message,) = quick_check(splits, task)
    assert message.startswith("failed (") and "missing" in message and "\n" not in message


SECOND_LABELS = {
    "label": "b",
    "tags": ["O", "O", "O", "B-x"],
    "answers": {"text": ["of"], "answer_start": [6]},
    "objects": {"bbox": [[2.0, 2.0, 5.0, 5.0]], "category": ["a"]},
    "mask": Image.fromarray(np.eye(8, dtype=np.uint8)),
    "score": 0.25,
}
"""Conflicting label of the first row, by kind of label."""


@pytest.mark.parametrize(
    ("task", "names"),
    [
        ("text_classification", {"text": "text", "label": "label"}),
        ("text_classification", {"question": "sentence1", "context": "sentence2", "label": "label"}),
        ("text_embedding", {"question": "sentence1", "context": "sentence2", "score": "score"}),
        ("image_classification", {"image": "image", "label": "label"}),
        ("image_text_classification", {"image": "image", "text": "text", "label": "label"}),
        ("semantic_segmentation", {"image": "image", "mask": "mask"}),
        ("object_detection", {"image": "image", "objects": "objects"}),
        ("token_classification", {"words": "tokens", "tags": "ner_tags"}),
        ("question_answering", {"question": "question", "context": "context", "answers": "answers"}),
        ("image_text_retrieval", {"image": "image", "captions": "caption"}),
    ],
)
def test_quick_check_covers_every_kind_of_input(task, names):
    from datasets import concatenate_datasets

    from hftl.data.layouts.in_memory import dataset_from_rows
    from hftl.tasks.registry import TASKS

    sets = tiny_rows(names)
    first, validation = sets["train"].select([0]), sets["validation"]
    conflict = {names[role]: value for role, value in SECOND_LABELS.items() if role in names}
    duplicate = first.map(lambda _: conflict, features=first.features)
    if "captions" in names:  # a second caption of an image is not a conflicting label
        first = duplicate = first.map(lambda _: {"caption": "in other words"}, features=first.features)
    sets["train"] = concatenate_datasets([sets["train"], duplicate])
    sets["validation"] = concatenate_datasets([first, validation])
    splits = load_splits(DataConfig(source="rows"), rows=dataset_from_rows(sets))
    messages = quick_check(splits, TASKS[task](splits))
    assert "1 row of validation also in an earlier split" in messages[0], messages
    has_conflict = "2 rows of train, 1 row of validation with conflicting labels" in messages[0]
    assert has_conflict == bool(conflict), messages


@pytest.mark.parametrize("task", ["token_classification", "question_answering"])
def test_quick_check_compares_positions_in_exact_texts_only(task):
    from hftl.data.layouts.in_memory import dataset_from_rows
    from hftl.tasks.registry import TASKS

    rows = {
        "token_classification": [
            {"tokens": ["He", "said"], "tags": ["O", "B-x"]},
            {"tokens": ["He", "said", "."], "tags": ["O", "B-x", "O"]},
        ],
        "question_answering": [
            {"question": "who", "context": "it is he", "answers": {"text": ["he"], "answer_start": [6]}},
            {"question": "who", "context": "it is, he", "answers": {"text": ["he"], "answer_start": [7]}},
        ],
    }[task]
    splits = load_splits(DataConfig(source="rows"), rows=dataset_from_rows({"train": rows, "validation": rows[:1]}))
    messages = quick_check(splits, TASKS[task](splits))
    assert "1 row of validation also in an earlier split" in messages[0] and "conflicting labels" not in messages[0]


def test_numbering_counts_rows_over_all_splits():
    numbering = Numbering({"train": 3, "validation": 0, "test": 2})
    assert [numbering.address(n) for n in range(5)] == [
        ("train", 0),
        ("train", 1),
        ("train", 2),
        ("test", 0),
        ("test", 1),
    ]
    assert numbering.rows([4, 0]) == {"train": [0], "validation": [], "test": [1]}


# Real data


@pytest.mark.real
@pytest.mark.parametrize("name, exact, normalized", [("trec6", 10, 11), ("sts", 5, 5), ("sst2", 2, 2)])
def test_check_returns_known_leaks_of_real_data(name, exact, normalized, shared, tmp_path):
    """The eleventh of trec6 is `What are the Twin Cities ?`; `What are the twin cities ?` has a different label."""
    leaks = check(str(shared / "text" / name), output=tmp_path / "out")["leaks"]
    entries = [entry for entry in leaks.entries if entry.split == "test" and entry.other and entry.other[0] == "train"]
    assert len(entries) == normalized
    assert sum(entry.why.startswith("exact copy") for entry in entries) == exact
    assert f"{normalized} rows of test in train ({exact} of them" in leaks.summary


@pytest.mark.real
@pytest.mark.slow
@pytest.mark.parametrize("name, own", [("hymenoptera", 0), ("cifar10_slice", 10)])
def test_check_recalls_changed_copies_of_photographs(name, own, shared, capsys):
    """`own`: maximum near-duplicate pairs of the original data; those of CIFAR-10 are visually near-duplicates."""
    measured = benchmark("copies", "--data", str(shared / "image" / name), capsys=capsys)
    assert min(measured["recall"].values()) >= 0.95
    assert measured["own"] <= own and measured["different"] <= 2 * own


@pytest.mark.real
@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", ["text/trec6", "image/cifar10_slice"])
def test_label_errors_rank_changed_labels_first(name, shared, minilm, capsys):
    model = minilm if name.startswith("text") else f"local-dir:{shared / 'weights/mobilenetv2_100'}"
    measured = benchmark("labels", "--data", str(shared / name), "--model", model, "--seeds", "2", capsys=capsys)
    assert min(measured["precision"]) >= 0.6


def benchmark(*arguments, capsys):
    """Runs `python -m benchmarks check` in this process and returns its last line."""
    import sys

    from conftest import ROOT

    sys.path.insert(0, str(ROOT))
    try:
        from benchmarks.check import main as measure
    finally:
        sys.path.pop(0)
    measure(list(arguments))
    return json.loads(capsys.readouterr().out.splitlines()[-1])
