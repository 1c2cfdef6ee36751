"""Candidates are ranked by their features, a bad one is a row with its reason, and tasks of one's own work too."""

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


class Brightness:
    """The class number as a number to be predicted."""

    columns, problems, best_metric = ["label"], [], "loss"

    def head(self, model_class):
        return HeadSpec(model_class, 1, (), "regression")

    def labels(self, examples):
        return torch.tensor([[float(row["label"]) + 0.25] for row in examples])

    def state(self):
        return {}


class Bright(hftl.SupervisedTask):
    """Images of digits with a number each."""

    name, model_class = "bright", "timm"

    def __init__(self, splits):
        super().__init__(ImageInputs.find(splits), Brightness())


class EvenAndLarge(Brightness):
    """Two labels at once."""

    def head(self, model_class):
        return HeadSpec(model_class, 2, ("even", "large"), "multi_label_classification")

    def labels(self, examples):
        return torch.tensor([[float(row["label"] % 2 == 0), float(row["label"] > 4)] for row in examples])


class Traits(hftl.SupervisedTask):
    """Images of digits with two labels each."""

    name, model_class = "traits", "timm"

    def __init__(self, splits):
        super().__init__(ImageInputs.find(splits), EvenAndLarge())


@pytest.fixture
def spoilt(tiny_timm, tmp_path):
    """Returns a function that copies test_resnet's folder with other weights."""
    from safetensors.torch import load_file, save_file

    def make(name, change):
        folder = tmp_path / name
        shutil.copytree(tiny_timm["test_resnet"].removeprefix("local-dir:"), folder)
        weights = {key: change(value) for key, value in load_file(folder / "model.safetensors").items()}
        save_file(weights, folder / "model.safetensors")
        return f"local-dir:{folder}"

    return make


def test_images_are_ranked_from_a_file_and_bad_candidates_are_rows(images, tiny_timm, spoilt, tmp_path, capsys):
    nan = spoilt("nan", lambda value: torch.full_like(value, float("nan")) if value.is_floating_point() else value)
    flat = spoilt("flat", torch.zeros_like)
    names = [*tiny_timm.values(), "test_rsnet", nan, flat, f"local-dir:{tmp_path / 'absent'}"]
    file = tmp_path / "models.txt"
    file.write_text("# candidates\n\n" + "  # a comment\n".join([*names, names[0]]))
    cli.main(["rank", str(images), "--models", str(file), "--output", str(tmp_path / "out"), "--explain"])
    said = capsys.readouterr().out
    found = json.loads((tmp_path / "out" / "rank.json").read_text())
    assert sorted(found["order"]) == sorted(tiny_timm.values()) and found["rows"] == 36
    problems = {each["name"]: each["problem"] for each in found["candidates"] if each["problem"]}
    assert list(problems) == names[3:]
    assert "Did you mean 'test_resnet'" in problems["test_rsnet"]
    assert "NaN or infinite" in problems[nan] and "equal in all 36 rows" in problems[flat]
    assert "not a folder with config.json" in problems[names[-1]]
    for each in found["candidates"][:3]:
        head = each["features"]["head"]
        assert set(head["scores"]) == {"linear probe", "LogME", "H-score", "k-NN", "NCE", "LEEP"}
        assert each["source_classes"] == 5 and each["parameters"] > 0 and each["input_size"] == "32 x 32"
        for score in head["scores"].values():
            low, high = score["interval"]
            assert low - 1e-9 <= score["value"] <= high + 1e-9
            assert score["ranks"][0] <= score["rank"] <= score["ranks"][1] and 0 <= score["first"] <= 1
    probes = [each["features"]["head"]["scores"]["linear probe"]["value"] for each in found["candidates"][:3]]
    assert probes == sorted(probes, reverse=True)
    sizes = {each["name"]: each["parameters"] for each in found["candidates"][:3]}
    assert found["baseline"]["by_size"] == sorted(sizes, key=sizes.get, reverse=True)
    page = (tmp_path / "out" / "rank.html").read_text()
    for words in ("Which backbone?", "Cost and quality", "<svg", "Baseline to beat", "test_rsnet", "You et al. 2021"):
        assert words in page
    for words in ("Ranked by linear probe", "By size alone", "[You et al. 2021", "test_rsnet: model.name"):
        assert words in said


def test_texts_are_ranked_by_head_and_layer_mean_and_from_the_cache_the_second_time(texts, tiny_bert, tmp_path):
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
        if each.name == str(shallow):  # its one layer is the mean of its layers
            values = [view.estimates["LogME"].value for view in each.views.values()]
            assert values[0] == pytest.approx(values[1], abs=1e-5)
    again = rank(data, [tiny_bert, str(shallow)], rows=48, output=None, model=pooled)
    assert again.scores == first.scores
    assert again.candidates[0].head.forward_seconds == first.candidates[0].head.forward_seconds


def test_source_probabilities_are_what_the_checkpoint_says(images, tiny_timm):
    import timm

    run = hftl.RunConfig(hftl.DataConfig(source=str(images)), hftl.ModelConfig(name=tiny_timm["test_vit"]))
    task = hftl.ImageClassification(splits := hftl.load_splits(run.data))
    model = hftl.build_model(run, task.head).eval()
    pixels = task.collate(task.encode(splits["train"], model.processor, None, None).fetch(range(8), 0))["inputs"]
    original = timm.create_model(tiny_timm["test_vit"], pretrained=True).eval()
    with torch.no_grad():
        features = model.net.forward_head(model.net.forward_features(pixels["pixel_values"]), pre_logits=True)
        expected = original(pixels["pixel_values"]).softmax(1)
    found = source_probabilities(run, task, features.numpy())
    assert np.abs(found - expected.numpy()).max() < 1e-5


def test_a_text_checkpoint_with_a_head_of_its_own_has_nce_and_leep(texts, tiny_bert, tmp_path):
    from transformers import BertForSequenceClassification

    shutil.copytree(tiny_bert, tmp_path / "headed")
    BertForSequenceClassification.from_pretrained(tiny_bert, num_labels=4).save_pretrained(tmp_path / "headed")
    found = rank(str(texts), [str(tmp_path / "headed"), tiny_bert], output=None)
    assert {each.name: each.source_classes for each in found.candidates} == {
        str(tmp_path / "headed"): 4,
        tiny_bert: None,
    }
    assert set(found.scores["head"]["LEEP"]) == {str(tmp_path / "headed")}


def test_regression_and_several_labels_of_tasks_of_ones_own(tiny_timm, tmp_path):
    names = ["embedded:letters", tiny_timm["test_resnet"]]
    found = rank("embedded:digits", names, task=Traits, rows=150, output=tmp_path)
    assert found.kind == "labels" and found.order[0] == "embedded:letters"
    assert set(found.scores["head"]) == {"linear probe", "LogME", "H-score", "k-NN"}
    assert 0.9 < found.scores["head"]["linear probe"]["embedded:letters"].value <= 1
    found = rank("embedded:digits", names, task=Bright, rows=150, output=tmp_path)
    assert found.kind == "values" and found.order[0] == "embedded:letters"
    assert set(found.scores["head"]) == {"linear probe", "LogME", "k-NN"}
    assert "R²" in (tmp_path / "rank.html").read_text()
    with pytest.raises(ConfigError, match="H-score is not defined"):
        rank("embedded:digits", names, task=Bright, by="H-score", output=None)


def test_what_cannot_be_ranked_is_refused(images, texts, tiny_timm, tmp_path):
    with pytest.raises(ModelError, match="no_such_one"):
        rank(str(images), ["no_such_one"], output=None)
    with pytest.raises(ConfigError, match="no name of a model"):
        rank(str(images), [], output=None)
    with pytest.raises(ConfigError, match="Did you mean 'LogME'"):
        rank(str(images), ["a"], by="LogMe", output=None)
    with pytest.raises(ConfigError, match="cannot be created"):
        (tmp_path / "file").write_text("x")
        rank(str(images), ["a"], output=tmp_path / "file" / "out")
    shutil.copytree(images / "train" / "blue", tmp_path / "one" / "train" / "blue")
    with pytest.raises(DataError, match="class"):
        rank(str(tmp_path / "one"), [tiny_timm["test_resnet"]], output=None)


def test_names_come_from_a_list_or_a_file(tmp_path):
    file = tmp_path / "models.txt"
    file.write_text("a\n# b\n c # d\na\n")
    assert candidate_names(file) == candidate_names([str(file)]) == ["a", "c"]
    assert candidate_names("resnet18") == ["resnet18"]
    file.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="cannot be read as text"):
        candidate_names(file)


def test_folders_are_shown_by_their_last_part_where_that_tells_them_apart(tmp_path):
    for name in ("x/small", "y/small", "y/large"):
        (tmp_path / name).mkdir(parents=True)
    names = [f"local-dir:{tmp_path}/x/small", str(tmp_path / "y/small"), str(tmp_path / "y/large"), "user/net"]
    assert list(short_names(names).values()) == [names[0], names[1], "large", "user/net"]


def test_ranks_over_resamples_are_paired_by_row():
    rng = np.random.default_rng(0)
    hard, little = rng.normal(size=500), 0.05 * rng.normal(size=500)
    hard, little = hard - hard.mean(), little - little.mean()
    found = compare_scores(
        {
            "a": Estimate(0.70, hard),
            "b": Estimate(0.69, hard + little),
            "c": Estimate(0.69, -hard),
            "d": Estimate(0.7, hard),
        }
    )
    assert found["a"].interval[0] < 0.65 < 0.75 < found["a"].interval[1]  # blurred alone, clear beside each other
    assert found["a"].rank == found["d"].rank == 1 and found["a"].ranks[0] == 1
    assert found["b"].rank == 3 and found["b"].first < 0.01
    assert 0.3 < found["c"].first < 0.7 and found["c"].ranks == (1, 4)
    spread = found["a"].interval[1] - found["a"].interval[0]
    assert spread == pytest.approx(2 * 1.96 * Estimate(0.7, hard).standard_error, rel=0.1)
    assert compare_scores({}) == {}


def test_the_public_name_is_the_function():
    assert hftl.rank is rank and Path(hftl.rank.__code__.co_filename).name == "ranking.py"
