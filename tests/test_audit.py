"""`hftl check`: what it finds is what was planted, and nothing it writes harms the data."""

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
from hftl.audit.outliers import NEIGHBOUR, distances
from hftl.audit.quick_check import quick_check
from hftl.audit.text_normalization import normalise
from hftl.cli.main import main
from hftl.errors import ConfigError, DataError


def write(folder, tables):
    """Writes CSV tables of (text, label) rows by split."""
    folder.mkdir(parents=True, exist_ok=True)
    for split, rows in tables.items():
        lines = [f'"{text}",{label}' for text, label in rows]
        (folder / f"{split}.csv").write_text("\n".join(["text,label", *lines]) + "\n", encoding="utf-8")
    return folder


def places(finding):
    return [(entry.split, entry.row) for entry in finding.entries]


def sentences(count, seed=0, words=12):
    """Texts that share hardly any piece of five characters."""
    rng = np.random.default_rng(seed)
    letters = np.array(list("abcdefghijklmnopqrstuvwxyz"))
    return [" ".join("".join(rng.choice(letters, rng.integers(3, 8))) for _ in range(words)) for _ in range(count)]


def photograph(rng, size=(96, 72)):
    """Smooth noise of many scales in colour: no two are alike, and each looks like itself when it is resized."""
    out = np.zeros((size[1], size[0], 3))
    for scale in (4, 8, 16, 32):
        coarse = rng.integers(0, 255, (scale, scale, 3), dtype=np.uint8)
        out += np.asarray(Image.fromarray(coarse).resize(size, Image.BICUBIC), float) / scale**0.5
    out = (out - out.min()) / (out.max() - out.min())
    return Image.fromarray((out * 255).astype(np.uint8)).filter(ImageFilter.GaussianBlur(0.5))


# what is the same


@pytest.mark.parametrize(
    "one, other",
    [
        ("What is HTML ?", "what is html?"),
        ("caf\u00e9  noir", "cafe\u0301 noir"),
        ("\uff21\uff22\uff23", "abc"),
        ("it 's \u201cfine\u201d", "it's fine".replace("'", "' ")),
        ("Stra\u00dfe", "STRASSE"),
    ],
)
def test_texts_that_a_person_calls_the_same_have_one_form(one, other):
    assert normalise(one) == normalise(other)


@pytest.mark.parametrize("one, other", [("c", "c++"), (":)", ":("), ("3.5", "35"), ("not good", "good"), ("a", "")])
def test_texts_that_mean_different_things_do_not(one, other):
    assert normalise(one) != normalise(other)


def test_groups_are_those_of_a_dictionary():
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


# what is almost the same


def test_near_texts_are_those_that_comparing_all_pairs_finds():
    rng = np.random.default_rng(0)
    texts = sentences(150)
    for text in texts[:100]:  # changed in one to three places
        changed = list(text)
        for place in rng.choice(len(text), rng.integers(1, 4), replace=False):
            changed[place] = "x"
        texts.append("".join(changed))
    pairs, cut = near_texts.candidates(near_texts.band_hashes(texts))
    found = near_texts.similar_pairs(pairs, lambda positions: [texts[n] for n in positions])
    shingles = [{text[n : n + 5] for n in range(len(text) - 4)} for text in texts]
    alike = {
        (a, b): len(shingles[a] & shingles[b]) / len(shingles[a] | shingles[b])
        for a, b in combinations(range(len(texts)), 2)
    }
    true = {pair for pair, similarity in alike.items() if similarity >= near_texts.SIMILAR}
    got = {(a, b) for a, b, _ in found}
    assert not cut and got <= true and len(true) > 40
    assert len(got) >= 0.97 * len(true)  # each pair is a candidate with a probability of 0.99 or more
    assert all(abs(similarity - alike[a, b]) < 1e-12 for a, b, similarity in found)


def test_texts_of_any_length_and_script_can_be_compared():
    texts = ["", "a", "\u65e5\u672c\u8a9e", "\U0001f600" * 9, "\ud800 lone surrogate", "x" * 5000]
    bands = near_texts.band_hashes(texts)
    assert bands.shape == (6, 16)
    assert (near_texts.band_hashes(texts[:3])[2] == bands[2]).all()  # whatever stands beside it


def test_a_bucket_of_many_like_texts_does_not_take_all_pairs():
    texts = ["the very same words again and again"] * 2000
    pairs, _ = near_texts.candidates(near_texts.band_hashes(texts))
    assert 1999 <= len(pairs) < 12 * 2000


def changed(picture, rng):
    """Copies of a picture: smaller, larger, recompressed, cropped, and all of it."""
    from io import BytesIO

    def jpeg(image, quality):
        out = BytesIO()
        image.save(out, "JPEG", quality=quality)
        return Image.open(BytesIO(out.getvalue())).convert("RGB")

    width, height = picture.size
    w, h = round(width * 0.95), round(height * 0.95)
    x, y = int(rng.integers(0, width - w + 1)), int(rng.integers(0, height - h + 1))
    cropped = picture.crop((x, y, x + w, y + h))
    return {
        "half the size": picture.resize((width // 2, height // 2), Image.BICUBIC),
        "larger": picture.resize((width * 3 // 2, height * 3 // 2), Image.BICUBIC),
        "quality 50": jpeg(picture, 50),
        "quality 90": jpeg(picture, 90),
        "cropped": cropped,
        "cropped, smaller, quality 70": jpeg(cropped.resize((w * 3 // 4, h * 3 // 4), Image.BICUBIC), 70),
    }


def test_copies_of_pictures_are_found_and_others_are_not():
    rng = np.random.default_rng(0)
    pictures = [photograph(rng) for _ in range(60)]
    origin = list(range(60))
    for number in range(20):
        for copy in changed(pictures[number], rng).values():
            pictures.append(copy)
            origin.append(number)
    hashes = np.stack([near_images.perceptual_hash(picture) for picture in pictures])
    pairs, cut = near_images.close_hashes(hashes)
    found = near_images.same_pictures(pairs, lambda position: pictures[position])
    true = {(a, b) for a, b in combinations(range(len(pictures)), 2) if origin[a] == origin[b]}
    got = {(a, b) for a, b, _ in found}
    with_original = {(a, b) for a, b in true if a < 60}
    assert not cut and got <= true
    assert len(got & with_original) >= 0.98 * len(with_original)


def test_close_hashes_are_those_of_all_pairs_in_any_number_of_blocks(monkeypatch):
    hashes = np.random.default_rng(0).integers(0, 256, (90, 16), dtype=np.uint8)
    hashes[45:] = hashes[:45] ^ (np.random.default_rng(1).random((45, 16)) < 0.3)
    bits = np.unpackbits(hashes, axis=1)
    true = {(a, b) for a, b in combinations(range(90), 2) if (bits[a] != bits[b]).sum() <= near_images.DIFFERENT}
    monkeypatch.setattr(near_images, "_BLOCK", 32)
    assert set(map(tuple, near_images.close_hashes(hashes)[0].tolist())) == true


# labels and features


def test_confident_joint_is_that_of_the_paper():
    rng = np.random.default_rng(0)
    probabilities = rng.dirichlet(np.full(4, 0.5), 300)
    codes = rng.integers(0, 4, 300)
    thresholds = [probabilities[codes == k, k].mean() for k in range(4)]
    for row, confident in enumerate(confident_joint(probabilities, codes)):
        over = [k for k in range(4) if probabilities[row, k] >= thresholds[k]]
        assert confident == (max(over, key=lambda k: probabilities[row, k]) if over else -1)


def test_planted_label_errors_come_first():
    rng = np.random.default_rng(0)
    true = rng.integers(0, 3, 600)
    features = rng.normal(0, 1, (600, 20)).astype(np.float32)
    features[np.arange(600), true] += 4
    codes = true.copy()
    planted = rng.choice(600, 30, replace=False)
    codes[planted] = (true[planted] + rng.integers(1, 3, 30)) % 3
    ranked = likely_wrong(out_of_fold(features, codes, np.arange(600)), codes)
    assert np.isin(ranked[:30], planted).mean() >= 0.9
    assert len(ranked) < 60


def test_a_row_is_not_predicted_by_its_copy():
    """Features of noise: what a probe knows of a row, it knows from its copy."""
    rng = np.random.default_rng(0)
    features = rng.normal(0, 1, (60, 1000)).astype(np.float32)
    features = np.concatenate([features, features])
    codes = np.tile(rng.integers(0, 2, 60), 2)
    known = out_of_fold(features, codes, np.tile(np.arange(60), 2))
    blind = out_of_fold(features, codes, np.arange(120))
    given = np.arange(120), codes
    assert known[given].mean() < 0.6 and blind[given].mean() > 0.62


def test_distances_are_those_of_scikit_learn():
    from sklearn.neighbors import NearestNeighbors

    rows = np.random.default_rng(0).normal(size=(80, 6)).astype(np.float32)
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    expected = NearestNeighbors(n_neighbors=NEIGHBOUR).fit(unit).kneighbors()[0][:, -1]  # without the row itself
    assert np.allclose(distances(rows, rows, np.arange(80)), expected, atol=1e-4)


# the whole


@pytest.fixture
def planted(tmp_path):
    """Texts with one of everything; the rows by what is wrong with them."""
    base = sentences(60)
    rows = [(text, "ab"[n % 2]) for n, text in enumerate(base)]
    train = [
        *rows[:40],
        (rows[3][0].upper() + " !", "b"),  # 40: a copy but for case and punctuation
        (rows[4][0][:-1] + "q", "a"),  # 41: almost row 4
        (rows[5][0], "a"),  # 42: row 5 says b
        (rows[50][0], "a"),  # 43: test row 10
        (rows[41][0], "b"),  # 44: validation row 1
        ("  ", "a"),  # 45: blank
        ("<script>alert(1)</script>", "a"),  # 46
        ("<script>alert(1)</script>", "a"),  # 47
    ]
    test = [*rows[40:], (rows[7][0][:-1] + "q", "b")]  # test row 20 is almost train row 7
    # test row 10 is rows[50], validation row 1 is rows[41], which test has too
    return write(tmp_path / "data", {"train": train, "validation": [rows[0], rows[41]], "test": test})


def test_what_is_planted_in_texts_is_found(planted, tmp_path):
    found = check(str(planted), output=tmp_path / "out")
    assert places(found["leaks"]) == [("test", 1), ("test", 10), ("validation", 0), ("validation", 1)]
    assert places(found["duplicates"]) == [("train", 40), ("train", 42), ("train", 47)]
    assert sorted(places(found["conflicting_labels"])) == [("train", 5), ("train", 42)]
    assert places(found["near_duplicates"]) == [("train", 41)] and found["near_duplicates"].entries[0].other == (
        "train",
        4,
    )
    assert places(found["near_leaks"]) == [("test", 20)] and found["near_leaks"].entries[0].other == ("train", 7)
    assert places(found["empty"]) == [("train", 45)]
    assert not found["unlabelled"].found and not found["outliers"].looked
    why = next(entry.why for entry in found["duplicates"].entries if entry.row == 40)
    assert "letter by letter" not in why and "train row 3" in why
    table = json.loads((tmp_path / "out/check.json").read_text())
    assert {one["name"]: len(one["rows"]) for one in table["findings"]} == {
        one.name: len(one.entries) for one in found.findings
    }
    page = found.page.read_text()
    assert "&lt;script&gt;alert" in page and "<script>alert" not in page


def test_a_cleaned_copy_has_what_is_left_and_its_test_rows_are_all_there(planted, tmp_path):
    before = {file.name: file.read_bytes() for file in planted.iterdir()}
    found = check(str(planted), output=tmp_path / "out", fix=str(tmp_path / "clean"))
    assert {file.name: file.read_bytes() for file in planted.iterdir()} == before
    assert set(found.left_out["train"]) == {0, 5, 40, 42, 43, 44, 45, 47}
    assert set(found.left_out["validation"]) == {1} and not found.left_out["test"]
    config = DataConfig(source=str(tmp_path / "clean"))
    old, new = load_splits(DataConfig(source=str(planted))), load_splits(config)
    assert new["test"]["text"][:] == old["test"]["text"][:]
    kept = [row for number, row in enumerate(old["train"]["text"][:]) if number not in found.left_out["train"]]
    assert new["train"]["text"][:] == kept
    again = check(config, output=tmp_path / "again")
    assert not any(again[name].entries for name in ("leaks", "duplicates", "conflicting_labels", "empty"))
    TextClassification(new)  # refuses nothing


@pytest.fixture
def planted_images(tmp_path):
    """Class folders of pictures with one of everything."""
    rng = np.random.default_rng(0)
    folder = tmp_path / "pictures"
    for split, count in {"train": 12, "validation": 2, "test": 4}.items():
        for name in ("cat", "dog"):
            (folder / split / name).mkdir(parents=True)
            for number in range(count):
                photograph(rng).save(folder / split / name / f"{number:02}.png")
    train, test = folder / "train", folder / "test"
    shutil.copy(train / "cat/00.png", train / "cat/20.png")  # row 12: the same file
    Image.open(train / "cat/01.png").save(train / "cat/21.bmp")  # row 13: the same pixels
    shutil.copy(train / "cat/02.png", train / "dog/20.png")  # another label
    shutil.copy(test / "dog/01.png", train / "dog/21.png")  # a leak
    Image.open(test / "dog/02.png").save(train / "dog/22.jpg", quality=60)  # nearly one
    (train / "dog/23.png").write_bytes(b"no picture at all")
    Image.new("RGB", (96, 72), "red").save(train / "dog/24.png")
    Image.open(train / "dog/05.png").convert("L").save(train / "dog/25.png")
    return folder


def test_what_is_planted_in_images_is_found_and_mended(planted_images, tmp_path):
    found = check(str(planted_images), output=tmp_path / "out", fix=str(tmp_path / "clean"), fail_on=[])
    rows = load_splits(DataConfig(source=str(planted_images), validation_fraction=0))

    def names(name):
        from datasets import Image as Stored

        stored = {split: part.cast_column("image", Stored(decode=False))["image"] for split, part in rows.items()}
        return {"/".join(stored[s][r]["path"].split("/")[-3:]) for s, r in places(found[name])}

    assert names("duplicates") == {
        "train/cat/20.png",
        "train/cat/01.png",
        "train/dog/20.png",
    }  # of one and 21 the later
    assert names("conflicting_labels") == {"train/cat/02.png", "train/dog/20.png"}
    assert names("leaks") == {"test/dog/01.png"} and names("near_leaks") == {"test/dog/02.png"}
    assert names("unreadable") == {"train/dog/23.png"}
    assert names("outlier_images") == {"train/dog/24.png", "train/dog/25.png"}
    assert names("near_duplicates") == {"train/dog/25.png"}  # a grey copy
    assert set(found.failed) == {"unreadable", "leaks", "conflicting_labels"}
    assert "data:image/jpeg" in found.page.read_text()
    clean = load_splits(DataConfig(source=str(tmp_path / "clean"), validation_fraction=0))
    assert {split: len(part) for split, part in clean.items()} == {"train": 26, "validation": 4, "test": 8}
    assert sorted(file.name for file in (tmp_path / "clean/train").iterdir()) == ["cat", "dog"]
    ImageClassification(clean)


@pytest.mark.parametrize(
    "lines, unseen",
    [
        (
            ["text,score", "one two,0.5", "three four,1.5", "one two,2.5"],
            {"conflicting_labels", "class_imbalance", "unlabelled"},
        ),
        (["text", "one two", "three four", "one two"], {"conflicting_labels", "class_imbalance", "unlabelled"}),
        (["text,label", "one two,a", "three four,a", "one two,a"], set()),
        (["text,label", "one two,a", "three four,", "one two,b"], set()),
    ],
    ids=["real numbers", "no labels", "one class", "a label missing"],
)
def test_data_without_classes_are_checked_for_the_rest(lines, unseen, tmp_path):
    (tmp_path / "train.csv").write_text("\n".join(lines) + "\n")
    config = DataConfig(source=str(tmp_path / "train.csv"), label_column="score" if "score" in lines[0] else None)
    found = check(config, output=tmp_path / "out")
    assert places(found["duplicates"]) == [("train", 2)]
    not_looked = {finding.name for finding in found.findings if not finding.looked}
    assert not_looked == unseen | {"too_long", "label_errors", "outliers"}
    told = any("fewer than two classes" in problem for problem in found["class_imbalance"].problems)
    assert told == (lines[0] == "text,label" and not any(line.endswith(",b") for line in lines))


def test_a_model_looks_for_more(texts, tiny_bert, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(texts, data)
    with (data / "train.csv").open("a") as file:
        file.write(f"{'cat ' * 100},animal\n")
    found = check(str(data), tiny_bert, output=tmp_path / "out")
    assert places(found["too_long"]) == [("train", 60)] and "102 tokens" in found["too_long"].entries[0].why
    assert found["label_errors"].looked and found["outliers"].looked
    assert all(0 <= (entry.score or 0) < 0.5 for entry in found["label_errors"].entries)


def test_a_model_with_broken_weights_costs_only_its_own_findings(images, tiny_timm, tmp_path):
    from pathlib import Path

    from safetensors.torch import load_file, save_file

    folder = tmp_path / "broken"
    shutil.copytree(tiny_timm["test_resnet"].removeprefix("local-dir:"), folder)
    file = next(Path(folder).glob("*.safetensors"))
    save_file({name: tensor * float("nan") for name, tensor in load_file(file).items()}, file)
    found = check(str(images), f"local-dir:{folder}", output=tmp_path / "out")
    assert not found["label_errors"].looked and "NaN" in found["label_errors"].sentence
    assert found["duplicates"].looked


def test_classes_of_few_rows_are_not_judged(tmp_path, tiny_bert):
    rows = [(text, "abc"[n % 3]) for n, text in enumerate(sentences(12, words=3))]
    found = check(str(write(tmp_path / "data", {"train": rows})), tiny_bert, output=tmp_path / "out")
    assert not found["label_errors"].looked and "5 different rows" in found["label_errors"].sentence
    assert not any("far" in problem for problem in found["outliers"].problems)


def test_refusals(planted, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").touch()
    with pytest.raises(ConfigError, match="Did you mean 'leaks'") as raised:
        check(str(planted), output=tmp_path / "o", fail_on=["leak", "outliers"], fix=str(tmp_path / "full"))
    assert len(raised.value.problems) == 3 and not (tmp_path / "o").exists()
    for inside in (planted, planted / "clean"):
        with pytest.raises(ConfigError, match="--fix"):
            check(str(planted), output=tmp_path / "o", fix=str(inside))
    with pytest.raises(DataError, match="no text column"):
        (tmp_path / "numbers.csv").write_text("a,b\n1,2\n3,4\n")
        check(str(tmp_path / "numbers.csv"), output=tmp_path / "o")


def test_exit_status_is_one_where_a_named_finding_is_there(planted, texts, tmp_path, capsys):
    def status(*arguments):
        with pytest.raises(SystemExit) as raised:
            main(["check", *map(str, arguments), "--output", str(tmp_path / "out")])
        return raised.value.code

    assert status(planted) == 0
    assert status(planted, "--fail_on", "leaks") == 1 == status(planted, "--fail_on")
    assert status(planted, "--fail_on", "outlier_images", "unreadable") == 0
    assert "conflicts        2 rows of train" in capsys.readouterr().out


# before every run


def test_a_run_says_in_brief_what_it_shares(planted, text_run, capsys, tmp_path):
    from conftest import with_data

    shutil.copytree(planted, tmp_path / "good")
    lines = (tmp_path / "good/train.csv").read_text().splitlines()
    (tmp_path / "good/train.csv").write_text("\n".join(line for line in lines if '"  "' not in line) + "\n")
    setup_run(with_data(text_run(), source=str(tmp_path / "good")), TextClassification)
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("check: ")]
    assert len(said) == 1
    assert "2 rows of test, 2 rows of validation also stand in an earlier split" in said[0]
    assert "2 rows of train have the same input as another row and another label" in said[0]


def test_in_brief_images_are_the_same_where_their_files_are(planted_images):
    (planted_images / "train/dog/23.png").unlink()
    splits = load_splits(DataConfig(source=str(planted_images)))
    said = quick_check(splits, ImageClassification(splits))
    assert "1 row of test also stand" in said[0] and "2 rows of train have the same input" in said[0]


def test_in_brief_images_inside_of_tables_are_not_all_in_memory(planted_images, tmp_path, monkeypatch):
    from datasets import Dataset, Image

    from hftl.audit import quick_check as module

    rng = np.random.default_rng(0)
    content = [rng.bytes(2_000 + number) for number in range(60)] + [rng.bytes(2_000)]
    rows = Dataset.from_dict({"image": [{"bytes": each, "path": None} for each in content]}).cast_column(
        "image", Image(decode=False)
    )
    read, plain = [], module.blake2b
    monkeypatch.setattr(module, "blake2b", lambda data, **options: read.append(len(data)) or plain(data, **options))
    from hftl.audit.finding import Numbering

    keys = module._image_keys({"train": rows}, "image", Numbering({"train": len(rows)}))
    assert read == [2_000, 2_000] and len(set(keys.tolist())) == len(rows)
    assert module._sizes(rows, "image").tolist() == [len(each) for each in content]


def test_probes_of_few_rows_still_see_every_class(monkeypatch):
    from hftl.audit import label_errors as module

    monkeypatch.setattr(module, "FITTED", 200)
    rng = np.random.default_rng(0)
    codes = np.array([0] * 1000 + [1] * 994 + [2] * 6)
    features = (rng.normal(size=(2000, 8)) + 6 * np.eye(8)[codes]).astype(np.float32)
    known = out_of_fold(features, codes, np.arange(2000))
    assert known[np.arange(2000), codes][-6:].min() > 0.3


def test_failed_quick_check_logs_reason_and_run_continues(text_run, monkeypatch, capsys):
    from hftl.audit import quick_check

    monkeypatch.setattr(quick_check, "_shared", lambda *_: 1 / 0)
    setup_run(text_run(), TextClassification)
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("check: ")]
    assert said == ["check: failed (ZeroDivisionError: division by zero); the run continues without it"]


def test_quick_check_fails_in_one_line_and_skips_custom_tasks(texts):
    splits = load_splits(DataConfig(source=str(texts)))
    task = TextClassification(splits)
    assert quick_check(splits, object()) == []
    task.inputs.columns = ["gone"]
    (said,) = quick_check(splits, task)
    assert said.startswith("failed (") and "gone" in said and "\n" not in said


OTHER = {
    "label": "b",
    "tags": ["O", "O", "O", "B-x"],
    "answers": {"text": ["of"], "answer_start": [6]},
    "objects": {"bbox": [[2.0, 2.0, 5.0, 5.0]], "category": ["a"]},
    "mask": Image.fromarray(np.eye(8, dtype=np.uint8)),
    "score": 0.25,
}
"""A second label for the first row of each kind of label."""


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
    first, held = sets["train"].select([0]), sets["validation"]
    changed = {names[role]: value for role, value in OTHER.items() if role in names}
    again = first.map(lambda _: changed, features=first.features)
    if "captions" in names:  # another caption of an image is neither a contradiction nor another image
        first = again = first.map(lambda _: {"caption": "in other words"}, features=first.features)
    sets["train"] = concatenate_datasets([sets["train"], again])
    sets["validation"] = concatenate_datasets([first, held])
    splits = load_splits(DataConfig(source="rows"), rows=dataset_from_rows(sets))
    said = quick_check(splits, TASKS[task](splits))
    assert "1 row of validation also stand in an earlier split" in said[0], said
    assert ("2 rows of train, 1 row of validation have the same input as another row" in said[0]) == bool(changed), said


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
    said = quick_check(splits, TASKS[task](splits))
    assert "1 row of validation also stand" in said[0] and "another label" not in said[0]


def test_rows_are_numbered_over_all_splits():
    numbering = Numbering({"train": 3, "validation": 0, "test": 2})
    assert [numbering.address(n) for n in range(5)] == [
        ("train", 0),
        ("train", 1),
        ("train", 2),
        ("test", 0),
        ("test", 1),
    ]
    assert numbering.rows([4, 0]) == {"train": [0], "validation": [], "test": [1]}


# real data


@pytest.mark.real
@pytest.mark.parametrize("name, letter_by_letter, normalised", [("trec6", 10, 11), ("sts", 5, 5), ("sst2", 2, 2)])
def test_rows_that_known_data_share_are_found(name, letter_by_letter, normalised, shared, tmp_path):
    """The eleventh of trec6 is `What are the Twin Cities ?`, with another label than `What are the twin cities ?`."""
    found = check(str(shared / "text" / name), output=tmp_path / "out")
    entries = [
        entry for entry in found["leaks"].entries if entry.split == "test" and entry.other and entry.other[0] == "train"
    ]
    assert len(entries) == normalised
    assert sum(entry.why.startswith("letter by letter") for entry in entries) == letter_by_letter
    assert f"{normalised} rows of test in train ({letter_by_letter} of them" in found["leaks"].summary


@pytest.mark.real
@pytest.mark.slow
@pytest.mark.parametrize("name, own", [("hymenoptera", 0), ("cifar10_slice", 10)])
def test_copies_of_photographs_are_found(name, own, shared, capsys):
    """`own`: pairs that the data have themselves, at most; those of CIFAR-10 are near duplicates to the eye."""
    measured = benchmark("copies", "--data", str(shared / "image" / name), capsys=capsys)
    assert min(measured["recall"].values()) >= 0.95
    assert measured["own"] <= own and measured["different"] <= 2 * own


@pytest.mark.real
@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", ["text/trec6", "image/cifar10_slice"])
def test_changed_labels_come_first_in_real_data(name, shared, minilm, capsys):
    model = minilm if name.startswith("text") else f"local-dir:{shared / 'weights/mobilenetv2_100'}"
    measured = benchmark("labels", "--data", str(shared / name), "--model", model, "--seeds", "2", capsys=capsys)
    assert min(measured["precision"]) >= 0.6


def benchmark(*arguments, capsys):
    """Runs `python -m benchmarks check` here and returns its last line."""
    import sys

    from conftest import ROOT

    sys.path.insert(0, str(ROOT))
    try:
        from benchmarks.check import main as measure
    finally:
        sys.path.pop(0)
    measure(list(arguments))
    return json.loads(capsys.readouterr().out.splitlines()[-1])
