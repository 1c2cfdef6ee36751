"""Nothing that a repository or a data folder brings along is run unasked: no code, no pickle, no foreign file."""

import json
import pickle
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import hftl
from hftl.artifacts.locate import CONFIG
from hftl.config.schema import ModelConfig, RunConfig
from hftl.errors import ArtifactError, ConfigError, HftlError, ModelError
from hftl.models.build import build_model, model_name_problem, trust_problems
from hftl.models.remote_code import check_own_code
from hftl.models.task_model import HeadSpec
from hftl.models.text_model import build
from hftl.tasks.metrics import load_evaluate, metric_problems

SPEC = HeadSpec("AutoModelForSequenceClassification", 3, ("a", "b", "c"), "single_label_classification")
COMMIT = "0123456789abcdef0123456789abcdef01234567"
CODE = """
import pathlib
pathlib.Path({ran!r}).write_text("ran")
from transformers import BertConfig, BertForSequenceClassification


class OddConfig(BertConfig):
    model_type = "odd"


class OddForSequenceClassification(BertForSequenceClassification):
    config_class = OddConfig
"""


class Bomb:
    def __init__(self, ran):
        self.ran = ran

    def __reduce__(self):
        return Path.write_text, (Path(self.ran), "ran")


@pytest.fixture
def ran(tmp_path):
    """A file that hostile code would write; it must not be there in the end."""
    return tmp_path / "it_ran"


@pytest.fixture
def copied(tiny_bert, tmp_path):
    """Returns a function that copies the tiny BERT, with changes to its JSON files."""

    def make(files=None, **changes):
        folder = tmp_path / "checkpoint"
        shutil.copytree(tiny_bert, folder)
        for name, content in {"config.json": changes, **(files or {})}.items():
            path = folder / name
            described = json.loads(path.read_text()) if path.is_file() else {}
            path.write_text(json.dumps(described | content))
        return folder

    return make


def odd(copied, ran, place="modeling_odd", **more):
    auto = {"AutoConfig": f"{place}.OddConfig", SPEC.model_class: f"{place}.OddForSequenceClassification"}
    folder = copied(model_type="odd", auto_map=auto | more)
    (folder / "modeling_odd.py").write_text(CODE.format(ran=str(ran)))
    return folder


def build_text(folder, **options):
    return build(RunConfig(model=ModelConfig(name=str(folder), **options)), SPEC)


def test_code_of_a_checkpoint_is_not_run_and_the_message_says_how_it_could_be(copied, ran):
    folder = odd(copied, ran)
    with pytest.raises(ModelError) as caught:
        build_text(folder)
    message = str(caught.value)
    assert "'odd'" in message and "modeling_odd.OddConfig" in message and "--model.trust_remote_code true" in message
    assert not ran.exists()


def test_code_of_a_folder_runs_when_it_is_trusted(copied, ran):
    model = build_text(odd(copied, ran), trust_remote_code=True)
    assert ran.exists() and type(model.net).__name__ == "OddForSequenceClassification" and model.trusted


def test_code_beside_a_known_model_is_not_needed_and_not_run(copied, ran):
    folder = copied(
        auto_map={SPEC.model_class: "modeling_odd.OddForSequenceClassification", "AutoConfig": "modeling_odd.OddConfig"}
    )
    (folder / "modeling_odd.py").write_text(CODE.format(ran=str(ran)))
    assert type(build_text(folder).net).__name__ == "BertForSequenceClassification" and not ran.exists()


def test_code_in_another_repository_is_refused_even_when_trusted(copied, ran):
    with pytest.raises(ModelError, match="is in another repository .*somebody/else--modeling_odd"):
        build_text(odd(copied, ran, place="somebody/else--modeling_odd"), trust_remote_code=True)


@pytest.mark.parametrize("key", ["_attn_implementation", "attn_implementation", "_attn_implementation_internal"])
def test_kernels_from_the_hub_are_refused(key, copied):
    with pytest.raises(ModelError, match="kernel from the Hub .*somebody/attention"):
        build_text(copied(**{key: "somebody/attention"}))


@pytest.mark.parametrize("revision", [None, "main", "v1.0", COMMIT[:7], COMMIT.upper(), COMMIT + "0"])
def test_code_of_the_hub_needs_a_whole_commit(revision, text_run):
    run = text_run()
    run = replace(run, model=replace(run.model, name="somebody/model", revision=revision, trust_remote_code=True))
    with pytest.raises(ConfigError, match=r"runs only at a commit.* set model\.revision .*40 characters"):
        hftl.setup_run(run, hftl.TextClassification)
    pinned = replace(run, model=replace(run.model, revision=COMMIT))
    assert trust_problems(pinned) == [] and model_name_problem(ModelConfig("somebody/model"), SPEC.model_class) is None


def test_the_missing_commit_is_said_with_everything_else(text_run):
    run = text_run(batch_size_per_device=0)
    run = replace(run, model=replace(run.model, name="somebody/model", trust_remote_code=True))
    with pytest.raises(ConfigError) as caught:
        hftl.setup_run(run, hftl.TextClassification)
    assert len(caught.value.problems) == 2


@pytest.mark.parametrize("kind", ["default", "mean"])
def test_a_text_checkpoint_that_is_a_pickle_is_not_opened(kind, copied, ran):
    folder = copied()
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb(ran)))
    with pytest.raises(ModelError, match=r"weights only as a pickle \(pytorch_model\.bin\).*model\.safetensors"):
        build_text(folder, pooling=kind)
    torch.save({}, folder / "pytorch_model.bin")  # nor a harmless one
    with pytest.raises(ModelError, match="only as a pickle"):
        build_text(folder, pooling=kind)
    assert not ran.exists()


@pytest.mark.parametrize("file", ["pytorch_model.bin", "model.pth"])
def test_a_timm_folder_that_is_a_pickle_is_not_opened(file, tiny_timm, image_run, tmp_path, ran):
    folder = tmp_path / "net"
    shutil.copytree(tiny_timm["test_resnet"].removeprefix("local-dir:"), folder)
    (folder / "model.safetensors").unlink()
    (folder / file).write_bytes(pickle.dumps(Bomb(ran)))
    run = replace(image_run(), model=ModelConfig(name=f"local-dir:{folder}"))
    with pytest.raises(ModelError, match=f"weights only as a pickle .{file}"):
        build_model(run, HeadSpec("timm", 3))
    assert not ran.exists()


def test_a_timm_model_of_the_hub_that_is_a_pickle_is_not_opened(hub, tiny_timm, image_run, tmp_path, ran):
    from huggingface_hub import HfApi

    folder = tmp_path / "net"
    shutil.copytree(tiny_timm["test_resnet"].removeprefix("local-dir:"), folder)
    api = HfApi()
    api.create_repo("alice/net")
    run = replace(image_run(), model=ModelConfig(name="hf-hub:alice/net"))
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb(ran)))
    api.upload_folder(repo_id="alice/net", folder_path=folder)
    with pytest.raises(ModelError, match=r"weights only as a pickle \(pytorch_model\.bin\)"):
        build_model(run, HeadSpec("timm", 3))
    (folder / "model.safetensors").write_bytes(weights)
    api.upload_folder(repo_id="alice/net", folder_path=folder)
    assert build_model(run, HeadSpec("timm", 3)).spec.num_outputs == 3 and not ran.exists()


@pytest.mark.parametrize("key", ["vocab_file", "tokenizer_file", "merges_file"])
def test_a_tokenizer_cannot_take_files_of_this_machine_along(key, copied, tmp_path):
    secret = tmp_path / "secret.env"
    secret.write_text("KEY=very-secret")
    for value in (str(secret), "../secret.env"):
        shutil.rmtree(tmp_path / "checkpoint", ignore_errors=True)
        with pytest.raises(ModelError, match=f"names local files outside the checkpoint .*{key}"):
            build_text(copied(files={"tokenizer_config.json": {key: value}}))
    shutil.rmtree(tmp_path / "checkpoint")
    # many checkpoints name a file of the machine that they were made on
    model = build_text(
        copied(files={"tokenizer_config.json": {key: "/root/.cache/huggingface/0a1b", "name_or_path": "x/y"}})
    )
    model.save(tmp_path / "saved")
    assert not any(b"very-secret" in file.read_bytes() for file in (tmp_path / "saved").iterdir())


@pytest.mark.parametrize("name", ["somebody/metric", "../metric", "/tmp/metric"])
def test_metrics_that_are_somebodys_code_are_not_fetched(name, monkeypatch):
    monkeypatch.setattr("evaluate.load", lambda *_: pytest.fail("fetched"))
    assert "is third-party code on the Hub. Download and review it" in metric_problems([name])[0]


def test_metrics_of_the_library_and_of_this_machine_are_the_users_choice(tmp_path, monkeypatch):
    monkeypatch.setattr("evaluate.load", lambda name: name)
    script = tmp_path / "mine" / "mine.py"
    script.parent.mkdir()
    script.write_text("")
    for name in ("f1", str(script), str(script.parent)):
        assert load_evaluate(name) == name


# Saved and pushed models


@pytest.fixture(scope="module")
def pooled(texts, tiny_bert, tmp_path_factory) -> Path:
    """A finished run of our pooled class, which travels with its modelling file."""
    from conftest import load_recipe

    folder = tmp_path_factory.mktemp("pooled") / "run"
    run = hftl.RunConfig(
        hftl.DataConfig(source=str(texts)),
        ModelConfig(name=tiny_bert, pooling="mean"),
        train=hftl.TrainConfig(num_epochs=1, trackers=[], batch_size_per_device=8),
        output_dir=str(folder),
    )
    load_recipe("text_classification").main(run)
    return folder


def tampered(pooled: Path, tmp_path: Path, ran: Path) -> Path:
    folder = tmp_path / "tampered"
    shutil.copytree(pooled, folder)
    file = folder / "model" / "modeling_pooled_text.py"
    file.write_text(f"import pathlib\npathlib.Path({str(ran)!r}).write_text('ran')\n" + file.read_text())
    return folder


def test_a_file_in_a_saved_model_is_not_run(pooled, texts, tmp_path, ran):
    from hftl.inference.batch_inference import evaluate_saved, predict_to_file

    folder = tampered(pooled, tmp_path, ran)
    assert hftl.load(folder).predict(["the cat"])[0]["prediction"] in ("animal", "food", "tool")
    evaluate_saved(str(folder), str(texts / "test.csv"), split="train")
    predict_to_file(str(folder / "model"), "the cat")
    assert not ran.exists()


def test_a_file_in_a_pushed_model_is_not_run(hub, pooled, tmp_path, ran):
    from huggingface_hub import HfApi

    folder = tampered(pooled, tmp_path, ran)
    api = HfApi()
    api.create_repo("alice/model")
    commit = api.upload_folder(repo_id="alice/model", folder_path=folder / "model").oid
    assert hftl.load("alice/model").labels == ["animal", "food", "tool"]
    own = Path(hftl.__file__).parent / "models" / "modeling_pooled_text.py"
    with pytest.raises(ArtifactError, match="modeling_pooled_text.py differs from hftl's; the code was not run"):
        check_own_code("alice/model", commit, own)
    model, _ = hftl.load_model_and_task(pooled)
    with pytest.raises(ArtifactError, match="was not run"):
        model.loaders("alice/model", commit)
    assert not ran.exists()
    good = api.upload_folder(repo_id="alice/model", folder_path=pooled / "model").oid
    assert set(model.loaders("alice/model", good)) == {"transformers"}


def test_a_config_that_names_other_code_is_not_run(pooled, tmp_path, ran):
    folder = tampered(pooled, tmp_path, ran)
    config = json.loads((folder / "model" / "config.json").read_text())
    config["auto_map"] = {name: "evil." + place.partition(".")[2] for name, place in config["auto_map"].items()}
    (folder / "model" / "config.json").write_text(json.dumps(config))
    (folder / "model" / "evil.py").write_text((folder / "model" / "modeling_pooled_text.py").read_text())
    hftl.load(folder)
    assert not ran.exists()


def test_trust_written_into_a_saved_model_counts_for_nothing(pooled, tmp_path, copied, ran):
    """config.yaml of a model from elsewhere says trust_remote_code: true, and its config.json asks for code."""
    folder = tampered(pooled, tmp_path, ran)
    text = (folder / "model" / CONFIG).read_text()
    (folder / "model" / CONFIG).write_text(text.replace("trust_remote_code: false", "trust_remote_code: true"))
    config = json.loads((folder / "model" / "config.json").read_text()) | {"model_type": "odd"}
    (folder / "model" / "config.json").write_text(json.dumps(config))
    with pytest.raises(HftlError):
        hftl.load(folder)
    assert not ran.exists()


def test_a_saved_model_that_is_a_pickle_is_not_opened(pooled, tmp_path, ran):
    folder = tmp_path / "pickled"
    shutil.copytree(pooled, folder)
    weights = load_file(folder / "model" / "model.safetensors")
    (folder / "model" / "model.safetensors").unlink()
    for content in (pickle.dumps(Bomb(ran)), None):
        path = folder / "model" / "pytorch_model.bin"
        path.write_bytes(content) if content else torch.save(weights, path)
        with pytest.raises(ArtifactError, match="cannot be loaded"):
            hftl.load(folder)
    assert not ran.exists()
