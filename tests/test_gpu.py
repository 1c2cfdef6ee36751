"""Recipes on a CUDA GPU: methods, mixed precision, out of memory and resuming, configured by accelerate_config.yaml."""

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
def test_recipes_run_on_gpu(kind, method, precision, images, texts, tiny_timm, tiny_bert, tmp_path):
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
def test_gpu_oom_halves_micro_batch(image_run, monkeypatch, capsys):
    """32 images of 224 x 224 pixels need several GB; the process is limited to 0.9 GB."""
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
def test_gpu_resume_matches_uninterrupted_run(kind, image_run, text_run, tmp_path):
    """Losses are compared with a tolerance, as CUDA kernels are not deterministic."""
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
    for name in ("uninterrupted", "stopped"):
        config = replace(run, output_dir=str(tmp_path / name), resume="auto")
        if name == "stopped":
            with pytest.raises(Stopped), stopping_after(4):
                main(config)
        main(config)
        lines = (tmp_path / name / "history.jsonl").read_text().splitlines()
        losses.append([json.loads(line)["train/loss"] for line in lines if "train/loss" in line])
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)
