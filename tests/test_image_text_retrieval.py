"""Image-text retrieval: the contract, the data it takes and refuses, what opens it elsewhere, labels in words."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import run_undrawn
from pair_data import captioned, write_lines

import hftl
import hftl.inference.zero_shot
from hftl.cli.main import main
from hftl.errors import ConfigError, DataError
from hftl.inference.batch_inference import evaluate_saved
from hftl.reporting import write_report
from hftl.run.testing import check_task


@pytest.fixture
def pair_run(tiny_bert, tiny_timm, tmp_path):
    """Returns a function that makes the configuration of a quick run; rows by split, or images with lists or labels."""

    def make(
        method: str = "full", splits=None, kind: dict | None = None, net: str = "test_resnet", pair_loss="auto", **data
    ):
        pictures = tmp_path / "data" / "images"
        splits = splits or {
            split: captioned(pictures, rows, seed=seed, **(kind or {}))
            for seed, (split, rows) in enumerate({"train": 30, "validation": 9, "test": 11}.items())
        }
        return hftl.RunConfig(
            hftl.DataConfig(source=write_lines(tmp_path / "data", **splits), **data),
            hftl.ModelConfig(name=tiny_timm[net], text_name=tiny_bert, projection_dim=16),
            hftl.AdaptConfig(method=method),
            hftl.TrainConfig(
                num_epochs=1, lr=1e-3, head_lr=1e-2, batch_size_per_device=8, trackers=[], pair_loss=pair_loss
            ),
            output_dir=str(tmp_path / "run"),
        )

    return make


@pytest.mark.parametrize(("loss", "lists"), [("infonce", True), ("siglip", False)])
def test_the_contract(loss, lists, pair_run):
    run, splits, task = hftl.setup_run(pair_run(kind={"lists": lists}, pair_loss=loss), hftl.ImageTextRetrieval)
    check_task(task, splits, run)


def test_of_several_captions_training_draws_one_and_evaluation_takes_all(pair_run):
    run, splits, task = hftl.setup_run(pair_run(kind={"lists": True}), hftl.ImageTextRetrieval)
    model = hftl.build_model(run, task.head)
    given = splits["train"]["captions"]
    training = task.encode(splits["train"], model.processor, 0, None)
    drawn = [[row["captions"] for row in training.fetch(range(30), epoch)] for epoch in (0, 1, 0)]
    assert drawn[0] == drawn[2] != drawn[1]
    assert all(len(one) == 1 and one[0] in texts for one, texts in zip(drawn[0], given, strict=True))
    batch = task.collate(task.encode(splits["train"], model.processor, None, None).fetch(range(30), 0))
    assert batch["texts"].tolist() == [len(texts) for texts in given]
    assert batch["inputs"]["input_ids"].shape[:2] == (30, 3)
    embedded = model.eval()(batch["inputs"])["text_embeds"]
    alone = task.collate([{"captions": [given[0][-1]], "several": False}])["inputs"]
    torch.testing.assert_close(embedded[0, len(given[0]) - 1], model(alone)["text_embeds"][0], atol=1e-5, rtol=1e-4)


def test_rows_that_a_label_calls_no_pairs_are_not_used(pair_run, capsys):
    run, splits, task = hftl.setup_run(pair_run(kind={"label": True}), hftl.ImageTextRetrieval)
    assert "30 of 60 train rows are pairs ('label' 1)" in capsys.readouterr().out
    rows = task.encode(splits["train"], hftl.build_model(run, task.head).processor, None, None)
    assert len(rows) == 30 and not any("a red rope" in row["captions"] for row in rows.fetch(range(0, 30, 3), 0))


def test_rows_that_do_not_say_are_no_pairs():
    from datasets import Dataset

    from hftl.preprocessing.captions import find_match, matching

    rows = Dataset.from_dict({"label": [0, 1, None, 1], "caption": list("abcd")})
    assert find_match(rows, None) == "label" and matching(rows, "label")["caption"] == ["b", "d"]


ELSEWHERE = """
import json, sys, torch
from PIL import Image
from transformers import AutoModel, AutoProcessor
folder, files, texts = json.loads(sys.argv[1])
model = AutoModel.from_pretrained(folder, trust_remote_code=True).eval()
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
with torch.no_grad():
    images = model.get_image_features(processor(images=[Image.open(file) for file in files])["pixel_values"])
    read = processor(text=texts)
    words = model.get_text_features(read["input_ids"], read["attention_mask"])
    scale = model(**read).logit_scale
print("FOUND", json.dumps([images.tolist(), words.tolist(), (scale * images @ words.T).softmax(-1).tolist()]))
"""


@pytest.mark.parametrize("method", ["frozen", pytest.param("lora", marks=pytest.mark.slow)])
def test_a_run_learns_and_opens_elsewhere_and_labels_images(method, pair_run, tmp_path, capsys, run_without_hftl):
    """Colours are learnt above chance; in a process without hftl equal embeddings, and equal shares of labels."""
    run = pair_run(method, net="test_vit")
    run = replace(run, train=replace(run.train, num_epochs=20 if method == "frozen" else 6))
    metrics = run_undrawn("image_text_retrieval", run)
    assert write_report(Path(run.output_dir)).is_file()
    said = capsys.readouterr().out
    assert ("vectors of the encoders, computed once" in said) == (method == "frozen")
    assert metrics["validation/mean_recall"] > 0.4
    pictures = tmp_path / "data" / "images"
    files = sorted(str(file) for file in pictures.glob("2-*.png"))[:6]
    labels = ["blue", "green", "red"]
    texts = [f"a {label} saw" for label in labels]
    out = run_without_hftl(ELSEWHERE, json.dumps([f"{run.output_dir}/model", files, texts]))
    images, words, shares = (torch.tensor(part) for part in json.loads(out.partition("FOUND ")[2].splitlines()[0]))
    model = hftl.load(run.output_dir)
    own = torch.tensor([row["embedding"] for row in model.predict(files)])
    torch.testing.assert_close(own, images, atol=1e-5, rtol=1e-4)
    own = torch.tensor([row["embedding"] for row in model.predict(texts)])
    torch.testing.assert_close(own, words, atol=1e-5, rtol=1e-4)
    (pair,) = model.predict([(files[0], texts[0])])
    assert pair["similarity"] == pytest.approx(float(images[0] @ words[0]), abs=1e-5)
    named = model.predict(files, labels=labels, template="a {} saw")
    torch.testing.assert_close(torch.tensor([row["probabilities"] for row in named]), shares, atol=1e-4, rtol=1e-3)
    (alone,) = model.predict([(files[0], "any text")], labels=labels, template="a {} saw")
    assert alone["prediction"] == named[0]["prediction"]
    assert alone["probabilities"] == pytest.approx(named[0]["probabilities"], abs=1e-6)  # a batch of another size
    with pytest.raises(DataError, match="give images, not texts"):
        model.predict(["a text"], labels=labels)
    assert [row["prediction"] for row in named] == [labels[int(row.argmax())] for row in shares]
    if method == "frozen":
        again = evaluate_saved(run.output_dir, batch_size=run.train.batch_size_per_device)  # its loss is within batches
        assert again == pytest.approx({name: value for name, value in metrics.items() if name.startswith("test/")})
        _check_commands(run.output_dir, pictures, files, named, capsys)


def _check_commands(place, pictures, files, named, capsys):
    """`--labels` gives what `predict` gave, `--query` puts images in the order of their nearness."""
    capsys.readouterr()
    main(["predict", place, str(pictures), "--labels", "blue,green,red", "--template", "a {} saw"])
    rows = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    assert rows[0] == ["input", "row", "prediction", "confidence"]
    found = {row[0]: row[2] for row in rows[1:]}
    assert [found[file] for file in files] == [row["prediction"] for row in named]
    main(["predict", place, str(pictures), "--query", "a red saw"])
    rows = [line.split("\t") for line in capsys.readouterr().out.splitlines()][1:]
    scores = [float(row[-1]) for row in rows]
    assert scores == sorted(scores, reverse=True) and len(rows) == len(list(pictures.glob("*.png")))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda rows: [*rows, rows[0] | {"image": None}], "unreadable image"),
        (lambda rows: [*rows, rows[0] | {"captions": []}], "empty or missing caption, at pair"),
        (lambda rows: [*rows, rows[0] | {"captions": ["a cat", " "]}], "empty or missing caption"),
        (lambda rows: [*rows, rows[0] | {"captions": None}], "empty or missing caption"),
        (lambda rows: [{"image": row["image"], "number": 1} for row in rows], "no column holds captions"),
        (lambda rows: [row | {"label": number % 3} for number, row in enumerate(rows)], "must hold 1"),
    ],
)
def test_bad_pairs_are_refused(change, message, pair_run, tmp_path):
    rows = captioned(tmp_path / "data" / "images", 30, lists=True)
    label = {"label_column": "label"} if "must" in message else {}
    run = pair_run(splits={"train": change(rows)}, **label)
    with pytest.raises(ConfigError, match=message):
        hftl.setup_run(run, hftl.ImageTextRetrieval)


def test_a_single_pair_is_compared_with_nothing(pair_run, tmp_path):
    rows = captioned(tmp_path / "data" / "images", 31)
    with pytest.raises(ConfigError, match=r"test has 1 pair\(s\)"):
        hftl.setup_run(pair_run(splits={"train": rows[:30], "test": rows[30:]}), hftl.ImageTextRetrieval)


def test_bad_pairs_can_be_left_out(pair_run, tmp_path):
    rows = captioned(tmp_path / "data" / "images", 40, lists=True)
    Path(tmp_path / "data" / rows[7]["image"]).write_bytes(b"no image")
    rows[9]["captions"] = []
    run = pair_run(splits={"train": rows}, on_error="skip")
    run, splits, _ = hftl.setup_run(run, hftl.ImageTextRetrieval)
    assert len(splits["train"]) + len(splits["validation"]) == 38
    assert [row["row"] for row in run.quarantine] == [7, 9]


def test_labels_are_for_models_of_images_and_texts(text_run):
    with pytest.raises(DataError, match="lacks {}"):
        hftl.inference.zero_shot.prompts(["a", "b"], "a photo")
    with pytest.raises(DataError, match="at least two distinct"):
        hftl.inference.zero_shot.prompts(["a", "a"], None)
    _, _, task = hftl.setup_run(text_run(), hftl.TextClassification)
    with pytest.raises(DataError, match="the task of this model is text classification"):
        hftl.inference.zero_shot.embed_texts(None, task, ["a"], ["a"], None)
