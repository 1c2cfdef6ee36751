"""Push to the Hub, against a local Hub server: uploaded files, loading by repo id, failures and redaction of tokens."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import ROOT, USERS, load_recipe, run_python
from hub import COMMIT, CREATE, PREUPLOAD, WEIGHTS, Fault, User
from launch import ENV, free_port

import hftl
from hftl.artifacts.push import push
from hftl.errors import ArtifactError, ConfigError, PushError
from hftl.hub_client import explain, redact_tokens

ID = "alice/model"
lfs_by_default = pytest.mark.parametrize("hub", ["lfs", pytest.param("xet", marks=pytest.mark.slow)], indirect=True)
"""For tests that do not depend on the upload protocol; the other one is slow."""
xet_by_default = pytest.mark.parametrize("hub", [pytest.param("lfs", marks=pytest.mark.slow), "xet"], indirect=True)


def train_runs(images, texts, image_model, text_model, root: Path, **train) -> dict[str, Path]:
    """Returns finished runs of image and text classification, full and LoRA (texts: with a pooled head)."""
    folders = {}
    for kind in ("image", "text"):
        for method in ("full", "lora"):
            source, model = (images, image_model) if kind == "image" else (texts, text_model)
            run = hftl.RunConfig(
                hftl.DataConfig(source=str(source)),
                hftl.ModelConfig(name=model, pooling="mean" if method == "lora" else "default"),
                hftl.AdaptConfig(method=method),
                hftl.TrainConfig(lr=1e-3, head_lr=1e-2, batch_size_per_device=8, trackers=[], **train),
                output_dir=str(root / f"{kind}-{method}"),
            )
            load_recipe(f"{kind}_classification").main(run)
            folders[f"{kind}-{method}"] = Path(run.output_dir)
    return folders


@pytest.fixture(scope="session")
def runs(images, texts, tiny_timm, tiny_bert, tmp_path_factory) -> dict[str, Path]:
    models = tiny_timm["test_resnet"], tiny_bert
    return train_runs(images, texts, *models, tmp_path_factory.mktemp("runs"), num_epochs=1)


@pytest.fixture(scope="session")
def real_runs(shared, minilm, tmp_path_factory) -> dict[str, Path]:
    """Like `runs`, with real weights and data, 4 steps each."""
    weights = f"local-dir:{shared / 'weights/mobilenetv2_100'}"
    images, texts = shared / "image/hymenoptera", shared / "text/trec6"
    return train_runs(images, texts, weights, minilm, tmp_path_factory.mktemp("real"), max_steps=4)


LOAD_BY_REPO_ID = """
import json, sys, torch
from safetensors.torch import load_file
import peft, timm, transformers
for name, base, sample in json.loads(sys.argv[1]):
    repo = "alice/" + name
    stored = load_file(sample)
    inputs = {key[7:]: value for key, value in stored.items() if key.startswith("inputs.")}
    def equal(logits):
        torch.testing.assert_close(logits, stored["logits"], atol=1e-4, rtol=1e-4)
    with torch.no_grad():
        if name.startswith("image"):
            pipe = transformers.pipeline("image-classification", repo)
            equal(pipe.model(**inputs).logits)
            equal(transformers.AutoModelForImageClassification.from_pretrained(repo).eval()(**inputs).logits)
            equal(timm.create_model("hf-hub:" + repo, pretrained=True).eval()(inputs["pixel_values"]))
            if name.endswith("lora"):
                net = timm.create_model(base, pretrained=True, num_classes=stored["logits"].shape[1])
                net = peft.PeftModel.from_pretrained(net, repo, subfolder="adapter").eval()
                equal(net(inputs["pixel_values"]))
        else:
            trust = {"trust_remote_code": True} if name.endswith("lora") else {}
            pipe = transformers.pipeline("text-classification", repo, **trust)
            assert pipe("the cat")[0]["label"] in pipe.model.config.id2label.values()
            equal(pipe.model(**inputs).logits)
            model = transformers.AutoModelForSequenceClassification.from_pretrained(repo, **trust).eval()
            equal(model(**inputs).logits)
            if name.endswith("lora"):
                card = open(transformers.utils.cached_file(repo, "adapter/README.md")).read()
                scope = {}
                exec(card.split("```python")[1].split("```")[0], scope)  # usage code of the card
                equal(scope["model"](**inputs).logits)
    print("equal", name)
"""


@xet_by_default
def test_pushed_models_load_by_repo_id_without_hftl(hub, runs, tiny_timm, tiny_bert, run_without_hftl):
    for name, folder in runs.items():
        push(folder, f"alice/{name}")
    bases = {"image": tiny_timm["test_resnet"], "text": tiny_bert}
    cases = [[name, bases[name.partition("-")[0]], str(runs[name] / "sample.safetensors")] for name in runs]
    assert run_without_hftl(LOAD_BY_REPO_ID, json.dumps(cases)).count("equal") == 4


@pytest.mark.real
@pytest.mark.slow
def test_pushed_real_models_load_by_repo_id_without_hftl(hub, real_runs, shared, minilm):
    for name, folder in real_runs.items():
        push(folder, f"alice/{name}")
    bases = {"image": f"local-dir:{shared / 'weights/mobilenetv2_100'}", "text": minilm}
    cases = [[name, bases[name.partition("-")[0]], str(real_runs[name] / "sample.safetensors")] for name in real_runs]
    assert run_python(LOAD_BY_REPO_ID, json.dumps(cases), hide_hftl=True).count("equal") == 4


def test_push_uploads_verified_files_without_data(hub, runs, texts):
    push(runs["text-lora"], ID, private=True)
    files = hub.store.repos[ID].files
    folder = runs["text-lora"]
    for name in ("model.safetensors", "config.json", "tokenizer.json", "modeling_pooled_text.py", "hftl.json"):
        assert files[name] == (folder / "model" / name).read_bytes(), name
    assert files["adapter/adapter_model.safetensors"] == (folder / "adapter/adapter_model.safetensors").read_bytes()
    assert json.loads(files["metrics.json"]) == json.loads((folder / "metrics.json").read_text())
    assert not {"predictions.parquet", "sample.safetensors"} & set(files)
    pushed_report, local_report = files["report.html"].decode(), (folder / "report.html").read_text()
    examples = [line.rpartition(",")[0] for line in (texts / "test.csv").read_text().splitlines()[1:]]
    examples = [text for text in examples if len(text.split()) > 3 and text in local_report]
    assert examples and not [text for text in examples if text in pushed_report]
    assert hub.store.repos[ID].private and len(hub.requests(COMMIT)) == 1
    card = files["README.md"].decode()
    assert f'"{ID}"' in card and "path/to" not in card


def test_repeated_push_creates_no_commit(hub, runs):
    first = push(runs["image-full"], ID, verify=False)
    assert push(runs["image-full"], ID, verify=False).rsplit("/", 1)[-1] == first.rsplit("/", 1)[-1]
    assert len(hub.requests(COMMIT)) == 1


@lfs_by_default
def test_push_removes_adapter_of_previous_run(hub, runs):
    push(runs["image-lora"], ID, verify=False)
    push(runs["image-full"], ID)
    assert not [name for name in hub.store.repos[ID].files if name.startswith("adapter/")]


@xet_by_default
def test_run_with_repo_id_pushes_after_saving(hub, text_run, tmp_path):
    run = replace(text_run("frozen", num_epochs=1), hub=hftl.HubConfig(repo_id=ID, private=True))
    load_recipe("text_classification").main(run)
    repo = hub.store.repos[ID]
    assert repo.private and repo.files["model.safetensors"] == (tmp_path / "run/model/model.safetensors").read_bytes()


CONNECTION_FAULTS = {
    "create dropped": Fault(CREATE, "drop", times=float("inf")),
    "whoami reset": Fault(r"whoami", "reset", times=float("inf")),
    "preupload dropped": Fault(PREUPLOAD, "drop", times=float("inf")),
    "weights dropped": Fault(WEIGHTS, "drop", times=float("inf")),
    "weights response lost": Fault(WEIGHTS, "lost", times=float("inf")),
    "weights reset": Fault(WEIGHTS, "reset", times=float("inf")),
    "commit dropped": Fault(COMMIT, "drop", times=float("inf")),
    "commit response lost": Fault(COMMIT, "lost", times=float("inf")),
}
FAST_FAULTS = ("weights dropped", "commit response lost")


@pytest.mark.parametrize(
    "stage",
    [pytest.param(stage, marks=() if stage in FAST_FAULTS else pytest.mark.slow) for stage in CONNECTION_FAULTS],
)
def test_failed_push_preserves_run_and_prints_retry_command(hub, runs, stage, monkeypatch):
    folder = runs["image-full"]
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    hub.faults.append(replace(CONNECTION_FAULTS[stage]))
    with pytest.raises(PushError, match="the connection to .* failed|server error") as caught:
        push(folder, ID, private=True)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    assert "hf_alice" not in str(caught.value)
    command = str(caught.value).splitlines()[-1].split()
    assert command == ["hftl", "push", str(folder), ID, "--private"]
    hub.faults.clear()
    from hftl.cli.main import main

    main(command[1:])
    assert hub.store.repos[ID].files["model.safetensors"] == before[folder / "model/model.safetensors"]


STALLED_REQUESTS = {"whoami": r"whoami", "preupload": PREUPLOAD, "weights": WEIGHTS, "commit": COMMIT}
FAST_STALLS = {("lfs", "weights"), ("xet", "weights")}
STALLS = [(protocol, stage) for protocol in ("lfs", "xet") for stage in STALLED_REQUESTS]


@pytest.mark.parametrize(
    ("hub", "stage"),
    [pytest.param(*stall, marks=() if stall in FAST_STALLS else pytest.mark.slow) for stall in STALLS],
    indirect=["hub"],
)
def test_push_raises_after_timeout_of_unresponsive_hub(hub, runs, stage, forks, tmp_path):
    """In a separate process, as the Xet client reads its timeout only once."""
    hub.faults.append(Fault(STALLED_REQUESTS[stage], "stall", times=float("inf"), seconds=120))
    code = (
        "import sys, types, hftl.hub_client, huggingface_hub.utils._http as http\n"
        "http.time, hftl.hub_client.READ_TIMEOUT_S = types.SimpleNamespace(sleep=lambda _: None), 1\n"
        "from hftl.cli.main import main; main(['push', sys.argv[1], 'alice/model', '--no_verify'])"
    )
    command = ["python", "-c", code, runs["image-full"]]
    statuses, output = forks.command(command, tmp_path / "logs", 100, HF_XET_CLIENT_RETRY_MAX_ATTEMPTS="1")
    assert statuses == [2], output
    assert "no response" in output or "connection to" in output, output


REJECTED_BEFORE_PUSH = {
    "no token": ({"HF_TOKEN": ""}, ID, "no Hub token"),
    "wrong token": ({"HF_TOKEN": "hf_nobody_knows_this"}, ID, "does not accept the token"),
    "read-only token": ({"HF_TOKEN": "hf_alice_read"}, ID, "no write access"),
    "foreign namespace": ({}, "bob/model", "no write access"),
    "organization with read access": ({}, "museum/model", "no write access"),
    "no owner": ({}, "model", "has no owner"),
    "bad name": ({}, "alice/my model!", "not a valid repo id"),
}


@lfs_by_default
@pytest.mark.parametrize("case", REJECTED_BEFORE_PUSH)
def test_push_rejects_invalid_repo_before_training(hub, text_run, case, monkeypatch, tmp_path):
    environment, repo, message = REJECTED_BEFORE_PUSH[case]
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    run = replace(text_run(), hub=hftl.HubConfig(repo_id=repo))
    with pytest.raises(ConfigError, match=message) as caught:
        hftl.setup_run(run, hftl.TextClassification)
    assert "hub.repo_id" in str(caught.value)
    assert "nobody_knows" not in str(caught.value) and not (tmp_path / "run").exists()


@pytest.mark.parametrize("case", [name for name in REJECTED_BEFORE_PUSH if "token" in name or "namespace" in name])
def test_push_command_rejects_invalid_repo_or_token(hub, runs, case, monkeypatch):
    environment, repo, message = REJECTED_BEFORE_PUSH[case]
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(PushError, match=message):
        push(runs["image-full"], repo)


def test_private_push_rejects_public_repository(hub, text_run, runs):
    hub.add_repo(ID)
    run = replace(text_run(), hub=hftl.HubConfig(repo_id=ID, private=True))
    with pytest.raises(ConfigError, match="is public, but hub.private is true"):
        hftl.setup_run(run, hftl.TextClassification)
    with pytest.raises(PushError, match="is public"):
        push(runs["image-full"], ID, private=True)
    assert not hub.requests(PREUPLOAD)


def test_invalid_config_raises_before_repository_is_created(hub, text_run):
    run = replace(text_run(lr=-1.0), hub=hftl.HubConfig(repo_id=ID))
    with pytest.raises(ConfigError, match=r"train\.lr"):
        hftl.setup_run(run, hftl.TextClassification)
    assert ID not in hub.store.repos


def revoke_tokens(hub):
    return lambda: hub.users.clear()


REJECTED_DURING_PUSH = {
    "private repository of other user": (
        lambda hub: Fault(PREUPLOAD, 404, headers={"X-Error-Code": "RepoNotFound"}),
        "does not exist",
    ),
    "storage limit": (
        lambda hub: Fault(COMMIT, 403, float("inf"), body='{"error": "Storage limit reached for this account"}'),
        "storage of the owner",
    ),
    "token revoked": (lambda hub: Fault(WEIGHTS, revoke_tokens(hub)), "token"),
    "concurrent commit": (lambda hub: Fault(COMMIT, 412, float("inf")), "another commit"),
    "rate limit": (lambda hub: Fault(PREUPLOAD, 429, float("inf")), "rate limit"),
    "invalid card": (
        lambda hub: Fault(
            "validate-yaml", 400, float("inf"), body='{"errors": [{"message": "license"}], "warnings": []}'
        ),
        "card",
    ),
    "server error": (lambda hub: Fault(COMMIT, 500, float("inf")), "server error 500"),
}


@lfs_by_default
@pytest.mark.parametrize("case", REJECTED_DURING_PUSH)
def test_push_reports_hub_rejection_in_one_message(hub, runs, case):
    fault, message = REJECTED_DURING_PUSH[case]
    hub.faults.append(fault(hub))
    with pytest.raises(PushError, match=message) as caught:
        push(runs["text-full"], ID)
    assert "To push again, run:\n  hftl push" in str(caught.value) and len(str(caught.value).splitlines()) == 2
    hub.users = dict(USERS)
    hub.faults.clear()
    push(runs["text-full"], ID, verify=False)


def test_push_raises_in_offline_mode(hub, runs, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(PushError, match="enabled by HF_HUB_OFFLINE"):
        push(runs["image-full"], ID)


@xet_by_default
def test_push_raises_for_unreachable_hub(hub, runs, forks, tmp_path):
    endpoint = "http://127.0.0.1:9"  # nothing listens on this port
    command = ["python", "-c", "from hftl.cli.main import main; main()", "push", runs["image-full"], ID]
    statuses, output = forks.command(command, tmp_path / "logs", HF_ENDPOINT=endpoint)
    assert statuses == [2] and f"the connection to {endpoint} failed" in output, output


def test_push_verification_detects_changed_weights(hub, runs, monkeypatch):
    """The pushed model is loaded by repo id, so weights that change during the upload are an error."""
    import hftl.artifacts.push as module

    def upload_changed_weights(record, repo, staging_folder, upload=module._upload):
        weights = Path(staging_folder) / "model.safetensors"
        from safetensors.torch import load_file, save_file

        tensors = {name: value + 0.5 for name, value in load_file(weights).items()}
        weights.unlink()
        save_file(tensors, weights, metadata={"format": "pt"})
        return upload(record, repo, staging_folder)

    monkeypatch.setattr(module, "_upload", upload_changed_weights)
    with pytest.raises(PushError, match="verification failed.*differs from the trained model"):
        push(runs["image-full"], ID)


def test_push_rejects_unfinished_runs(hub, tmp_path):
    with pytest.raises(ArtifactError, match="not a finished run: config.yaml"):
        push(tmp_path, ID)
    for name in ("config.yaml", "metrics.json", "report.json"):
        (tmp_path / name).write_text("{}")
    with pytest.raises(ArtifactError, match="verified model"):
        push(tmp_path, ID)
    assert ID not in hub.store.repos


def test_redaction_removes_tokens_from_messages(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "odd-token-without-prefix")
    assert redact_tokens("odd-token-without-prefix hf_abcDEF0123456789") == "hf_*** hf_***"
    assert "odd-token" not in explain(ValueError("odd-token-without-prefix is bad"), ID)


@xet_by_default
def test_run_and_repository_contain_no_token(hub, text_run, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HF_TOKEN", "hf_secretsecretsecret")
    hub.users["hf_secretsecretsecret"] = User("alice")
    load_recipe("text_classification").main(replace(text_run("full"), hub=hftl.HubConfig(repo_id=ID)))
    contents = [path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()]
    contents += [*hub.store.repos[ID].files.values(), "".join(capsys.readouterr()).encode()]
    assert not any(b"secretsecret" in content for content in contents)


@pytest.fixture
def push_recipe(texts, tiny_bert, tmp_path) -> list[str]:
    """Returns a recipe with the flags of a run of one step that pushes."""
    flags = {
        "data.source": texts,
        "model.name": tiny_bert,
        "output_dir": tmp_path / "run",
        "train.max_steps": 1,
        "train.batch_size_per_device": 8,
        "hub.repo_id": ID,
        "hub.verify": "false",
    }
    return [str(ROOT / "recipes/text_classification.py"), *(f"--{name}={value}" for name, value in flags.items())]


@pytest.mark.parametrize("hub", ["xet"], indirect=True)
def test_two_processes_push_once(hub, push_recipe, forks, tmp_path):
    statuses, output = forks.command(["python", *push_recipe], tmp_path / "logs", 280, processes=2, **ENV)
    assert statuses == [0, 0], output[-3000:]
    assert len(hub.requests("GET /api/whoami")) == 2  # main process only: before training and before the push
    assert (tmp_path / "run/model/hftl.json").is_file()
    assert len(hub.requests(COMMIT)) == 1
    assert hub.store.repos[ID].files["model.safetensors"]


@pytest.mark.slow
@pytest.mark.parametrize("hub", ["xet"], indirect=True)
def test_failed_push_ends_both_processes_with_same_status(hub, push_recipe, tmp_path):
    """With `torch.distributed.run` as the launcher."""
    hub.faults.append(Fault(COMMIT, 403, float("inf")))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", free_port()]
    done = subprocess.run(
        [*launcher, *push_recipe],
        capture_output=True,
        text=True,
        timeout=280,
        cwd=ROOT,
        env={**os.environ, **ENV},
    )
    assert done.returncode != 0, done.stderr[-3000:]
    assert len(hub.requests("GET /api/whoami")) == 2
    assert (tmp_path / "run/model/hftl.json").is_file()
    assert done.stderr.count("PushError: push to alice/model") == 1 and "no write access" in done.stderr
    assert "exitcode  : 2" in done.stderr


@pytest.mark.parametrize("action", ["reset", 503, 429])
def test_push_retries_after_transient_upload_error(hub, runs, action):
    hub.faults.append(Fault(WEIGHTS, action, times=1))
    push(runs["image-full"], ID, verify=False)
    assert hub.store.repos[ID].files["model.safetensors"]
