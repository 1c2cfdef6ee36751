"""Image-text retrieval: task protocol, captions, invalid data, reloading with transformers, zero-shot labels."""

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
    """Returns a function that builds the configuration of a short run, with `splits` or generated captions."""

    def make(
        method: str = "full",
        splits=None,
        captions: dict | None = None,
        net: str = "test_resnet",
        pair_loss="auto",
        **data,
    ):
        images = tmp_path / "data" / "images"
        splits = splits or {
            split: captioned(images, rows, seed=seed, **(captions or {}))
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
def test_retrieval_passes_check_task(loss, lists, pair_run):
    run, splits, task = hftl.setup_run(pair_run(captions={"lists": lists}, pair_loss=loss), hftl.ImageTextRetrieval)
    check_task(task, splits, run)


def test_encode_samples_one_caption_in_training_only(pair_run):
    run, splits, task = hftl.setup_run(pair_run(captions={"lists": True}), hftl.ImageTextRetrieval)
    model = hftl.build_model(run, task.head)
    captions = splits["train"]["captions"]
    training = task.encode(splits["train"], model.processor, 0, None)
    sampled = [[row["captions"] for row in training.fetch(range(30), epoch)] for epoch in (0, 1, 0)]
    assert sampled[0] == sampled[2] != sampled[1]
    assert all(len(sample) == 1 and sample[0] in texts for sample, texts in zip(sampled[0], captions, strict=True))
    batch = task.collate(task.encode(splits["train"], model.processor, None, None).fetch(range(30), 0))
    assert batch["texts"].tolist() == [len(texts) for texts in captions]
    assert batch["inputs"]["input_ids"].shape[:2] == (30, 3)
    embeddings = model.eval()(batch["inputs"])["text_embeds"]
    single = task.collate([{"captions": [captions[0][-1]], "several": False}])["inputs"]
    expected = model(single)["text_embeds"][0]
    torch.testing.assert_close(embeddings[0, len(captions[0]) - 1], expected, atol=1e-5, rtol=1e-4)


def test_setup_skips_unmatched_pairs(pair_run, capsys):
    run, splits, task = hftl.setup_run(pair_run(captions={"label": True}), hftl.ImageTextRetrieval)
    assert "30 of 60 train rows are pairs ('label' is 1)" in capsys.readouterr().out
    rows = task.encode(splits["train"], hftl.build_model(run, task.head).processor, None, None)
    assert len(rows) == 30 and not any("a red rope" in row["captions"] for row in rows.fetch(range(0, 30, 3), 0))


def test_matching_skips_rows_without_label():
    from datasets import Dataset

    from hftl.preprocessing.captions import find_match, matching

    rows = Dataset.from_dict({"label": [0, 1, None, 1], "caption": list("abcd")})
    assert find_match(rows, None) == "label" and matching(rows, "label")["caption"] == ["b", "d"]


RELOAD = """
import json, sys, torch
from PIL import Image
from transformers import AutoModel, AutoProcessor
folder, files, texts = json.loads(sys.argv[1])
model = AutoModel.from_pretrained(folder, trust_remote_code=True).eval()
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
with torch.no_grad():
    images = model.get_image_features(processor(images=[Image.open(file) for file in files])["pixel_values"])
    inputs = processor(text=texts)
    texts = model.get_text_features(inputs["input_ids"], inputs["attention_mask"])
    scale = model(**inputs).logit_scale
print("RESULT", json.dumps([images.tolist(), texts.tolist(), (scale * images @ texts.T).softmax(-1).tolist()]))
"""


@pytest.mark.parametrize("method", ["frozen", pytest.param("lora", marks=pytest.mark.slow)])
def test_run_reload_matches_embeddings_and_labels(method, pair_run, tmp_path, capsys, run_without_hftl):
    """Recall is above chance; a process without hftl gives equal embeddings and label probabilities."""
    run = pair_run(method, net="test_vit")
    run = replace(run, train=replace(run.train, num_epochs=20 if method == "frozen" else 6))
    metrics = run_undrawn("image_text_retrieval", run)
    assert write_report(Path(run.output_dir)).is_file()
    output = capsys.readouterr().out
    assert ("frozen on cached encoder embeddings" in output) == (method == "frozen")
    assert metrics["validation/mean_recall"] > 0.4
    image_folder = tmp_path / "data" / "images"
    files = sorted(str(file) for file in image_folder.glob("2-*.png"))[:6]
    labels = ["blue", "green", "red"]
    texts = [f"a {label} saw" for label in labels]
    output = run_without_hftl(RELOAD, json.dumps([f"{run.output_dir}/model", files, texts]))
    result = json.loads(output.partition("RESULT ")[2].splitlines()[0])
    images, captions, probabilities = (torch.tensor(values) for values in result)
    model = hftl.load(run.output_dir)
    embeddings = torch.tensor([row["embedding"] for row in model.predict(files)])
    torch.testing.assert_close(embeddings, images, atol=1e-5, rtol=1e-4)
    embeddings = torch.tensor([row["embedding"] for row in model.predict(texts)])
    torch.testing.assert_close(embeddings, captions, atol=1e-5, rtol=1e-4)
    (pair,) = model.predict([(files[0], texts[0])])
    assert pair["similarity"] == pytest.approx(float(images[0] @ captions[0]), abs=1e-5)
    labeled = model.predict(files, labels=labels, template="a {} saw")
    predicted = torch.tensor([row["probabilities"] for row in labeled])
    torch.testing.assert_close(predicted, probabilities, atol=1e-4, rtol=1e-3)
    (single,) = model.predict([(files[0], "any text")], labels=labels, template="a {} saw")
    assert single["prediction"] == labeled[0]["prediction"]
    assert single["probabilities"] == pytest.approx(labeled[0]["probabilities"], abs=1e-6)  # other batch size
    with pytest.raises(DataError, match="Pass images, not texts"):
        model.predict(["a text"], labels=labels)
    assert [row["prediction"] for row in labeled] == [labels[int(row.argmax())] for row in probabilities]
    if method == "frozen":
        # the loss depends on the batch size
        reevaluated = evaluate_saved(run.output_dir, batch_size=run.train.batch_size_per_device)
        test_metrics = {name: value for name, value in metrics.items() if name.startswith("test/")}
        assert reevaluated == pytest.approx(test_metrics)
        _check_commands(run.output_dir, image_folder, files, labeled, capsys)


def _check_commands(run_folder, image_folder, files, labeled, capsys):
    """Checks that `--labels` matches `predict`, and that `--query` sorts images by similarity."""
    capsys.readouterr()
    main(["predict", run_folder, str(image_folder), "--labels", "blue,green,red", "--template", "a {} saw"])
    rows = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    assert rows[0] == ["input", "row", "prediction", "confidence"]
    predictions = {row[0]: row[2] for row in rows[1:]}
    assert [predictions[file] for file in files] == [row["prediction"] for row in labeled]
    main(["predict", run_folder, str(image_folder), "--query", "a red saw"])
    rows = [line.split("\t") for line in capsys.readouterr().out.splitlines()][1:]
    scores = [float(row[-1]) for row in rows]
    assert scores == sorted(scores, reverse=True) and len(rows) == len(list(image_folder.glob("*.png")))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda rows: [*rows, rows[0] | {"image": None}], "unreadable image"),
        (lambda rows: [*rows, rows[0] | {"captions": []}], "empty or missing caption, at pair"),
        (lambda rows: [*rows, rows[0] | {"captions": ["a cat", " "]}], "empty or missing caption"),
        (lambda rows: [*rows, rows[0] | {"captions": None}], "empty or missing caption"),
        (lambda rows: [{"image": row["image"], "number": 1} for row in rows], "no caption column found"),
        (lambda rows: [row | {"label": number % 3} for number, row in enumerate(rows)], "invalid values; allowed: 1"),
    ],
)
def test_setup_rejects_invalid_pairs(change, message, pair_run, tmp_path):
    rows = captioned(tmp_path / "data" / "images", 30, lists=True)
    label = {"label_column": "label"} if "invalid values" in message else {}
    run = pair_run(splits={"train": change(rows)}, **label)
    with pytest.raises(ConfigError, match=message):
        hftl.setup_run(run, hftl.ImageTextRetrieval)


def test_setup_single_test_pair_raises(pair_run, tmp_path):
    rows = captioned(tmp_path / "data" / "images", 31)
    with pytest.raises(ConfigError, match=r"test has 1 pair\(s\)"):
        hftl.setup_run(pair_run(splits={"train": rows[:30], "test": rows[30:]}), hftl.ImageTextRetrieval)


def test_setup_skips_invalid_pairs(pair_run, tmp_path):
    rows = captioned(tmp_path / "data" / "images", 40, lists=True)
    Path(tmp_path / "data" / rows[7]["image"]).write_bytes(b"not an image")
    rows[9]["captions"] = []
    run = pair_run(splits={"train": rows}, on_error="skip")
    run, splits, _ = hftl.setup_run(run, hftl.ImageTextRetrieval)
    assert len(splits["train"]) + len(splits["validation"]) == 38
    assert [row["row"] for row in run.quarantine] == [7, 9]


def test_zero_shot_rejects_invalid_labels_and_tasks(text_run):
    with pytest.raises(DataError, match="lacks {}"):
        hftl.inference.zero_shot.prompts(["a", "b"], "a photo")
    with pytest.raises(DataError, match="at least two distinct"):
        hftl.inference.zero_shot.prompts(["a", "a"], None)
    _, _, task = hftl.setup_run(text_run(), hftl.TextClassification)
    with pytest.raises(DataError, match="the task of this model is text classification"):
        hftl.inference.zero_shot.embed_texts(None, task, ["a"], ["a"], None)
