"""Image-text models: missing modalities, adaptation per encoder, reloading with transformers, invalid data."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import ROOT, run_undrawn, with_data
from launch import ENV, flags
from multimodal_data import write_pairs

import hftl
from hftl import AdaptConfig, DataConfig, ModelConfig, RunConfig, TrainConfig
from hftl.adaptation.apply import adapt
from hftl.artifacts.labeled_data import labeled_rows
from hftl.models.build import build_model, open_model
from hftl.models.modeling_image_text import ImageTextConfig, ImageTextDualConfig
from hftl.reporting import write_report
from hftl.reporting.run_record import RunRecord
from hftl.run.testing import check_task

MISSING = {
    "train": {3: {"picture": ""}, 4: {"title": "", "body": ""}, 5: {"price": ""}, 6: {"shop": ""}},
    "test": {1: {"picture": ""}, 2: {"shop": "west"}},
}


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """Complete rows: 48 train, 10 dev, 9 test."""
    return write_pairs(tmp_path_factory.mktemp("pairs"), {"train": 48, "dev": 10, "test": 9})


@pytest.fixture(scope="module")
def gaps(tmp_path_factory):
    """Rows with missing values: 48 train, 10 dev, 9 test."""
    return write_pairs(tmp_path_factory.mktemp("gaps"), {"train": 48, "dev": 10, "test": 9}, MISSING)


@pytest.fixture
def pairs_run(tiny_timm, tiny_bert, tmp_path):
    """Returns a function that builds the configuration of a short run."""

    def make(source, adapt_config=None, net="test_resnet", **model) -> RunConfig:
        train = TrainConfig(num_epochs=1, lr=1e-3, head_lr=1e-3, batch_size_per_device=16, trackers=[])
        config = ModelConfig(name=tiny_timm[net], text_name=tiny_bert, fusion_dim=16, **model)
        data, adapt_config = DataConfig(source=str(source)), adapt_config or AdaptConfig()
        return RunConfig(data, config, adapt_config, train, output_dir=str(tmp_path / "run"))

    return make


def setup_task(run):
    return hftl.setup_run(run, hftl.ImageTextClassification)


def setup_error(run) -> str:
    with pytest.raises(hftl.HftlError) as error:
        setup_task(run)
    return str(error.value)


def make_batch(task, splits, model, rows=8, split="train"):
    encoded = task.encode(splits[split], model.processor, None, None)
    return task.collate(encoded.fetch(range(rows), 0))


def test_classification_passes_check_task(gaps, pairs_run):
    net = "test_vit"  # test_resnet has a single feature position for 32 pixels: no choice for attention
    run, splits, task = setup_task(pairs_run(gaps, net=net, fusion="cross_attention", modality_dropout=0.6))
    check_task(task, splits, run)


def test_regression_passes_check_task(pairs, pairs_run):
    regression = with_data(pairs_run(pairs, fusion="gated"), label_column="price", ignore_columns=["label"])
    run, splits, task = setup_task(regression)
    assert task.head.problem_type == "regression" and task.head.scale
    check_task(task, splits, run)


@pytest.mark.parametrize("config_class", [ImageTextConfig, ImageTextDualConfig])
def test_config_with_former_names_matches_sizes(config_class, tmp_path):
    """Models saved before the rename have fusion_size and projection_size in config.json."""
    saved = config_class(fusion_dim=16, projection_dim=8).to_dict()
    saved |= {"fusion_size": saved.pop("fusion_dim"), "projection_size": saved.pop("projection_dim")}
    (tmp_path / "config.json").write_text(json.dumps(saved))
    for config in (config_class.from_dict(saved), config_class.from_pretrained(tmp_path)):
        assert (config.fusion_dim, config.projection_dim) == (16, 8)
        resaved = config.to_dict()
        assert (resaved["fusion_dim"], resaved["projection_dim"]) == (16, 8) and "fusion_size" not in resaved


@pytest.mark.parametrize("fusion", ["concat", "gated", "cross_attention"])
def test_logits_ignore_values_of_missing_modalities(fusion, gaps, pairs_run):
    """A modality missing from a row, with any placeholder value, equals one missing from the call."""
    run, splits, task = setup_task(pairs_run(gaps, fusion=fusion, modality_dropout=0.2))
    torch.manual_seed(0)
    model = build_model(run, task.head).eval()
    net, inputs = model.net, make_batch(task, splits, model)["inputs"]
    assert inputs["image_present"].tolist() == [True] * 3 + [False] + [True] * 4
    assert inputs["text_present"].tolist() == [True] * 4 + [False] + [True] * 3
    absent = torch.zeros(8, dtype=torch.bool)
    tabular = {name: inputs[name] for name in ("numbers", "categories")}
    texts = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        placeholder = torch.where(inputs["image_present"].view(-1, 1, 1, 1), inputs["pixel_values"], 7.0)
        torch.testing.assert_close(net(**inputs).logits, net(**inputs | {"pixel_values": placeholder}).logits)
        without_image = net(**inputs | {"image_present": absent, "text_present": ~absent}).logits
        torch.testing.assert_close(without_image, net(**texts, **tabular).logits)
        without_text = net(**inputs | {"text_present": absent, "image_present": ~absent}).logits
        torch.testing.assert_close(without_text, net(pixel_values=inputs["pixel_values"], **tabular).logits)
    assert not torch.allclose(without_image, without_text)
    assert not torch.allclose(without_image, net(**inputs).logits)


def test_categories_preserve_names_and_sorted_order():
    """transformers sorts the keys of its JSON files; class ids are stored by name, as they differ between datasets."""
    from datasets import ClassLabel, Dataset, Features, Value

    from hftl.data.multimodal_columns import train_categories, with_names
    from hftl.models.processing_image_text import category_ids

    features = Features({"shop": Value("string"), "color": ClassLabel(names=["red", "blue"])})
    rows = Dataset.from_dict({"shop": ["b", "None", None], "color": [1, 0, 1]}, features=features)
    categories = train_categories(rows, ["shop", "color"])
    assert list(categories.items()) == [("color", ["blue", "red"]), ("shop", ["None", "b"])]
    named_rows = with_names(rows, ["color"])
    cells = [[row["color"], row["shop"]] for row in named_rows]
    assert category_ids(cells, list(categories.values())).tolist() == [[1, 2], [2, 1], [1, 0]]


def test_tabular_encoder_ignores_untrained_indicators():
    from datasets import Dataset

    from hftl.data.multimodal_columns import train_numbers
    from hftl.models.image_text_heads import TabularEncoder

    rows = Dataset.from_dict({"constant": [0.1] * 100, "incomplete": [1.0, None] * 50})
    numbers, problems = train_numbers(rows, ["constant", "incomplete"])
    assert not problems and numbers["std"][0] == 1.0 and numbers["missing"] == [False, True]
    encoder = TabularEncoder(numbers, {}, 8)
    inputs = torch.tensor([[0.1, 1.0], [float("nan"), 1.0], [0.1, float("nan")]])
    mean, first_missing, second_missing = encoder(inputs, None, 3, "cpu")
    assert torch.equal(mean, first_missing), "the indicator of a column without missing training values is masked"
    assert not torch.allclose(mean, second_missing)


def test_usage_code_matches_model_inputs(pairs, pairs_run):
    _, _, task = setup_task(with_data(pairs_run(pairs), ignore_columns=["picture"]))
    code = task.usage
    assert "images=" not in code and "PIL" not in code and "argmax" in code
    assert "text=" in code and "numbers=[[" in code and "categories=[['north']]" in code
    _, _, task = setup_task(
        with_data(pairs_run(pairs), label_column="price", ignore_columns=["label", "title", "body"])
    )
    assert "text=" not in task.usage and "images=" in task.usage and "argmax" not in task.usage


def test_modality_dropout_drops_at_most_one_modality():
    from hftl.models.image_text_heads import _drop_modalities

    image, text = torch.rand(40_000) < 0.8, torch.rand(40_000) < 0.8
    image_after, text_after = _drop_modalities(image, text, 0.4)
    both = image & text
    assert torch.equal(image_after | text_after, image | text)
    assert torch.equal(image_after[~both], image[~both]) and torch.equal(text_after[~both], text[~both])
    for present in (image_after, text_after):
        assert abs((~present[both]).float().mean() - 0.2) < 0.02


def test_tabular_encoder_matches_training_statistics(gaps, pairs_run):
    run, splits, task = setup_task(pairs_run(gaps, modality_dropout=0.2))
    model = build_model(run, task.head).eval()
    inputs = make_batch(task, splits, model)["inputs"]
    prices = np.array([value for value in splits["train"]["price"] if value is not None])
    encoder = model.net.fusion.table
    np.testing.assert_allclose([encoder.mean[0], encoder.std[0]], [prices.mean(), prices.std()], rtol=1e-6)
    assert inputs["numbers"][5].isnan().all() and not inputs["numbers"][4].isnan().any()
    assert inputs["categories"][6] == 0 and set(inputs["categories"][:6].flatten().tolist()) <= {1, 2}
    unknown = make_batch(task, splits, model, 3, "test")["inputs"]["categories"]
    assert unknown[2] == 0, "'west' is not in train"
    with torch.no_grad():
        mean = encoder(encoder.mean[None], inputs["categories"][:1], 1, "cpu")
        missing = encoder(torch.tensor([[float("nan")]]), inputs["categories"][:1], 1, "cpu")
    assert not torch.allclose(mean, missing), "the indicator distinguishes a missing number from the mean"


@pytest.mark.parametrize(
    ("adapt_config", "trainable"),
    [
        (AdaptConfig("frozen", image_method="full"), {"image"}),
        (AdaptConfig("full", image_method="frozen"), {"text"}),
        (AdaptConfig("lora", image_method="frozen"), {"text lora"}),
        (AdaptConfig("lora", text_method="full"), {"image lora", "text"}),
    ],
)
def test_adapt_per_encoder_preserves_frozen_parameters(adapt_config, trainable, pairs, pairs_run):
    run, splits, task = setup_task(pairs_run(pairs, adapt_config))
    model = build_model(run, task.head)
    adapt(model, run.adapt)
    groups = set()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and not model.in_head(name):
            groups.add(("image" if "image_encoder" in name else "text") + (" lora" if "lora_" in name else ""))
    assert groups == trainable
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.train()
    batch = make_batch(task, splits, model)
    optimizer = torch.optim.SGD([parameter for parameter in model.parameters() if parameter.requires_grad], 0.1)
    task.loss(model(batch["inputs"]), batch).mean().backward()
    optimizer.step()
    for name, value in model.state_dict().items():
        encoder = "image" if "image_encoder" in name else "text" if "text_encoder" in name else None
        if encoder and encoder not in trainable and "lora_" not in name:
            assert torch.equal(value, before[name]), f"{name} changed"


RELOAD = """
import json, sys
import torch, transformers
from PIL import Image
run, rows = sys.argv[1], json.loads(sys.argv[2])
processor = transformers.AutoProcessor.from_pretrained(run + "/model", trust_remote_code=True)
model = transformers.AutoModel.from_pretrained(run + "/model", trust_remote_code=True).eval()
inputs = processor(
    images=[Image.open(row["picture"]) if row["picture"] else None for row in rows],
    text=[row["text"] for row in rows],
    numbers=[[row["price"]] for row in rows],
    categories=[[row["shop"]] for row in rows],
)
with torch.no_grad():
    probabilities = model(**inputs).logits.softmax(-1)
torch.testing.assert_close(probabilities, torch.tensor([row["expected"] for row in rows]), atol=1e-4, rtol=1e-3)
assert [model.config.id2label[i] for i in range(2)] == ["other", "same"]
print("equal", len(rows))
"""


def test_saved_model_matches_predictions_without_hftl(gaps, pairs_run, tmp_path, capsys, run_without_hftl):
    """One encoder is fully trained and one has adapters; hftl, transformers and the adapter give equal predictions."""
    run = pairs_run(gaps, AdaptConfig("lora", image_method="full"), modality_dropout=0.3)
    metrics = run_undrawn("image_text_classification", run)
    assert write_report(tmp_path / "run").is_file()
    assert {"test/accuracy", "test/roc_auc"} <= set(metrics)
    verified = json.loads((tmp_path / "run/report.json").read_text())["verified"]
    assert set(verified) == {"model/transformers", "adapter/peft"}
    model = hftl.load(tmp_path / "run")
    assert model.columns == ["picture", "title", "body", "price", "shop"]
    rows = [
        {"picture": str(gaps / "images/test000.png"), "title": "cat dog", "body": "a", "price": 1.5, "shop": "north"},
        {"picture": None, "title": "bread", "body": None, "price": None, "shop": "west"},
        {"picture": str(gaps / "images/test002.png"), "title": None, "body": None, "price": 2.0, "shop": None},
    ]
    predictions = model.predict(rows)
    assert predictions == model.predict([tuple(row.values()) for row in rows])
    adapter_predictions = hftl.load(tmp_path / "run/adapter").predict(rows)
    for prediction, reloaded in zip(predictions, adapter_predictions, strict=True):
        assert prediction["confidence"] == pytest.approx(reloaded["confidence"], abs=1e-4)
    texts = [f"title: {row['title']} body: {row['body'] or ''}" if row["title"] else None for row in rows]
    expected = [
        {name: row[name] for name in ("picture", "price", "shop")}
        | {"text": text, "expected": prediction["probabilities"]}
        for row, text, prediction in zip(rows, texts, predictions, strict=True)
    ]
    assert "equal 3" in run_without_hftl(RELOAD, str(tmp_path / "run"), json.dumps(expected))
    table = tmp_path / "rows.csv"
    table.write_text("title,price\ncat dog,3\nbread rice,4\n")
    from hftl.inference.batch_inference import predict_to_file

    capsys.readouterr()
    predict_to_file(str(tmp_path / "run"), str(table))
    assert capsys.readouterr().out.count("\n") == 3


def test_frozen_training_rows_match_cached_vectors(gaps, pairs_run):
    """Cached vectors give the logits of images and texts; cross attention needs sequences and does not use them."""
    from accelerate import Accelerator

    from hftl.preprocessing.multimodal import VectorRows
    from hftl.training.feature_cache_policy import training_rows

    run, splits, task = setup_task(pairs_run(gaps, AdaptConfig("frozen"), modality_dropout=0.2))
    model = build_model(run, task.head)
    adapt(model, run.adapt)
    accelerator = Accelerator()
    rows, held_out = training_rows(accelerator, model, task, splits, run)
    assert isinstance(rows, VectorRows) and isinstance(held_out, VectorRows)
    model.eval()
    batch, cached = make_batch(task, splits, model), task.collate(rows.fetch(range(8), 0))
    assert "pixel_values" not in cached["inputs"] and torch.equal(batch["labels"], cached["labels"])
    with torch.no_grad():
        torch.testing.assert_close(model(cached["inputs"])["logits"], model(batch["inputs"])["logits"])
    for changes in (
        {"model": replace(run.model, fusion="cross_attention")},
        {"adapt": replace(run.adapt, text_method="lora")},
    ):
        changed = replace(run, **changes)
        rows, _ = training_rows(accelerator, build_model(changed, task.head), task, splits, changed)
        assert not isinstance(rows, VectorRows)


def test_column_types_match_data_and_settings(pairs, pairs_run):
    _, _, task = setup_task(pairs_run(pairs))
    assert task.inputs.column_types == {
        "picture": "image", "title": "text", "body": "text", "price": "number", "shop": "category"
    }  # fmt: skip
    settings = {"text_template": "{title} / {shop}", "numeric_columns": [], "ignore_columns": ["picture", "body"]}
    run, splits, task = setup_task(with_data(pairs_run(pairs), **settings))
    assert task.inputs.column_types == {"title": "text", "shop": "text"}
    model = build_model(run, task.head)
    assert model.net.image_encoder is None and model.net.fusion.table is None
    first, tokenizer = splits["train"][0], model.processor.tokenizer
    ids = make_batch(task, splits, model, 1)["inputs"]["input_ids"]
    assert ids[0].tolist() == tokenizer(f"{first['title']} / {first['shop']}")["input_ids"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"text_template": "{titel}"}, "there is no column 'titel'. Did you mean 'title'"),
        ({"text_template": "{title"}, "data.text_template"),
        ({"text_template": "{title!r}"}, "with nothing else in braces"),
        ({"numeric_columns": ["prize"]}, "there is no column 'prize'"),
        ({"numeric_columns": ["title"]}, "'title' is not numeric"),
        ({"numeric_columns": ["price"], "categorical_columns": ["price"]}, "is also in data.categorical_columns"),
        ({"ignore_columns": ["picture", "title", "body"], "categorical_columns": []}, "no image and no text column"),
    ],
)
def test_setup_rejects_invalid_columns(changes, message, pairs, pairs_run):
    assert message in setup_error(with_data(pairs_run(pairs), **changes))


def test_setup_rejects_or_skips_invalid_rows(tmp_path, pairs_run, tiny_bert):
    counts = {"train": 32, "dev": 4, "test": 8}
    incomplete = write_pairs(tmp_path / "gaps", counts, {"train": {2: {"picture": ""}, 5: {"title": "", "body": ""}}})
    message = setup_error(pairs_run(incomplete))
    assert "1 row(s) without image and 1 row(s) without text" in message and "--model.modality_dropout 0.2" in message
    empty = write_pairs(tmp_path / "empty", counts, {"train": {7: {"picture": "", "title": "", "body": " "}}})
    assert "neither image nor text, at row 7" in setup_error(pairs_run(empty, modality_dropout=0.2))
    infinite = write_pairs(tmp_path / "inf", counts, {"train": {4: {"price": "inf"}}})
    assert "column 'price' has 1 infinite number(s), at row 4" in setup_error(pairs_run(infinite))
    (incomplete / "images/train009.png").write_bytes(b"not an image")
    message = setup_error(pairs_run(incomplete, modality_dropout=0.2))
    assert "train has 1 unreadable image(s): row 9" in message
    no_text = replace(pairs_run(empty), model=replace(pairs_run(empty).model, text_name=""))
    assert "model.text_name: is empty" in setup_error(with_data(no_text, on_error="skip"))
    run, splits, task = setup_task(with_data(pairs_run(incomplete, modality_dropout=0.2), on_error="skip"))
    assert len(splits["train"]) == 31
    assert [entry["row"] for entry in run.quarantine] == [9]


def test_predict_incomplete_rows_raises(pairs, pairs_run):
    run, _, task = setup_task(pairs_run(pairs))
    from hftl.inference.predictor import Predictor

    predictor = Predictor(build_model(run, task.head), task, run.data)
    row = {"picture": None, "title": "cat", "body": "dog", "price": 1.0, "shop": "north"}
    with pytest.raises(hftl.HftlError, match="no image in row 0, but the model was trained without missing"):
        predictor.predict([row])
    with pytest.raises(hftl.HftlError, match="'cheap' is not a finite number"):
        predictor.predict([row | {"picture": str(pairs / "images/test000.png"), "price": "cheap"}])
    with pytest.raises(hftl.HftlError, match="rows lack the column"):
        predictor.predict([{"name": "cat"}])


def test_dual_encoder_reload_matches_embeddings(pairs_run, pairs, tmp_path):
    from hftl.models.task_model import HeadSpec

    for objective in ("infonce", "siglip"):
        run = pairs_run(pairs, net="test_vit", projection_dim=8)
        spec = HeadSpec("ImageTextDualEncoder", 8, problem_type=None, options={"objective": objective})
        model = build_model(run, spec).eval()
        assert model.head_modules == ("projection",)
        tokens = model.processor.tokenizer(["cat dog", "my bread"], return_tensors="pt")
        inputs = {"pixel_values": torch.randn(2, 3, 32, 32), **tokens}
        outputs = model(inputs)
        for name in ("image_embeds", "text_embeds"):
            torch.testing.assert_close(outputs[name].norm(dim=-1), torch.ones(2))
        assert outputs["logit_scale"].shape == (2,)
        assert ("logit_bias" in outputs) == (objective == "siglip")
        torch.testing.assert_close(model.net.get_image_features(inputs["pixel_values"]), outputs["image_embeds"])
        torch.testing.assert_close(model.net.get_text_features(**tokens), outputs["text_embeds"])
        folder = tmp_path / objective
        model.save(folder)
        torch.testing.assert_close(open_model(folder, spec).reference_outputs(inputs), model.reference_outputs(inputs))


def test_open_model_rejects_files_and_repositories(pairs_run, pairs, tmp_path):
    run, _, task = setup_task(pairs_run(pairs))
    model = build_model(run, task.head)
    model.save(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for change in ({"architecture": "hf-hub:evil/net"}, {"arguments": {"checkpoint_path": "x.bin"}}):
        (tmp_path / "config.json").write_text(json.dumps(config | {"vision": config["vision"] | change}))
        with pytest.raises(hftl.errors.ArtifactError, match="is not part of a timm architecture"):
            open_model(tmp_path, task.head)
    (tmp_path / "config.json").write_text(json.dumps(config | {"auto_map": {"AutoModel": "evil.Net"}}))
    (tmp_path / "evil.py").write_text("raise SystemExit('ran')")
    open_model(tmp_path, task.head)


def test_rank_orders_image_encoders_with_fixed_text_encoder(pairs, tiny_timm, tiny_bert):
    names = [tiny_timm[name] for name in ("test_resnet", "test_vit")]
    ranking = hftl.rank(
        DataConfig(source=str(pairs)), names, output=None, model=ModelConfig(name="x", text_name=tiny_bert)
    )
    assert sorted(ranking.order) == sorted(names)


def test_two_processes_match_single_process_metrics(gaps, tiny_timm, tiny_bert, forks, tmp_path):
    """10 validation and 9 test rows in batches of 4 are uneven on two processes, which share the cached vectors."""
    model = {"model.text_name": tiny_bert, "model.modality_dropout": 0.2, "train.max_steps": 2}
    settings = model | {"train.batch_size_per_device": 4, "train.trackers": "[]"}
    arguments = flags(gaps, tiny_timm["test_resnet"], tmp_path / "run", "frozen", **settings)
    command = ["python", ROOT / "recipes" / "image_text_classification.py", *arguments]
    cache = {"HFTL_CACHE": str(tmp_path / "cache")}  # shared by both processes
    statuses, output = forks.command(command, tmp_path, 120, 2, **ENV, **cache)
    assert statuses == [0, 0], output[-3000:]
    record = RunRecord(tmp_path / "run")
    assert record.environment["processes"] == 2
    model = hftl.load(tmp_path / "run")
    rows = labeled_rows(model.task, model.data, None, "test")
    for name, value in model.run(model.encode(rows), 4).items():
        assert record.metrics[f"test/{name}"] == pytest.approx(value, abs=1e-6), name


@pytest.mark.parametrize("rows", [2, 3, 40, 501])
def test_roc_auc_merged_parts_match_sklearn(rows):
    from sklearn.metrics import roc_auc_score

    from hftl.tasks.targets.single_label.roc_auc import RocAuc

    rng = np.random.default_rng(rows)
    labels = rng.integers(0, 2, rows)
    labels[:2] = (0, 1)
    logits = torch.from_numpy(rng.normal(size=(rows, 2)).round(1).astype(np.float32))  # rounded to create ties
    metrics = [RocAuc() for _ in range(3)]
    for number, batch in enumerate(np.array_split(np.arange(rows), 7)):
        metrics[number % 3].update({"logits": logits[batch]}, {"labels": torch.from_numpy(labels[batch])})
    merged, *others = metrics
    for metric in others:
        merged.merge(metric)
    scores = (logits[:, 1].double() - logits[:, 0].double()).numpy()
    assert merged.compute()["roc_auc"] == pytest.approx(roc_auc_score(labels, scores), abs=1e-12)


def test_roc_auc_single_class_returns_nan():
    from hftl.tasks.targets.single_label.roc_auc import RocAuc

    metric = RocAuc()
    assert np.isnan(metric.compute()["roc_auc"])
    metric.update({"logits": torch.randn(4, 2)}, {"labels": torch.ones(4, dtype=torch.long)})
    assert np.isnan(metric.compute()["roc_auc"])
