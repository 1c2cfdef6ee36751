"""`fit` and `evaluate` on one and two processes: gradients, schedules, repeatability, early stopping."""

import json
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from conftest import run_undrawn
from launch import flags, launch
from safetensors.torch import load_file

import hftl
from hftl.training.optim import lr_factor


@pytest.fixture(scope="module")
def launched(texts, images, tiny_bert, tiny_timm, forks, tmp_path_factory) -> Path:
    """Folder with the results of all jobs below, on one process (`1/NAME`) and on two (`2/NAME`)."""
    root = tmp_path_factory.mktemp("launched")
    for world in (1, 2):
        jobs = [*_gradient_jobs(world, texts, images, tiny_bert, tiny_timm["test_resnet"], root / str(world))]
        jobs += [*_evaluation_jobs(world, texts, tiny_bert, root / str(world))]
        jobs.append(_training_job(world, texts, tiny_bert, root / str(world)))
        launch(world, jobs, forks=forks, logs=root / "logs")
    return root


MICRO_BATCHING = {1: [(8, 1), (2, 4)], 2: [(4, 1), (2, 2)]}
"""(batch size, accumulation) with effective batch size 8, by number of processes."""


def _gradient_jobs(world, texts, images, tiny_bert, tiny_resnet, root):
    for kind, source, model in (("text", texts, tiny_bert), ("image", images, tiny_resnet)):
        for batch, accumulation in MICRO_BATCHING[world]:
            out = root / f"gradient-{kind}-{batch}"
            options = flags(
                source,
                model,
                out / "run",
                model__dropout=0.0,
                train__max_steps=2,
                train__max_grad_norm=0,
                train__lr=1e-3,
                train__head_lr=1e-3,
                train__freeze_backbone_ratio=0,
                train__batch_size_per_device=batch,
                train__gradient_accumulation_steps=accumulation,
                train__logging_steps=1,
                data__augment__crop_scale=1.0,
            )
            yield "gradient", {"recipe": f"{kind}_classification", "flags": options}, out


@pytest.mark.parametrize("kind", ["text", "image"])
def test_step_gradient_matches_across_micro_batching(kind, launched):
    """(batch size, accumulation, processes) with product 8, no dropout, pooled and default heads, uneven lengths."""
    gradients = {}
    for world, pairs in MICRO_BATCHING.items():
        for batch, accumulation in pairs:
            out = launched / str(world) / f"gradient-{kind}-{batch}"
            gradients[batch, accumulation, world] = [load_file(out / f"step{step}.safetensors") for step in (0, 1)]
            lrs = json.loads((out / "lrs.json").read_text())
            # scheduler steps are optimizer steps with any number of processes
            assert len(lrs) == 2 and lrs == pytest.approx([5e-4, 1e-3])
    reference = gradients.pop((8, 1, 1))
    for setting, steps in gradients.items():
        for step, grads in enumerate(steps):
            assert grads.keys() == reference[step].keys()
            for name, grad in grads.items():
                expected = reference[step][name]
                # summation order differs; a wrong factor (accumulation, processes) would be 2 or 4
                scale = max(float(expected.abs().max()), 1e-4)
                label = f"{setting} step {step} {name}"
                torch.testing.assert_close(
                    grad, expected, atol=2e-3 * scale, rtol=1e-3, msg=lambda m, label=label: f"{label}: {m}"
                )


def _evaluation_jobs(world, texts, tiny_bert, root):
    for method in ("full", "lora"):
        options = flags(
            texts,
            tiny_bert,
            root / method / "run",
            method,
            train__num_epochs=1,
            train__lr=0,
            train__head_lr=0,
            train__weight_decay=0,
            train__batch_size_per_device=4,  # evaluation uses it too, and rounding depends on the batch size
            train__seed=0,
        )
        yield "recipe", {"recipe": "text_classification", "flags": options}, root / method


@pytest.mark.parametrize("method", ["full", "lora"])
def test_evaluate_on_two_processes_matches_one(method, launched):
    """Same weights (learning rate 0), 13 test rows: equal metrics, and equal predictions in row order."""
    results = {}
    for world in (1, 2):
        run = launched / str(world) / method / "run"
        table = pq.read_table(run / "predictions.parquet").to_pylist()
        results[world] = json.loads((run / "metrics.json").read_text()), table
    assert results[1][0] == results[2][0]
    assert results[1][1] == results[2][1]
    assert [row["row"] for row in results[2][1] if row["split"] == "test"] == list(range(13))


def _training_job(world, texts, tiny_bert, root):
    options = flags(
        texts,
        tiny_bert,
        root / "training" / "run",
        model__dropout=0.0,
        train__num_epochs=2,
        train__lr=1e-3,
        train__head_lr=1e-3,
        train__batch_size_per_device=8 // world,
    )
    return "recipe", {"recipe": "text_classification", "flags": options}, root / "training"


def test_fit_on_two_processes_matches_one(launched):
    weights = {}
    for world in (1, 2):
        run = launched / str(world) / "training" / "run"
        weights[world] = load_file(run / "model" / "model.safetensors")
        steps = [json.loads(line) for line in (run / "history.jsonl").read_text().splitlines()]
        assert max(record["step"] for record in steps) == 16
    for name, value in weights[1].items():
        torch.testing.assert_close(weights[2][name], value, atol=2e-4, rtol=1e-3)


@pytest.mark.parametrize("method", ["full", "lora"])
def test_fit_overfits_32_examples(method, text_run, texts, tmp_path):
    lines = (texts / "train.csv").read_text().splitlines()[:33]
    (tmp_path / "few.csv").write_text("\n".join(lines) + "\n")
    run = text_run(method, "mean", num_epochs=60, lr=5e-3, head_lr=2e-2)
    run = replace(
        run,
        data=replace(run.data, source=str(tmp_path / "few.csv"), validation_fraction=0.0),
        model=replace(run.model, dropout=0.0),
    )
    run, splits, task = hftl.setup_run(run, hftl.TextClassification)
    accelerator = hftl.create_accelerator(run)
    model = hftl.build_model(run, task.head)
    hftl.adapt(model, run.adapt)
    history = hftl.fit(accelerator, model, task, splits, run)
    losses = [record["train/loss"] for record in history.records]
    assert losses[-1] < 0.05 < losses[0]


@pytest.mark.parametrize("kind", ["image", "text"])
def test_repeated_run_is_bitwise_identical(kind, image_run, text_run, tmp_path):
    """Dropout, augmentation and row order depend on the seed only, also with data loader workers."""
    results = []
    for number, workers in enumerate((0, 0, 2 if kind == "image" else 0)):
        run = image_run("test_resnet", "full") if kind == "image" else text_run("full")
        run = replace(run, output_dir=str(tmp_path / str(number)), data=replace(run.data, num_workers=workers))
        metrics = run_undrawn(f"{kind}_classification", run)
        folder = tmp_path / str(number)
        weights = load_file(folder / "model" / "model.safetensors")
        results.append(
            (metrics, weights, (folder / "history.jsonl").read_text(), pq.read_table(folder / "predictions.parquet"))
        )
    for metrics, weights, history, table in results[1:]:
        assert metrics == results[0][0]
        assert all(torch.equal(weights[name], value) for name, value in results[0][1].items())
        assert history == results[0][2]
        assert table == results[0][3]


def test_other_seed_returns_other_losses(text_run, tmp_path):
    losses = []
    for seed in (0, 1):
        run = replace(text_run("full", seed=seed), output_dir=str(tmp_path / str(seed)))
        run, splits, task = hftl.setup_run(run, hftl.TextClassification)
        accelerator = hftl.create_accelerator(run)
        model = hftl.build_model(run, task.head)
        hftl.adapt(model, run.adapt)
        losses.append(hftl.fit(accelerator, model, task, splits, run).records[-1]["validation/loss"])
    assert losses[0] != losses[1]


def test_fit_restores_best_checkpoint_and_stops_early(text_run):
    run = text_run(
        "full", num_epochs=30, lr=0.5, head_lr=0.5, early_stopping_patience=2, metric_for_best_model="loss"
    )  # a learning rate that diverges
    run, splits, task = hftl.setup_run(run, hftl.TextClassification)
    accelerator = hftl.create_accelerator(run)
    model = hftl.build_model(run, task.head)
    hftl.adapt(model, run.adapt)
    history = hftl.fit(accelerator, model, task, splits, run)
    evaluations = [record for record in history.records if "validation/loss" in record]
    best = min(evaluations, key=lambda record: record["validation/loss"])
    assert history.best == {"step": best["step"], "metric": "validation/loss", "value": best["validation/loss"]}
    assert len(evaluations) < 30
    assert hftl.evaluate(accelerator, model, task, splits, run)["validation/loss"] == best["validation/loss"]


def test_optimizer_groups_cover_trainable_parameters(text_run):
    """Head and backbone have separate learning rates; biases and norms have no weight decay."""
    from hftl.training.optim import make_optimizer

    run, _, task = hftl.setup_run(text_run("full", "mean"), hftl.TextClassification)
    model = hftl.build_model(run, task.head)
    hftl.adapt(model, run.adapt)
    optimizer = make_optimizer(model, run.train, torch.device("cpu"))
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    grouped = [names[id(p)] for group in optimizer.param_groups for p in group["params"]]
    assert sorted(grouped) == sorted(name for name, p in model.named_parameters() if p.requires_grad)
    for group in optimizer.param_groups:
        assert group["fused"]
        for parameter in group["params"]:
            assert group["lr"] == (1e-2 if model.in_head(names[id(parameter)]) else 1e-3)
            assert group["weight_decay"] == (0.01 if parameter.ndim > 1 else 0.0)


def test_freeze_backbone_ratio_delays_backbone_schedule(text_run):
    """For half of eight steps the backbone has learning rate 0, then its schedule starts."""
    run = text_run("full", freeze_backbone_ratio=0.5, logging_steps=1)
    run, splits, task = hftl.setup_run(run, hftl.TextClassification)
    accelerator = hftl.create_accelerator(run)
    model = hftl.build_model(run, task.head)
    hftl.adapt(model, run.adapt)
    history = hftl.fit(accelerator, model, task, splits, run)
    rates = [(record["lr/backbone"], record["lr/head"]) for record in history.records if "lr/head" in record]
    assert [backbone == 0 for backbone, _ in rates] == [True] * 4 + [False] * 4
    assert all(head > 0 for _, head in rates) and rates[5][0] == 1e-3


@pytest.mark.parametrize(("kind", "last"), [("linear", 1 / 90), ("cosine", 0.0), ("constant", 1.0)])
def test_lr_factor_warms_up_and_decays(kind, last):
    factors = [lr_factor(step, kind, 100, 10) for step in range(100)]
    assert factors[:10] == pytest.approx([(step + 1) / 11 for step in range(10)])
    assert max(factors) == factors[10] == 1.0
    assert factors[-1] == pytest.approx(last, abs=5e-3)
    assert all(a >= b for a, b in zip(factors[10:], factors[11:], strict=False))


def test_tracker_logs_config_history_and_test_metrics_once(text_run, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    metrics = run_undrawn("text_classification", text_run("frozen", trackers=["tensorboard"], logging_steps=4))
    (folder,) = (tmp_path / "run" / "tensorboard").iterdir()
    events = EventAccumulator(str(folder)).Reload()
    (event,) = events.Scalars("test/accuracy")
    assert (event.step, event.value) == (8, pytest.approx(metrics["test/accuracy"]))
    assert [event.step for event in events.Scalars("train/loss")] == [4, 8]
    assert len(events.Scalars("validation/accuracy")) == 1
    (config,) = folder.rglob("hparams.yml")
    assert "train.head_lr: 0.01" in config.read_text()
