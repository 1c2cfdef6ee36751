"""Security of checkpoints and saved models: remote code, pickle files and local paths are rejected without opt-in."""

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
pathlib.Path({marker!r}).write_text("executed")
from transformers import BertConfig, BertForSequenceClassification


class OddConfig(BertConfig):
    model_type = "odd"


class OddForSequenceClassification(BertForSequenceClassification):
    config_class = OddConfig
"""


class PickleExploit:
    """Object whose unpickling writes the marker file."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return Path.write_text, (Path(self.marker), "executed")


@pytest.fixture
def marker(tmp_path):
    """File that is written by executed code of a checkpoint."""
    return tmp_path / "executed"


@pytest.fixture
def copy_bert(tiny_bert, tmp_path):
    """Returns a function that copies the tiny BERT, with changes to its JSON files."""

    def make(files=None, **changes):
        folder = tmp_path / "checkpoint"
        shutil.copytree(tiny_bert, folder)
        for name, content in {"config.json": changes, **(files or {})}.items():
            path = folder / name
            values = json.loads(path.read_text()) if path.is_file() else {}
            path.write_text(json.dumps(values | content))
        return folder

    return make


def write_remote_code(copy_bert, marker, module="modeling_odd"):
    """Returns a checkpoint of an unknown model type with its own modeling file."""
    auto_map = {"AutoConfig": f"{module}.OddConfig", SPEC.model_class: f"{module}.OddForSequenceClassification"}
    folder = copy_bert(model_type="odd", auto_map=auto_map)
    (folder / "modeling_odd.py").write_text(CODE.format(marker=str(marker)))
    return folder


def build_text(folder, **options):
    return build(RunConfig(model=ModelConfig(name=str(folder), **options)), SPEC)


def test_untrusted_remote_code_raises_and_names_opt_in(copy_bert, marker):
    folder = write_remote_code(copy_bert, marker)
    with pytest.raises(ModelError) as caught:
        build_text(folder)
    message = str(caught.value)
    assert "'odd'" in message and "modeling_odd.OddConfig" in message and "--model.trust_remote_code true" in message
    assert not marker.exists()


def test_remote_code_in_trusted_folder_runs(copy_bert, marker):
    model = build_text(write_remote_code(copy_bert, marker), trust_remote_code=True)
    assert marker.exists() and type(model.net).__name__ == "OddForSequenceClassification" and model.trusted


def test_remote_code_of_known_model_type_is_not_run(copy_bert, marker):
    folder = copy_bert(
        auto_map={SPEC.model_class: "modeling_odd.OddForSequenceClassification", "AutoConfig": "modeling_odd.OddConfig"}
    )
    (folder / "modeling_odd.py").write_text(CODE.format(marker=str(marker)))
    assert type(build_text(folder).net).__name__ == "BertForSequenceClassification" and not marker.exists()


def test_trusted_folder_rejects_code_of_other_repository(copy_bert, marker):
    with pytest.raises(ModelError, match="is in another repository .*owner/else--modeling_odd"):
        build_text(write_remote_code(copy_bert, marker, module="owner/else--modeling_odd"), trust_remote_code=True)


@pytest.mark.parametrize("key", ["_attn_implementation", "attn_implementation", "_attn_implementation_internal"])
def test_model_config_rejects_kernels_from_hub(key, copy_bert):
    with pytest.raises(ModelError, match="kernel from the Hub .*owner/attention"):
        build_text(copy_bert(**{key: "owner/attention"}))


@pytest.mark.parametrize("revision", [None, "main", "v1.0", COMMIT[:7], COMMIT.upper(), COMMIT + "0"])
def test_remote_code_from_hub_requires_full_commit_hash(revision, text_run):
    run = text_run()
    run = replace(run, model=replace(run.model, name="owner/model", revision=revision, trust_remote_code=True))
    with pytest.raises(ConfigError, match=r"runs only at a commit.* set model\.revision .*40 characters"):
        hftl.setup_run(run, hftl.TextClassification)
    pinned = replace(run, model=replace(run.model, revision=COMMIT))
    assert trust_problems(pinned) == [] and model_name_problem(ModelConfig("owner/model"), SPEC.model_class) is None


def test_missing_commit_is_reported_with_other_problems(text_run):
    run = text_run(batch_size_per_device=0)
    run = replace(run, model=replace(run.model, name="owner/model", trust_remote_code=True))
    with pytest.raises(ConfigError) as caught:
        hftl.setup_run(run, hftl.TextClassification)
    assert len(caught.value.problems) == 2


@pytest.mark.parametrize("kind", ["default", "mean"])
def test_text_checkpoint_rejects_pickle(kind, copy_bert, marker):
    folder = copy_bert()
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(PickleExploit(marker)))
    with pytest.raises(ModelError, match=r"weights only as a pickle \(pytorch_model\.bin\).*model\.safetensors"):
        build_text(folder, pooling=kind)
    torch.save({}, folder / "pytorch_model.bin")  # harmless pickles are rejected too
    with pytest.raises(ModelError, match="only as a pickle"):
        build_text(folder, pooling=kind)
    assert not marker.exists()


@pytest.mark.parametrize("file", ["pytorch_model.bin", "model.pth"])
def test_timm_folder_rejects_pickle(file, tiny_timm, image_run, tmp_path, marker):
    folder = tmp_path / "net"
    shutil.copytree(tiny_timm["test_resnet"].removeprefix("local-dir:"), folder)
    (folder / "model.safetensors").unlink()
    (folder / file).write_bytes(pickle.dumps(PickleExploit(marker)))
    run = replace(image_run(), model=ModelConfig(name=f"local-dir:{folder}"))
    with pytest.raises(ModelError, match=f"weights only as a pickle .{file}"):
        build_model(run, HeadSpec("timm", 3))
    assert not marker.exists()


def test_timm_model_from_hub_rejects_pickle(hub, tiny_timm, image_run, tmp_path, marker):
    from huggingface_hub import HfApi

    folder = tmp_path / "net"
    shutil.copytree(tiny_timm["test_resnet"].removeprefix("local-dir:"), folder)
    api = HfApi()
    api.create_repo("alice/net")
    run = replace(image_run(), model=ModelConfig(name="hf-hub:alice/net"))
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(PickleExploit(marker)))
    api.upload_folder(repo_id="alice/net", folder_path=folder)
    with pytest.raises(ModelError, match=r"weights only as a pickle \(pytorch_model\.bin\)"):
        build_model(run, HeadSpec("timm", 3))
    (folder / "model.safetensors").write_bytes(weights)
    api.upload_folder(repo_id="alice/net", folder_path=folder)
    assert build_model(run, HeadSpec("timm", 3)).spec.num_outputs == 3 and not marker.exists()


@pytest.mark.parametrize("key", ["vocab_file", "tokenizer_file", "merges_file"])
def test_tokenizer_rejects_paths_of_local_files(key, copy_bert, tmp_path):
    secret = tmp_path / "secret.env"
    secret.write_text("KEY=very-secret")
    for value in (str(secret), "../secret.env"):
        shutil.rmtree(tmp_path / "checkpoint", ignore_errors=True)
        with pytest.raises(ModelError, match=f"names local files outside the checkpoint .*{key}"):
            build_text(copy_bert(files={"tokenizer_config.json": {key: value}}))
    shutil.rmtree(tmp_path / "checkpoint")
    # paths that do not exist are accepted: many checkpoints contain paths of the machine of their author
    model = build_text(
        copy_bert(files={"tokenizer_config.json": {key: "/root/.cache/huggingface/0a1b", "name_or_path": "x/y"}})
    )
    model.save(tmp_path / "saved")
    assert not any(b"very-secret" in file.read_bytes() for file in (tmp_path / "saved").iterdir())


@pytest.mark.parametrize("name", ["owner/metric", "../metric", "/tmp/metric"])
def test_metrics_reject_third_party_code(name, monkeypatch):
    monkeypatch.setattr("evaluate.load", lambda *_: pytest.fail("fetched"))
    assert "is third-party code on the Hub. Download and review it" in metric_problems([name])[0]


def test_metrics_accept_library_names_and_local_scripts(tmp_path, monkeypatch):
    monkeypatch.setattr("evaluate.load", lambda name: name)
    script = tmp_path / "mine" / "mine.py"
    script.parent.mkdir()
    script.write_text("")
    for name in ("f1", str(script), str(script.parent)):
        assert load_evaluate(name) == name


# saved and pushed models


@pytest.fixture(scope="module")
def pooled(texts, tiny_bert, tmp_path_factory) -> Path:
    """Finished run of a pooled text model, saved with its modeling file."""
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


def tamper(pooled: Path, tmp_path: Path, ran: Path) -> Path:
    """Returns a copy of a run whose modeling file writes the marker."""
    folder = tmp_path / "tampered"
    shutil.copytree(pooled, folder)
    file = folder / "model" / "modeling_pooled_text.py"
    file.write_text(f"import pathlib\npathlib.Path({str(marker)!r}).write_text('executed')\n" + file.read_text())
    return folder


def test_load_does_not_run_code_of_saved_model(pooled, texts, tmp_path, marker):
    from hftl.inference.batch_inference import evaluate_saved, predict_to_file

    folder = tamper(pooled, tmp_path, marker)
    assert hftl.load(folder).predict(["the cat"])[0]["prediction"] in ("animal", "food", "tool")
    evaluate_saved(str(folder), str(texts / "test.csv"), split="train")
    predict_to_file(str(folder / "model"), "the cat")
    assert not marker.exists()


def test_load_does_not_run_code_of_pushed_model(hub, pooled, tmp_path, marker):
    from huggingface_hub import HfApi

    folder = tamper(pooled, tmp_path, marker)
    api = HfApi()
    api.create_repo("alice/model")
    commit = api.upload_folder(repo_id="alice/model", folder_path=folder / "model").oid
    assert hftl.load("alice/model").labels == ["animal", "food", "tool"]
    modeling_file = Path(hftl.__file__).parent / "models" / "modeling_pooled_text.py"
    with pytest.raises(ArtifactError, match="modeling_pooled_text.py differs from hftl's; the code was not run"):
        check_own_code("alice/model", commit, modeling_file)
    model, _ = hftl.load_model_and_task(pooled)
    with pytest.raises(ArtifactError, match="was not run"):
        model.loaders("alice/model", commit)
    assert not marker.exists()
    verified = api.upload_folder(repo_id="alice/model", folder_path=pooled / "model").oid
    assert set(model.loaders("alice/model", verified)) == {"transformers"}


def test_load_does_not_run_code_named_by_config(pooled, tmp_path, marker):
    folder = tamper(pooled, tmp_path, marker)
    config = json.loads((folder / "model" / "config.json").read_text())
    config["auto_map"] = {name: "evil." + path.partition(".")[2] for name, path in config["auto_map"].items()}
    (folder / "model" / "config.json").write_text(json.dumps(config))
    (folder / "model" / "evil.py").write_text((folder / "model" / "modeling_pooled_text.py").read_text())
    hftl.load(folder)
    assert not marker.exists()


def test_load_ignores_trust_remote_code_of_saved_config(pooled, tmp_path, copy_bert, marker):
    """hftl_config.yaml of the saved model sets trust_remote_code: true, and config.json needs remote code."""
    folder = tamper(pooled, tmp_path, marker)
    text = (folder / "model" / CONFIG).read_text()
    (folder / "model" / CONFIG).write_text(text.replace("trust_remote_code: false", "trust_remote_code: true"))
    config = json.loads((folder / "model" / "config.json").read_text()) | {"model_type": "odd"}
    (folder / "model" / "config.json").write_text(json.dumps(config))
    with pytest.raises(HftlError):
        hftl.load(folder)
    assert not marker.exists()


def test_load_rejects_pickle_weights(pooled, tmp_path, marker):
    folder = tmp_path / "pickled"
    shutil.copytree(pooled, folder)
    weights = load_file(folder / "model" / "model.safetensors")
    (folder / "model" / "model.safetensors").unlink()
    for content in (pickle.dumps(PickleExploit(marker)), None):
        path = folder / "model" / "pytorch_model.bin"
        path.write_bytes(content) if content else torch.save(weights, path)
        with pytest.raises(ArtifactError, match="does not open|cannot be loaded"):
            hftl.load(folder)
    assert not marker.exists()
