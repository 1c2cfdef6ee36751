"""`hftl rank`: order, scores and intervals of candidates, failed candidates, and custom tasks."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

import hftl
from hftl.cli import main as cli
from hftl.errors import ConfigError, DataError, ModelError
from hftl.features.transferability import Estimate
from hftl.models.task_model import HeadSpec
from hftl.selection.bootstrap_ranks import compare_scores
from hftl.selection.candidate import source_probabilities
from hftl.selection.ranking import candidate_names, rank
from hftl.selection.ranking_report import short_names
from hftl.tasks.registry import ImageInputs


class ClassNumberTarget:
    """Regression target: the class number."""

    columns, problems, best_metric = ["label"], [], "loss"

    def head(self, model_class):
        return HeadSpec(model_class, 1, (), "regression")

    def labels(self, examples):
        return torch.tensor([[float(row["label"]) + 0.25] for row in examples])

    def state(self):
        return {}


class DigitRegression(hftl.SupervisedTask):
    """Custom regression task on images of digits."""

    name, model_class = "digit_regression", "timm"

    def __init__(self, splits):
        super().__init__(ImageInputs.find(splits), ClassNumberTarget())


class EvenAndLarge(ClassNumberTarget):
    """Multi-label target: even digits and digits above 4."""

    def head(self, model_class):
        return HeadSpec(model_class, 2, ("even", "large"), "multi_label_classification")

    def labels(self, examples):
        return torch.tensor([[float(row["label"] % 2 == 0), float(row["label"] > 4)] for row in examples])


class DigitTraits(hftl.SupervisedTask):
    """Custom multi-label task on images of digits."""

    name, model_class = "digit_traits", "timm"

    def __init__(self, splits):
        super().__init__(ImageInputs.find(splits), EvenAndLarge())


@pytest.fixture
def changed_weights(tiny_timm, tmp_path):
    """Returns a function that copies the folder of test_resnet with changed weights."""
    from safetensors.torch import load_file, save_file

    def make(name, change):
        folder = tmp_path / name
        shutil.copytree(tiny_timm["test_resnet"].removeprefix("local-dir:"), folder)
        weights = {key: change(value) for key, value in load_file(folder / "model.safetensors").items()}
        save_file(weights, folder / "model.safetensors")
        return f"local-dir:{folder}"

    return make


def test_rank_reads_names_from_file_and_lists_failures(images, tiny_timm, changed_weights, tmp_path, capsys):
    nan = changed_weights("nan", lambda value: value * float("nan") if value.is_floating_point() else value)
    zero = changed_weights("zero", torch.zeros_like)
    names = [*tiny_timm.values(), "test_rsnet", nan, zero, f"local-dir:{tmp_path / 'missing'}"]
    file = tmp_path / "models.txt"
    file.write_text("# candidates\n\n" + "  # a comment\n".join([*names, names[0]]))
    cli.main(["rank", str(images), "--models", str(file), "--output", str(tmp_path / "out"), "--explain"])
    printed = capsys.readouterr().out
    ranking = json.loads((tmp_path / "out" / "rank.json").read_text())
    assert sorted(ranking["order"]) == sorted(tiny_timm.values()) and ranking["rows"] == 36
    problems = {each["name"]: each["problem"] for each in ranking["candidates"] if each["problem"]}
    assert list(problems) == names[3:]
    assert "Did you mean 'test_resnet'" in problems["test_rsnet"]
    assert "NaN or infinite" in problems[nan] and "equal in all 36 rows" in problems[zero]
    assert "not a folder with config.json" in problems[names[-1]]
    for each in ranking["candidates"][:3]:
        head = each["features"]["head"]
        assert set(head["scores"]) == {"linear probe", "LogME", "H-score", "k-NN", "NCE", "LEEP"}
        assert each["source_classes"] == 5 and each["parameters"] > 0 and each["input_size"] == "32 x 32"
        for score in head["scores"].values():
            low, high = score["interval"]
            assert low - 1e-9 <= score["value"] <= high + 1e-9
            assert score["ranks"][0] <= score["rank"] <= score["ranks"][1] and 0 <= score["first"] <= 1
    probes = [each["features"]["head"]["scores"]["linear probe"]["value"] for each in ranking["candidates"][:3]]
    assert probes == sorted(probes, reverse=True)
    sizes = {each["name"]: each["parameters"] for each in ranking["candidates"][:3]}
    assert ranking["baseline"]["by_size"] == sorted(sizes, key=sizes.get, reverse=True)
    page = (tmp_path / "out" / "rank.html").read_text()
    for text in ("Backbone ranking", "Score and cost", "<svg", "Size baseline", "test_rsnet", "You et al. 2021"):
        assert text in page
    for text in ("Ranked by linear probe", "Size baseline", "[You et al. 2021", "test_rsnet: model.name"):
        assert text in printed


def test_rank_texts_scores_layers_and_reuses_cache(texts, tiny_bert, tmp_path):
    from transformers import BertModel

    shallow = tmp_path / "shallow"
    shutil.copytree(tiny_bert, shallow)
    BertModel.from_pretrained(tiny_bert, num_hidden_layers=1).save_pretrained(shallow)
    data = hftl.DataConfig(source=str(texts))
    pooled = hftl.ModelConfig(pooling="mean")
    first = rank(data, [tiny_bert, str(shallow), "test_resnet"], rows=48, output=None, model=pooled)
    assert first.rows == 48 and set(first.scores) == {"head", "layer mean"}
    assert [each.problem is None for each in first.candidates] == [True, True, False]
    for name in first.order:
        assert set(first.scores["layer mean"]["LogME"]) == set(first.order), name
    for each in first.candidates[:2]:
        if each.name == str(shallow):  # with one layer, the layer mean is the last layer
            values = [view.estimates["LogME"].value for view in each.views.values()]
            assert values[0] == pytest.approx(values[1], abs=1e-5)
    again = rank(data, [tiny_bert, str(shallow)], rows=48, output=None, model=pooled)
    assert again.scores == first.scores
    assert again.candidates[0].head.forward_seconds == first.candidates[0].head.forward_seconds


def test_source_probabilities_match_checkpoint(images, tiny_timm):
    import timm

    run = hftl.RunConfig(hftl.DataConfig(source=str(images)), hftl.ModelConfig(name=tiny_timm["test_vit"]))
    task = hftl.ImageClassification(splits := hftl.load_splits(run.data))
    model = hftl.build_model(run, task.head).eval()
    pixels = task.collate(task.encode(splits["train"], model.processor, None, None).fetch(range(8), 0))["inputs"]
    original = timm.create_model(tiny_timm["test_vit"], pretrained=True).eval()
    with torch.no_grad():
        features = model.net.forward_head(model.net.forward_features(pixels["pixel_values"]), pre_logits=True)
        expected = original(pixels["pixel_values"]).softmax(1)
    probabilities = source_probabilities(run, task, features.numpy())
    assert np.abs(probabilities - expected.numpy()).max() < 1e-5


def test_rank_scores_pretrained_text_head_with_nce_and_leep(texts, tiny_bert, tmp_path):
    from transformers import BertForSequenceClassification

    shutil.copytree(tiny_bert, tmp_path / "headed")
    BertForSequenceClassification.from_pretrained(tiny_bert, num_labels=4).save_pretrained(tmp_path / "headed")
    ranking = rank(str(texts), [str(tmp_path / "headed"), tiny_bert], output=None)
    assert {each.name: each.source_classes for each in ranking.candidates} == {
        str(tmp_path / "headed"): 4,
        tiny_bert: None,
    }
    assert set(ranking.scores["head"]["LEEP"]) == {str(tmp_path / "headed")}


def test_rank_supports_custom_multi_label_and_regression(tiny_timm, tmp_path):
    names = ["embedded:letters", tiny_timm["test_resnet"]]
    found = rank("embedded:digits", names, task=DigitTraits, rows=150, output=tmp_path)
    assert found.kind == "labels" and found.order[0] == "embedded:letters"
    assert set(found.scores["head"]) == {"linear probe", "LogME", "H-score", "k-NN"}
    assert 0.9 < found.scores["head"]["linear probe"]["embedded:letters"].value <= 1
    found = rank("embedded:digits", names, task=DigitRegression, rows=150, output=tmp_path)
    assert found.kind == "values" and found.order[0] == "embedded:letters"
    assert set(found.scores["head"]) == {"linear probe", "LogME", "k-NN"}
    assert "R²" in (tmp_path / "rank.html").read_text()
    with pytest.raises(ConfigError, match="'H-score' does not support labels of kind 'values'"):
        rank("embedded:digits", names, task=DigitRegression, by="H-score", output=None)


def test_rank_rejects_invalid_arguments(images, texts, tiny_timm, tmp_path):
    with pytest.raises(ModelError, match="no_such_model"):
        rank(str(images), ["no_such_model"], output=None)
    with pytest.raises(ConfigError, match="contains no model name"):
        rank(str(images), [], output=None)
    with pytest.raises(ConfigError, match="Did you mean 'LogME'"):
        rank(str(images), ["a"], by="LogMe", output=None)
    with pytest.raises(ConfigError, match="cannot be created"):
        (tmp_path / "file").write_text("x")
        rank(str(images), ["a"], output=tmp_path / "file" / "out")
    shutil.copytree(images / "train" / "blue", tmp_path / "one" / "train" / "blue")
    with pytest.raises(DataError, match="class"):
        rank(str(tmp_path / "one"), [tiny_timm["test_resnet"]], output=None)


def test_candidate_names_reads_list_or_file(tmp_path):
    file = tmp_path / "models.txt"
    file.write_text("a\n# b\n c # d\na\n")
    assert candidate_names(file) == candidate_names([str(file)]) == ["a", "c"]
    assert candidate_names("resnet18") == ["resnet18"]
    file.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="cannot be read as text"):
        candidate_names(file)


def test_short_names_preserves_ambiguous_folders(tmp_path):
    for name in ("x/small", "y/small", "y/large"):
        (tmp_path / name).mkdir(parents=True)
    names = [f"local-dir:{tmp_path}/x/small", str(tmp_path / "y/small"), str(tmp_path / "y/large"), "user/net"]
    assert list(short_names(names).values()) == [names[0], names[1], "large", "user/net"]


def test_compare_scores_pairs_resamples_by_row():
    rng = np.random.default_rng(0)
    influence, noise = rng.normal(size=500), 0.05 * rng.normal(size=500)
    influence, noise = influence - influence.mean(), noise - noise.mean()
    scores = compare_scores(
        {
            "a": Estimate(0.70, influence),
            "b": Estimate(0.69, influence + noise),
            "c": Estimate(0.69, -influence),
            "d": Estimate(0.7, influence),
        }
    )
    assert scores["a"].interval[0] < 0.65 < 0.75 < scores["a"].interval[1]  # scores overlap, paired ranks do not
    assert scores["a"].rank == scores["d"].rank == 1 and scores["a"].ranks[0] == 1
    assert scores["b"].rank == 3 and scores["b"].first < 0.01
    assert 0.3 < scores["c"].first < 0.7 and scores["c"].ranks == (1, 4)
    width = scores["a"].interval[1] - scores["a"].interval[0]
    assert width == pytest.approx(2 * 1.96 * Estimate(0.7, influence).standard_error, rel=0.1)
    assert compare_scores({}) == {}


def test_public_rank_is_ranking_function():
    assert hftl.rank is rank and Path(hftl.rank.__code__.co_filename).name == "ranking.py"
