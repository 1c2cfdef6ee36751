"""Redaction of secrets: every file of a run and all output are scanned for secrets and pickles."""

import io
import pickletools
import shlex
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import load_recipe

import hftl
from hftl.config.schema import DataConfig, ProbeConfig, RunConfig
from hftl.errors import DataError
from hftl.logging import log
from hftl.redaction import redact, sanitize

TOKEN, KEY, PASSWORD = "hf_Sup3rS3cretTokenOfAlice", "wandb-0123456789abcdef0123456789", "pa55word-of-the-store"
SECRETS = (TOKEN, KEY, PASSWORD)
TEXTUAL = (".json", ".jsonl", ".yaml", ".yml", ".md", ".html", ".txt", ".py", ".jinja", ".lock", "")
BINARY = (".safetensors", ".parquet", ".arrow", ".onnx", ".skops")


@pytest.fixture
def secrets(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("STORE_PASSWORD", PASSWORD)
    arguments = ["train.py", "--data.source", f"https://alice:{TOKEN}@huggingface.co/x", f"--note={PASSWORD}", TOKEN]
    monkeypatch.setattr(sys, "argv", arguments)


def is_pickle(path: Path) -> bool:
    """Whether a file is a pickle, or a zip file with pickles, as written by torch.save."""
    content = path.read_bytes()
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:  # skops: JSON and arrays; an array of objects is a pickle
            members = [archive.read(name) for name in archive.namelist()]
        return any(_is_pickled(member) or _is_object_array(member) for member in members)
    return _is_pickled(content)


def _is_object_array(content: bytes) -> bool:
    try:
        np.load(io.BytesIO(content), allow_pickle=False)
    except ValueError as error:
        return "Object arrays" in str(error)
    return False


def _is_pickled(content: bytes) -> bool:
    if content[:1] not in (b"\x80", b"(", b"]", b"}", b"c"):
        return False
    try:
        return any(opcode.name == "STOP" for opcode, _, _ in pickletools.genops(content))
    except Exception:
        return content[:1] == b"\x80" and content[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05")


def assert_no_secrets(*folders: Path) -> int:
    """Asserts that no file contains a secret or pickle or has an unknown suffix; returns the number of files."""
    files = [file for folder in folders for file in folder.rglob("*") if file.is_file()]
    for file in files:
        content = file.read_bytes()
        for secret in SECRETS:
            assert secret.encode() not in content, f"{file} contains {secret}"
            assert secret.encode("utf-16-le") not in content, file
        assert not is_pickle(file), f"{file} is a pickle"
        is_known = file.suffix in (*TEXTUAL, *BINARY) or "tfevents" in file.name or file.name.startswith("cache-")
        assert is_known, f"{file} has an unknown suffix"
    return len(files)


def test_assert_no_secrets_detects_secrets_and_pickles(tmp_path):
    import pickle

    import torch

    torch.save({"a": torch.zeros(2)}, tmp_path / "zip.json")
    np.savez(tmp_path / "objects.npz", np.array([{}], dtype=object))
    np.savez(tmp_path / "numbers.npz", np.zeros(2))
    (tmp_path / "old.json").write_bytes(pickle.dumps([1], protocol=0))
    (tmp_path / "new.json").write_bytes(pickle.dumps({"a": 1}))
    (tmp_path / "no.json").write_text('{"a": 1}')
    assert {file.name for file in tmp_path.iterdir() if is_pickle(file)} == {
        "zip.json",
        "old.json",
        "new.json",
        "objects.npz",
    }
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret" / "a.json").write_text(f"x{KEY}y")
    with pytest.raises(AssertionError, match="contains"):
        assert_no_secrets(tmp_path / "secret")


@pytest.mark.parametrize(("kind", "method"), [("text", "lora"), ("image", "lora"), ("text", "probe")])
def test_run_files_contain_no_secret_or_pickle(
    kind, method, text_run, image_run, secrets, tmp_path, monkeypatch, capfd
):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    make = {"text": text_run, "image": image_run}[kind]
    run = make(method=method, trackers=["tensorboard"])
    run = replace(run, adapt=replace(run.adapt, probe=ProbeConfig("svm")))
    load_recipe(f"{kind}_classification").main(run)
    (tmp_path / "cache").mkdir(exist_ok=True)
    assert assert_no_secrets(tmp_path / "run", tmp_path / "cache") > 12
    printed = "".join(capfd.readouterr())
    assert not any(secret in printed for secret in SECRETS)
    command = (tmp_path / "run" / "environment.json").read_text()
    assert "https://***@huggingface.co/x" in command and "--note=***" in command
    assert any("tfevents" in file.name for file in (tmp_path / "run").rglob("*"))


def test_saved_settings_contain_no_secret(text_run, secrets, tmp_path):
    rows = [{"text": f"row {n}", "label": "ab"[n % 2]} for n in range(8)]
    run = text_run(batch_size_per_device=2, trackers=["tensorboard"])
    run = replace(run, data=DataConfig(source=f"{PASSWORD}-{TOKEN}", validation_fraction=0.25))
    run, splits, task = hftl.setup_run(run, hftl.TextClassification, rows={"train": rows, "test": rows})
    accelerator = hftl.create_accelerator(run)
    model = hftl.build_model(run, task.head)
    report = hftl.adapt(model, run.adapt)
    history = hftl.fit(accelerator, model, task, splits, run)
    metrics = hftl.evaluate(accelerator, model, task, splits, run)
    hftl.save_run(accelerator, model, task, splits, run, hftl.RunResult(report, history, metrics))
    assert assert_no_secrets(tmp_path / "run") > 10
    hftl.load(tmp_path / "run").predict("row")


@pytest.mark.parametrize("hub", [pytest.param("lfs", marks=pytest.mark.slow), "xet"], indirect=True)
def test_pushed_run_contains_no_secret_or_pickle(hub, text_run, tmp_path, monkeypatch):
    from huggingface_hub import snapshot_download

    monkeypatch.setenv("WANDB_API_KEY", KEY)
    run = text_run("lora")
    load_recipe("text_classification").main(run)
    hftl.push(tmp_path / "run", "alice/model")
    folder = Path(snapshot_download("alice/model", local_dir=tmp_path / "pushed"))
    for file in folder.rglob("*"):
        if file.is_file() and ".cache" not in file.parts:
            assert (
                b"hf_alice" not in file.read_bytes() and KEY.encode() not in file.read_bytes() and not is_pickle(file)
            )


def test_logs_and_errors_contain_no_secret(secrets, capsys):
    source = f"https://alice:{TOKEN}@example.org/{PASSWORD}/data"
    log(f"data: {source} {KEY}")
    with pytest.raises(DataError) as caught:
        hftl.load_splits(DataConfig(source=source))
    with pytest.raises(hftl.HftlError) as setup:
        hftl.setup_run(RunConfig(DataConfig(source=source)), hftl.TextClassification)
    output = capsys.readouterr().out + str(caught.value) + str(setup.value) + repr(setup.value.problems)
    assert not any(secret in output for secret in SECRETS) and "https://***@example.org/***/data" in output


@pytest.mark.parametrize(
    ("text", "redacted"),
    [
        (f"x {TOKEN} y", "x hf_*** y"),
        ("https://user:secret@host/path", "https://***@host/path"),
        ("https://host/a@b mail me@example.org", "https://host/a@b mail me@example.org"),
        (shlex.join(["a", "--k", "hf_abcdefghijkl"]), "a --k hf_***"),
        ("hf-hub:timm/x hf_x", "hf-hub:timm/x hf_x"),
    ],
)
def test_redact_removes_only_secrets(text, redacted, monkeypatch):
    monkeypatch.delenv("HF_TOKEN", raising=False)
    assert redact(text) == redacted


@pytest.mark.parametrize(
    "characters", ["\x1b]0;owned\x07", "\x1b[2J", "\r", "\x9b31m", "\u202eevil", "\x00", "\x7f", "\u2066"]
)
def test_log_and_errors_escape_terminal_control_characters(characters, capsys):
    log(f"data: labels {characters}cat")
    text = capsys.readouterr().out + str(DataError(f"label {characters}dog"))
    assert characters not in text and "cat" in text and "dog" in text and "\\" in text
    assert sanitize("tab\tnewline\n\u00e9\U0001f642") == "tab\tnewline\n\u00e9\U0001f642"
