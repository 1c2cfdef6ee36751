"""Images and texts together: any may be missing, each encoder is adapted on its own, the model opens anywhere."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import ROOT, run_undrawn, with_data
from launch import ENV, flags
from pairs import write_pairs

import hftl
from hftl import AdaptConfig, DataConfig, ModelConfig, RunConfig, TrainConfig
from hftl.adaptation.apply import adapt
from hftl.artifacts.labeled_data import labeled_rows
from hftl.models.build import build_model, open_model
from hftl.reporting import write_report
from hftl.reporting.run_record import RunRecord
from hftl.run.testing import check_task

MISSING = {
    "train": {3: {"picture": ""}, 4: {"title": "", "body": ""}, 5: {"price": ""}, 6: {"shop": ""}},
    "test": {1: {"picture": ""}, 2: {"shop": "west"}},
}


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """Rows that are all there; train 48, dev 10, test 9."""
    return write_pairs(tmp_path_factory.mktemp("pairs"), {"train": 48, "dev": 10, "test": 9})


@pytest.fixture(scope="module")
def gaps(tmp_path_factory):
    """The same, some of it missing."""
    return write_pairs(tmp_path_factory.mktemp("gaps"), {"train": 48, "dev": 10, "test": 9}, MISSING)


@pytest.fixture
def pairs_run(tiny_timm, tiny_bert, tmp_path):
    """Returns a function that makes the configuration of a quick run."""

    def make(source, adapting=None, net="test_resnet", **model) -> RunConfig:
        train = TrainConfig(num_epochs=1, lr=1e-3, head_lr=1e-3, batch_size_per_device=16, trackers=[])
        named = ModelConfig(name=tiny_timm[net], text_name=tiny_bert, fusion_dim=16, **model)
        return RunConfig(
            DataConfig(source=str(source)), named, adapting or AdaptConfig(), train, output_dir=str(tmp_path / "run")
        )

    return make


def prepared(run):
    return hftl.setup_run(run, hftl.ImageTextClassification)


def refused(run) -> str:
    with pytest.raises(hftl.HftlError) as error:
        prepared(run)
    return str(error.value)


def a_batch(task, splits, model, rows=8, split="train"):
    encoded = task.encode(splits[split], model.processor, None, None)
    return task.collate(encoded.fetch(range(rows), 0))


def test_it_passes_the_contract(gaps, pairs_run):
    net = "test_vit"  # test_resnet leaves one place of 32 pixels, among which nobody can choose
    run, splits, task = prepared(pairs_run(gaps, net=net, fusion="cross_attention", modality_dropout=0.6))
    check_task(task, splits, run)


def test_regression_passes_the_contract(pairs, pairs_run):
    by_price = with_data(pairs_run(pairs, fusion="gated"), label_column="price", ignore_columns=["label"])
    run, splits, task = prepared(by_price)
    assert task.head.problem_type == "regression" and task.head.scale
    check_task(task, splits, run)


@pytest.mark.parametrize("fusion", ["concat", "gated", "cross_attention"])
def test_what_is_missing_does_not_matter_to_the_output(fusion, gaps, pairs_run):
    """Absent in a call, absent in a row whatever stands in its place: all the same."""
    run, splits, task = prepared(pairs_run(gaps, fusion=fusion, modality_dropout=0.2))
    torch.manual_seed(0)
    model = build_model(run, task.head).eval()
    net, inputs = model.net, a_batch(task, splits, model)["inputs"]
    assert inputs["image_present"].tolist() == [True] * 3 + [False] + [True] * 4
    assert inputs["text_present"].tolist() == [True] * 4 + [False] + [True] * 3
    nothing = torch.zeros(8, dtype=torch.bool)
    others = {name: inputs[name] for name in ("numbers", "categories")}
    texts = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        garbage = torch.where(inputs["image_present"].view(-1, 1, 1, 1), inputs["pixel_values"], 7.0)
        torch.testing.assert_close(net(**inputs).logits, net(**inputs | {"pixel_values": garbage}).logits)
        without_image = net(**inputs | {"image_present": nothing, "text_present": ~nothing}).logits
        torch.testing.assert_close(without_image, net(**texts, **others).logits)
        without_text = net(**inputs | {"text_present": nothing, "image_present": ~nothing}).logits
        torch.testing.assert_close(without_text, net(pixel_values=inputs["pixel_values"], **others).logits)
    assert not torch.allclose(without_image, without_text)
    assert not torch.allclose(without_image, net(**inputs).logits)


def test_categories_keep_their_names_and_an_order_that_files_keep():
    """JSON files of transformers are sorted, and class numbers of one data set are names in another."""
    from datasets import ClassLabel, Dataset, Features, Value

    from hftl.data.multimodal_columns import train_categories, with_names
    from hftl.models.processing_image_text import category_ids

    kinds = Features({"shop": Value("string"), "colour": ClassLabel(names=["red", "blue"])})
    rows = Dataset.from_dict({"shop": ["b", "None", None], "colour": [1, 0, 1]}, features=kinds)
    found = train_categories(rows, ["shop", "colour"])
    assert list(found.items()) == [("colour", ["blue", "red"]), ("shop", ["None", "b"])]
    named = with_names(rows, ["colour"])
    cells = [[row["colour"], row["shop"]] for row in named]
    assert category_ids(cells, list(found.values())).tolist() == [[1, 2], [2, 1], [1, 0]]


def test_numbers_that_never_vary_or_were_never_missing_do_no_harm():
    from datasets import Dataset

    from hftl.data.multimodal_columns import train_numbers
    from hftl.models.image_text_heads import TabularEncoder

    rows = Dataset.from_dict({"same": [0.1] * 100, "some": [1.0, None] * 50})
    numbers, problems = train_numbers(rows, ["same", "some"])
    assert not problems and numbers["std"][0] == 1.0 and numbers["missing"] == [False, True]
    table = TabularEncoder(numbers, {}, 8)
    of = torch.tensor([[0.1, 1.0], [float("nan"), 1.0], [0.1, float("nan")]])
    mean, one_missing, other_missing = table(of, None, 3, "cpu")
    assert torch.equal(mean, one_missing), "training never saw that indicator"
    assert not torch.allclose(mean, other_missing)


def test_the_card_s_code_gives_what_the_model_takes(pairs, pairs_run):
    _, _, task = prepared(with_data(pairs_run(pairs), ignore_columns=["picture"]))
    code = task.usage
    assert "images=" not in code and "PIL" not in code and "argmax" in code
    assert "text=" in code and "numbers=[[" in code and "categories=[['north']]" in code
    _, _, task = prepared(with_data(pairs_run(pairs), label_column="price", ignore_columns=["label", "title", "body"]))
    assert "text=" not in task.usage and "images=" in task.usage and "argmax" not in task.usage


def test_modality_dropout_takes_one_of_two_and_never_both():
    from hftl.models.image_text_heads import _drop

    image, text = torch.rand(40_000) < 0.8, torch.rand(40_000) < 0.8
    seen, read = _drop(image, text, 0.4)
    both = image & text
    assert torch.equal(seen | read, image | text)
    assert torch.equal(seen[~both], image[~both]) and torch.equal(read[~both], text[~both])
    for kept in (seen, read):
        assert abs((~kept[both]).float().mean() - 0.2) < 0.02


def test_numbers_are_standardised_by_train_and_categories_known_from_it(gaps, pairs_run):
    run, splits, task = prepared(pairs_run(gaps, modality_dropout=0.2))
    model = build_model(run, task.head).eval()
    inputs = a_batch(task, splits, model)["inputs"]
    prices = np.array([value for value in splits["train"]["price"] if value is not None])
    table = model.net.fusion.table
    np.testing.assert_allclose([table.mean[0], table.std[0]], [prices.mean(), prices.std()], rtol=1e-6)
    assert inputs["numbers"][5].isnan().all() and not inputs["numbers"][4].isnan().any()
    assert inputs["categories"][6] == 0 and set(inputs["categories"][:6].flatten().tolist()) <= {1, 2}
    unknown = a_batch(task, splits, model, 3, "test")["inputs"]["categories"]
    assert unknown[2] == 0, "'west' is not in train"
    with torch.no_grad():
        mean = table(table.mean[None], inputs["categories"][:1], 1, "cpu")
        missing = table(torch.tensor([[float("nan")]]), inputs["categories"][:1], 1, "cpu")
    assert not torch.allclose(mean, missing), "an indicator tells a missing number from the mean"


@pytest.mark.parametrize(
    ("adapting", "learning"),
    [
        (AdaptConfig("frozen", image_method="full"), {"image"}),
        (AdaptConfig("full", image_method="frozen"), {"text"}),
        (AdaptConfig("lora", image_method="frozen"), {"text lora"}),
        (AdaptConfig("lora", text_method="full"), {"image lora", "text"}),
    ],
)
def test_each_encoder_learns_in_its_own_way(adapting, learning, pairs, pairs_run):
    run, splits, task = prepared(pairs_run(pairs, adapting))
    model = build_model(run, task.head)
    adapt(model, run.adapt)
    found = set()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and not model.in_head(name):
            found.add(("image" if "image_encoder" in name else "text") + (" lora" if "lora_" in name else ""))
    assert found == learning
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.train()
    batch = a_batch(task, splits, model)
    optimizer = torch.optim.SGD([parameter for parameter in model.parameters() if parameter.requires_grad], 0.1)
    task.loss(model(batch["inputs"]), batch).mean().backward()
    optimizer.step()
    for name, value in model.state_dict().items():
        encoder = "image" if "image_encoder" in name else "text" if "text_encoder" in name else None
        if encoder and encoder not in learning and "lora_" not in name:
            assert torch.equal(value, before[name]), f"{name} moved"


OPEN = """
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
    shares = model(**inputs).logits.softmax(-1)
torch.testing.assert_close(shares, torch.tensor([row["expected"] for row in rows]), atol=1e-4, rtol=1e-3)
assert [model.config.id2label[i] for i in range(2)] == ["other", "same"]
print("equal", len(rows))
"""


def test_an_artifact_opens_without_hftl_and_predicts_from_anything(gaps, pairs_run, tmp_path, capsys, run_without_hftl):
    """One run with an encoder that learns whole and one with adapters; everything that opens it agrees."""
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
    found = model.predict(rows)
    assert found == model.predict([tuple(row.values()) for row in rows])
    adapter = hftl.load(tmp_path / "run/adapter").predict(rows)
    for one, other in zip(found, adapter, strict=True):
        assert one["confidence"] == pytest.approx(other["confidence"], abs=1e-4)
    joined = [f"title: {row['title']} body: {row['body'] or ''}" if row["title"] else None for row in rows]
    given = [
        {name: row[name] for name in ("picture", "price", "shop")} | {"text": text, "expected": each["probabilities"]}
        for row, text, each in zip(rows, joined, found, strict=True)
    ]
    assert "equal 3" in run_without_hftl(OPEN, str(tmp_path / "run"), json.dumps(given))
    table = tmp_path / "rows.csv"
    table.write_text("title,price\ncat dog,3\nbread rice,4\n")
    from hftl.inference.batch_inference import predict_to_file

    capsys.readouterr()
    predict_to_file(str(tmp_path / "run"), str(table))
    assert capsys.readouterr().out.count("\n") == 3


def test_a_frozen_model_learns_from_vectors_that_were_computed_once(gaps, pairs_run):
    """They say what images and texts would; cross attention needs more than vectors, and is not given any."""
    from accelerate import Accelerator

    from hftl.preprocessing.multimodal import VectorRows
    from hftl.training.feature_cache_policy import training_rows

    run, splits, task = prepared(pairs_run(gaps, AdaptConfig("frozen"), modality_dropout=0.2))
    model = build_model(run, task.head)
    adapt(model, run.adapt)
    accelerator = Accelerator()
    rows, held_out = training_rows(accelerator, model, task, splits, run)
    assert isinstance(rows, VectorRows) and isinstance(held_out, VectorRows)
    model.eval()
    whole, cached = a_batch(task, splits, model), task.collate(rows.fetch(range(8), 0))
    assert "pixel_values" not in cached["inputs"] and torch.equal(whole["labels"], cached["labels"])
    with torch.no_grad():
        torch.testing.assert_close(model(cached["inputs"])["logits"], model(whole["inputs"])["logits"])
    for changes in (
        {"model": replace(run.model, fusion="cross_attention")},
        {"adapt": replace(run.adapt, text="lora")},
    ):
        other = replace(run, **changes)
        rows, _ = training_rows(accelerator, build_model(other, task.head), task, splits, other)
        assert not isinstance(rows, VectorRows)


def test_columns_are_found_by_type_and_by_name(pairs, pairs_run):
    _, _, task = prepared(pairs_run(pairs))
    assert task.inputs.column_types == {
        "picture": "image", "title": "text", "body": "text", "price": "number", "shop": "category"
    }  # fmt: skip
    named = {"text_template": "{title} / {shop}", "numeric_columns": [], "ignore_columns": ["picture", "body"]}
    run, splits, task = prepared(with_data(pairs_run(pairs), **named))
    assert task.inputs.column_types == {"title": "text", "shop": "text"}
    model = build_model(run, task.head)
    assert model.net.image_encoder is None and model.net.fusion.table is None
    first, tokenizer = splits["train"][0], model.processor.tokenizer
    ids = a_batch(task, splits, model, 1)["inputs"]["input_ids"]
    assert ids[0].tolist() == tokenizer(f"{first['title']} / {first['shop']}")["input_ids"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"text_template": "{titel}"}, "there is no column 'titel'. Did you mean 'title'"),
        ({"text_template": "{title"}, "data.text_template"),
        ({"text_template": "{title!r}"}, "with nothing else in braces"),
        ({"numeric_columns": ["prize"]}, "there is no column 'prize'"),
        ({"numeric_columns": ["title"]}, "'title' does not hold numbers"),
        ({"numeric_columns": ["price"], "categorical_columns": ["price"]}, "is in data.categorical_columns too"),
        ({"ignore_columns": ["picture", "title", "body"], "categorical_columns": []}, "no image and no text column"),
    ],
)
def test_columns_that_cannot_be_are_refused(changes, message, pairs, pairs_run):
    assert message in refused(with_data(pairs_run(pairs), **changes))


def test_bad_rows_are_named(tmp_path, pairs_run, tiny_bert):
    counts = {"train": 32, "dev": 4, "test": 8}
    gone = write_pairs(tmp_path / "gone", counts, {"train": {2: {"picture": ""}, 5: {"title": "", "body": ""}}})
    said = refused(pairs_run(gone))
    assert "1 row(s) without image and 1 row(s) without text" in said and "--model.modality_dropout 0.2" in said
    nothing = {"picture": "", "title": "", "body": " "}
    empty = write_pairs(tmp_path / "empty", counts, {"train": {7: nothing}})
    assert "neither image nor text, at row 7" in refused(pairs_run(empty, modality_dropout=0.2))
    infinite = write_pairs(tmp_path / "inf", counts, {"train": {4: {"price": "inf"}}})
    assert "column 'price' has 1 infinite number(s), at row 4" in refused(pairs_run(infinite))
    (gone / "images/train009.png").write_bytes(b"not an image")
    said = refused(pairs_run(gone, modality_dropout=0.2))
    assert "train has 1 unreadable image(s): row 9" in said
    no_text = replace(pairs_run(empty), model=replace(pairs_run(empty).model, text_name=""))
    assert "model.text_name is empty" in refused(with_data(no_text, on_error="skip"))
    run, splits, task = prepared(with_data(pairs_run(gone, modality_dropout=0.2), on_error="skip"))
    assert len(splits["train"]) == 31
    assert [entry["row"] for entry in run.quarantine] == [9]


def test_a_model_that_has_not_learnt_to_do_without_says_so(pairs, pairs_run):
    run, _, task = prepared(pairs_run(pairs))
    from hftl.inference.predictor import Predictor

    predictor = Predictor(build_model(run, task.head), task, run.data)
    row = {"picture": None, "title": "cat", "body": "dog", "price": 1.0, "shop": "north"}
    with pytest.raises(hftl.HftlError, match="no image in row 0, and this model was trained without model.modality"):
        predictor.predict([row])
    with pytest.raises(hftl.HftlError, match="'cheap' is not a number"):
        predictor.predict([row | {"picture": str(pairs / "images/test000.png"), "price": "cheap"}])
    with pytest.raises(hftl.HftlError, match="rows lack the column"):
        predictor.predict([{"name": "cat"}])


def test_the_dual_encoder_gives_unit_vectors_and_opens_again(pairs_run, pairs, tmp_path):
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


def test_a_saved_model_cannot_name_files_or_repositories(pairs_run, pairs, tmp_path):
    run, _, task = prepared(pairs_run(pairs))
    model = build_model(run, task.head)
    model.save(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for change in ({"architecture": "hf-hub:evil/net"}, {"arguments": {"checkpoint_path": "x.bin"}}):
        (tmp_path / "config.json").write_text(json.dumps(config | {"vision": config["vision"] | change}))
        with pytest.raises(hftl.errors.ArtifactError, match="not part of a timm architecture"):
            open_model(tmp_path, task.head)
    (tmp_path / "config.json").write_text(json.dumps(config | {"auto_map": {"AutoModel": "evil.Net"}}))
    (tmp_path / "evil.py").write_text("raise SystemExit('ran')")
    open_model(tmp_path, task.head)


def test_image_encoders_are_ranked_beside_one_text_encoder(pairs, tiny_timm, tiny_bert):
    names = [tiny_timm[name] for name in ("test_resnet", "test_vit")]
    ranking = hftl.rank(
        DataConfig(source=str(pairs)), names, output=None, model=ModelConfig(name="x", text_name=tiny_bert)
    )
    assert sorted(ranking.order) == sorted(names)


def test_two_processes_measure_what_one_does(gaps, tiny_timm, tiny_bert, forks, tmp_path):
    """Validation, 10 rows, and test, 9 rows, in batches of 4 are uneven on two processes; vectors are shared out."""
    model = {"model.text_name": tiny_bert, "model.modality_dropout": 0.2, "train.max_steps": 2}
    settings = model | {"train.batch_size_per_device": 4, "train.trackers": "[]"}
    given = flags(gaps, tiny_timm["test_resnet"], tmp_path / "run", "frozen", **settings)
    words = ["python", ROOT / "recipes" / "image_text_classification.py", *given]
    cache = {"HFTL_CACHE": str(tmp_path / "cache")}  # one for both
    statuses, said = forks.command(words, tmp_path, 120, 2, **ENV, **cache)
    assert statuses == [0, 0], said[-3000:]
    record = RunRecord(tmp_path / "run")
    assert record.environment["processes"] == 2
    model = hftl.load(tmp_path / "run")
    rows = labeled_rows(model.task, model.data, None, "test")
    for name, value in model.run(model.encode(rows), 4).items():
        assert record.metrics[f"test/{name}"] == pytest.approx(value, abs=1e-6), name


@pytest.mark.parametrize("rows", [2, 3, 40, 501])
def test_roc_auc_is_scikit_learns_however_the_rows_are_divided(rows):
    from sklearn.metrics import roc_auc_score

    from hftl.tasks.targets.single_label.roc_auc import RocAuc

    rng = np.random.default_rng(rows)
    labels = rng.integers(0, 2, rows)
    labels[:2] = (0, 1)
    logits = torch.from_numpy(rng.normal(size=(rows, 2)).round(1).astype(np.float32))  # rounded: with ties
    parts = [RocAuc() for _ in range(3)]
    for row, part in enumerate(np.array_split(np.arange(rows), 7)):
        parts[row % 3].update({"logits": logits[part]}, {"labels": torch.from_numpy(labels[part])})
    first, *others = parts
    for other in others:
        first.merge(other)
    scores = (logits[:, 1].double() - logits[:, 0].double()).numpy()
    assert first.compute()["roc_auc"] == pytest.approx(roc_auc_score(labels, scores), abs=1e-12)


def test_roc_auc_of_one_class_is_not_a_number():
    from hftl.tasks.targets.single_label.roc_auc import RocAuc

    metric = RocAuc()
    assert np.isnan(metric.compute()["roc_auc"])
    metric.update({"logits": torch.randn(4, 2)}, {"labels": torch.ones(4, dtype=torch.long)})
    assert np.isnan(metric.compute()["roc_auc"])
