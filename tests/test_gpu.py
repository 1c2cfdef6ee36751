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


@pytest.mark.gpu
def test_short_memory_on_a_gpu_halves_the_rows(image_run, monkeypatch, capsys):
    """A network and images that need some GB for 32 rows, in a process that may take 0.9 GB."""
    from dataclasses import replace

    import torch

    import hftl

    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU")
    run = image_run(batch_size_per_device=32, max_steps=3)
    run = replace(run, model=hftl.ModelConfig(name="resnet18", pretrained=False, image_size=224))
    run, splits, task = hftl.setup_run(run, hftl.ImageClassification)
    accelerator = hftl.create_accelerator(run)
    model = hftl.build_model(run, task.head)
    hftl.adapt(model, run.adapt)
    total = torch.cuda.get_device_properties(accelerator.device).total_memory
    torch.cuda.set_per_process_memory_fraction(0.9e9 / total)
    try:
        assert hftl.fit(accelerator, model, task, splits, run).steps == 3
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert "out of memory in training with" in capsys.readouterr().out


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["image", "text"])
def test_a_stopped_run_goes_on_on_a_gpu(kind, image_run, text_run, tmp_path):
    """Losses after the stop as without one; kernels may add up in another order from run to run."""
    from dataclasses import replace

    import torch
    from conftest import load_recipe
    from launch import stopping_after

    from hftl.errors import Stopped

    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU")
    run = image_run(max_steps=8, logging_steps=1) if kind == "image" else text_run(max_steps=8, logging_steps=1)
    main = load_recipe(f"{kind}_classification").main
    losses = []
    for name in ("whole", "stopped"):
        mine = replace(run, output_dir=str(tmp_path / name), resume="auto")
        if name == "stopped":
            with pytest.raises(Stopped), stopping_after(4):
                main(mine)
        main(mine)
        lines = (tmp_path / name / "history.jsonl").read_text().splitlines()
        losses.append([json.loads(line)["train/loss"] for line in lines if "train/loss" in line])
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)
