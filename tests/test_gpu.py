"""On a CUDA GPU: both recipes, three methods, in bf16, unchanged but for what accelerate_config.yaml says."""

import json
import os
import subprocess
import sys

import pytest
from conftest import ROOT


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["bf16", "fp16", "no"])
@pytest.mark.parametrize("method", ["full", "frozen", "lora"])
@pytest.mark.parametrize("kind", ["image", "text"])
def test_recipes_on_a_gpu(kind, method, precision, images, texts, tiny_timm, tiny_bert, tmp_path):
    source, model = (images, tiny_timm["test_vit"]) if kind == "image" else (texts, tiny_bert)
    command = [
        *(sys.executable, "-m", "accelerate.commands.launch", "--config_file", "accelerate_config.yaml"),
        *("--mixed_precision", precision, f"recipes/{kind}_classification.py", "--data.source", str(source)),
        *("--model.name", model, "--adapt.method", method, "--train.batch_size_per_device", "8"),
        *("--output_dir", str(tmp_path / "run")),
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280, env=dict(os.environ))
    assert done.returncode == 0, done.stderr[-3000:]
    environment = json.loads((tmp_path / "run" / "environment.json").read_text())
    assert environment["precision"] == precision and environment["device"] != "cpu"
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["test/loss"] < 2.0
