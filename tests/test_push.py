"""Pushing: what was verified arrives, opens by its id without hftl, and no failure loses anything or tells a token."""

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
by_lfs = pytest.mark.parametrize("hub", ["lfs", pytest.param("xet", marks=pytest.mark.slow)], indirect=True)
"""Where the way that weights go makes no difference."""
by_xet = pytest.mark.parametrize("hub", [pytest.param("lfs", marks=pytest.mark.slow), "xet"], indirect=True)


def made(images, texts, image_model, text_model, root: Path, **train) -> dict[str, Path]:
    """Returns finished runs: an image and a text model, full and with LoRA (the text one pooled)."""
    found = {}
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
            found[f"{kind}-{method}"] = Path(run.output_dir)
    return found


@pytest.fixture(scope="session")
def runs(images, texts, tiny_timm, tiny_bert, tmp_path_factory) -> dict[str, Path]:
    return made(images, texts, tiny_timm["test_resnet"], tiny_bert, tmp_path_factory.mktemp("runs"), num_epochs=1)


@pytest.fixture(scope="session")
def real_runs(shared, minilm, tmp_path_factory) -> dict[str, Path]:
    """The same with real weights on real data, for a few steps."""
    weights = f"local-dir:{shared / 'weights/mobilenetv2_100'}"
    images, texts = shared / "image/hymenoptera", shared / "text/trec6"
    return made(images, texts, weights, minilm, tmp_path_factory.mktemp("real"), max_steps=4)


BY_ID = """
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
                exec(card.split("```python")[1].split("```")[0], scope)  # the card's own code
                equal(scope["model"](**inputs).logits)
    print("equal", name)
"""


@by_xet
def test_pushed_models_open_by_id_without_hftl(hub, runs, tiny_timm, tiny_bert, run_without_hftl):
    for name, folder in runs.items():
        push(folder, f"alice/{name}")
    bases = {"image": tiny_timm["test_resnet"], "text": tiny_bert}
    cases = [[name, bases[name.partition("-")[0]], str(runs[name] / "sample.safetensors")] for name in runs]
    assert run_without_hftl(BY_ID, json.dumps(cases)).count("equal") == 4


@pytest.mark.real
@pytest.mark.slow
def test_pushed_real_models_open_by_id_without_hftl(hub, real_runs, shared, minilm):
    for name, folder in real_runs.items():
        push(folder, f"alice/{name}")
    bases = {"image": f"local-dir:{shared / 'weights/mobilenetv2_100'}", "text": minilm}
    cases = [[name, bases[name.partition("-")[0]], str(real_runs[name] / "sample.safetensors")] for name in real_runs]
    assert run_python(BY_ID, json.dumps(cases), hide_hftl=True).count("equal") == 4


def test_a_repository_holds_what_was_verified_and_no_data(hub, runs, texts):
    push(runs["text-lora"], ID, private=True)
    files = hub.store.repos[ID].files
    folder = runs["text-lora"]
    for name in ("model.safetensors", "config.json", "tokenizer.json", "modeling_pooled_text.py", "hftl.json"):
        assert files[name] == (folder / "model" / name).read_bytes(), name
    assert files["adapter/adapter_model.safetensors"] == (folder / "adapter/adapter_model.safetensors").read_bytes()
    assert json.loads(files["metrics.json"]) == json.loads((folder / "metrics.json").read_text())
    assert not {"predictions.parquet", "sample.safetensors"} & set(files)
    page, shown = files["report.html"].decode(), (folder / "report.html").read_text()
    texts_shown = [line.rpartition(",")[0] for line in (texts / "test.csv").read_text().splitlines()[1:]]
    texts_shown = [text for text in texts_shown if len(text.split()) > 3 and text in shown]
    assert texts_shown and not [text for text in texts_shown if text in page]
    assert hub.store.repos[ID].private and len(hub.requests(COMMIT)) == 1
    card = files["README.md"].decode()
    assert f'"{ID}"' in card and "path/to" not in card


def test_pushing_again_changes_nothing(hub, runs):
    first = push(runs["image-full"], ID, verify=False)
    assert push(runs["image-full"], ID, verify=False).rsplit("/", 1)[-1] == first.rsplit("/", 1)[-1]
    assert len(hub.requests(COMMIT)) == 1


@by_lfs
def test_an_adapter_does_not_stay_beside_another_model(hub, runs):
    push(runs["image-lora"], ID, verify=False)
    push(runs["image-full"], ID)
    assert not [name for name in hub.store.repos[ID].files if name.startswith("adapter/")]


@by_xet
def test_a_run_pushes_at_its_end(hub, text_run, tmp_path):
    run = replace(text_run("frozen", num_epochs=1), hub=hftl.HubConfig(repo_id=ID, private=True))
    load_recipe("text_classification").main(run)
    repo = hub.store.repos[ID]
    assert repo.private and repo.files["model.safetensors"] == (tmp_path / "run/model/model.safetensors").read_bytes()


STAGES = {
    "before": Fault(CREATE, "drop", times=float("inf")),
    "before, no answer": Fault(r"whoami", "reset", times=float("inf")),
    "announcing": Fault(PREUPLOAD, "drop", times=float("inf")),
    "weights": Fault(WEIGHTS, "drop", times=float("inf")),
    "weights, no answer": Fault(WEIGHTS, "lost", times=float("inf")),
    "weights, cut": Fault(WEIGHTS, "reset", times=float("inf")),
    "commit": Fault(COMMIT, "drop", times=float("inf")),
    "commit, no answer": Fault(COMMIT, "lost", times=float("inf")),
}


ENDS = [
    pytest.param(stage, marks=() if stage in ("weights", "commit, no answer") else pytest.mark.slow) for stage in STAGES
]


@pytest.mark.parametrize("stage", ENDS)
def test_a_connection_that_ends_loses_nothing_and_the_printed_command_repairs_it(hub, runs, stage, monkeypatch):
    folder = runs["image-full"]
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    hub.faults.append(replace(STAGES[stage]))
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


UNANSWERED = {"before": r"whoami", "announce": PREUPLOAD, "weights": WEIGHTS, "commit": COMMIT}
FAST = {("lfs", "weights"), ("xet", "weights")}
STALLS = [(way, stage) for way in ("lfs", "xet") for stage in UNANSWERED]


@pytest.mark.parametrize(
    ("hub", "stage"),
    [pytest.param(*stall, marks=() if stall in FAST else pytest.mark.slow) for stall in STALLS],
    indirect=["hub"],
)
def test_a_hub_that_never_answers_ends_the_push(hub, runs, stage, forks, tmp_path):
    """In a process of its own: the Xet client reads its timeout once."""
    hub.faults.append(Fault(UNANSWERED[stage], "stall", times=float("inf"), seconds=120))
    code = (
        "import sys, types, hftl.hub_client, huggingface_hub.utils._http as http\n"
        "http.time, hftl.hub_client.READ_TIMEOUT_S = types.SimpleNamespace(sleep=lambda _: None), 1\n"
        "from hftl.cli.main import main; main(['push', sys.argv[1], 'alice/model', '--no_verify'])"
    )
    words = ["python", "-c", code, runs["image-full"]]
    statuses, said = forks.command(words, tmp_path / "logs", 100, HF_XET_CLIENT_RETRY_MAX_ATTEMPTS="1")
    assert statuses == [2], said
    assert "no response" in said or "connection to" in said, said


REFUSALS = {
    "no token": ({"HF_TOKEN": ""}, ID, "no Hub token"),
    "wrong token": ({"HF_TOKEN": "hf_nobody_knows_this"}, ID, "does not accept the token"),
    "read-only token": ({"HF_TOKEN": "hf_alice_read"}, ID, "no write access"),
    "foreign namespace": ({}, "bob/model", "no write access"),
    "organisation one only visits": ({}, "museum/model", "no write access"),
    "no owner": ({}, "model", "has no owner"),
    "bad name": ({}, "alice/my model!", "not a valid repo id"),
}


@by_lfs
@pytest.mark.parametrize("case", REFUSALS)
def test_what_the_hub_would_refuse_is_refused_before_training(hub, text_run, case, monkeypatch, tmp_path):
    environment, repo, sentence = REFUSALS[case]
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    run = replace(text_run(), hub=hftl.HubConfig(repo_id=repo))
    with pytest.raises(ConfigError, match=sentence) as caught:
        hftl.setup_run(run, hftl.TextClassification)
    assert "hub.repo_id" in str(caught.value)
    assert "nobody_knows" not in str(caught.value) and not (tmp_path / "run").exists()


@pytest.mark.parametrize("case", [name for name in REFUSALS if "token" in name or "namespace" in name])
def test_the_same_when_pushing_later(hub, runs, case, monkeypatch):
    environment, repo, sentence = REFUSALS[case]
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(PushError, match=sentence):
        push(runs["image-full"], repo)


def test_a_public_repository_is_not_used_for_a_private_model(hub, text_run, runs):
    hub.add_repo(ID)
    run = replace(text_run(), hub=hftl.HubConfig(repo_id=ID, private=True))
    with pytest.raises(ConfigError, match="is public, but hub.private is true"):
        hftl.setup_run(run, hftl.TextClassification)
    with pytest.raises(PushError, match="is public"):
        push(runs["image-full"], ID, private=True)
    assert not hub.requests(PREUPLOAD)


def test_other_problems_are_said_first_and_no_repository_is_made(hub, text_run):
    run = replace(text_run(lr=-1.0), hub=hftl.HubConfig(repo_id=ID))
    with pytest.raises(ConfigError, match=r"train\.lr"):
        hftl.setup_run(run, hftl.TextClassification)
    assert ID not in hub.store.repos


def revoke(hub):
    return lambda: hub.users.clear()


AFTERWARDS = {
    "someone's private repository": (
        lambda hub: Fault(PREUPLOAD, 404, headers={"X-Error-Code": "RepoNotFound"}),
        "does not exist",
    ),
    "storage": (
        lambda hub: Fault(COMMIT, 403, float("inf"), body='{"error": "Storage limit reached for this account"}'),
        "storage of the owner",
    ),
    "token revoked": (lambda hub: Fault(WEIGHTS, revoke(hub)), "token"),
    "another commit": (lambda hub: Fault(COMMIT, 412, float("inf")), "another commit"),
    "rate": (lambda hub: Fault(PREUPLOAD, 429, float("inf")), "rate limit"),
    "card": (
        lambda hub: Fault(
            "validate-yaml", 400, float("inf"), body='{"errors": [{"message": "license"}], "warnings": []}'
        ),
        "card",
    ),
    "trouble": (lambda hub: Fault(COMMIT, 500, float("inf")), "server error 500"),
}


@by_lfs
@pytest.mark.parametrize("case", AFTERWARDS)
def test_what_is_refused_during_a_push_is_said_in_a_sentence(hub, runs, case):
    fault, sentence = AFTERWARDS[case]
    hub.faults.append(fault(hub))
    with pytest.raises(PushError, match=sentence) as caught:
        push(runs["text-full"], ID)
    assert "To push again:\n  hftl push" in str(caught.value) and len(str(caught.value).splitlines()) == 2
    hub.users = dict(USERS)
    hub.faults.clear()
    push(runs["text-full"], ID, verify=False)


def test_offline_is_said(hub, runs, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(PushError, match="enabled by HF_HUB_OFFLINE"):
        push(runs["image-full"], ID)


@by_xet
def test_no_hub_at_all_is_said(hub, runs, forks, tmp_path):
    closed = "http://127.0.0.1:9"
    words = ["python", "-c", "from hftl.cli.main import main; main()", "push", runs["image-full"], ID]
    statuses, said = forks.command(words, tmp_path / "logs", HF_ENDPOINT=closed)
    assert statuses == [2] and f"the connection to {closed} failed" in said, said


def test_something_else_on_the_hub_is_noticed(hub, runs, monkeypatch):
    """Verified means by id: weights that changed on the way are an error."""
    import hftl.artifacts.push as module

    def disturbed(record, repo, staged, upload=module._upload):
        weights = Path(staged) / "model.safetensors"
        from safetensors.torch import load_file, save_file

        tensors = {name: value + 0.5 for name, value in load_file(weights).items()}
        weights.unlink()
        save_file(tensors, weights, metadata={"format": "pt"})
        return upload(record, repo, staged)

    monkeypatch.setattr(module, "_upload", disturbed)
    with pytest.raises(PushError, match="does not load back.*not what was trained"):
        push(runs["image-full"], ID)


def test_only_finished_runs_are_pushed(hub, tmp_path):
    with pytest.raises(ArtifactError, match="not the folder of a finished run: it has no config.yaml"):
        push(tmp_path, ID)
    for name in ("config.yaml", "metrics.json", "report.json"):
        (tmp_path / name).write_text("{}")
    with pytest.raises(ArtifactError, match="verified model"):
        push(tmp_path, ID)
    assert ID not in hub.store.repos


def test_tokens_are_never_repeated(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "odd-token-without-prefix")
    assert redact_tokens("odd-token-without-prefix hf_abcDEF0123456789") == "hf_*** hf_***"
    assert "odd-token" not in explain(ValueError("odd-token-without-prefix is bad"), ID)


@by_xet
def test_the_token_is_in_no_file_of_a_run(hub, text_run, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HF_TOKEN", "hf_secretsecretsecret")
    hub.users["hf_secretsecretsecret"] = User("alice")
    load_recipe("text_classification").main(replace(text_run("full"), hub=hftl.HubConfig(repo_id=ID)))
    everything = [path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()]
    everything += [*hub.store.repos[ID].files.values(), "".join(capsys.readouterr()).encode()]
    assert not any(b"secretsecret" in content for content in everything)


@pytest.fixture
def pushing(texts, tiny_bert, tmp_path) -> list[str]:
    """A recipe and the flags of a run of one step that pushes."""
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
def test_on_two_processes_one_pushes(hub, pushing, forks, tmp_path):
    statuses, said = forks.command(["python", *pushing], tmp_path / "logs", 280, processes=2, **ENV)
    assert statuses == [0, 0], said[-3000:]
    assert len(hub.requests("GET /api/whoami")) == 2  # before training and before the push, from one process
    assert (tmp_path / "run/model/hftl.json").is_file()
    assert len(hub.requests(COMMIT)) == 1
    assert hub.store.repos[ID].files["model.safetensors"]


@pytest.mark.slow
@pytest.mark.parametrize("hub", ["xet"], indirect=True)
def test_on_two_processes_a_push_that_fails_ends_all_alike(hub, pushing, tmp_path):
    """Under the real launcher."""
    hub.faults.append(Fault(COMMIT, 403, float("inf")))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", free_port()]
    done = subprocess.run(
        [*launcher, *pushing],
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
def test_one_hiccup_while_the_weights_go_up_is_survived(hub, runs, action):
    hub.faults.append(Fault(WEIGHTS, action, times=1))
    push(runs["image-full"], ID, verify=False)
    assert hub.store.repos[ID].files["model.safetensors"]
