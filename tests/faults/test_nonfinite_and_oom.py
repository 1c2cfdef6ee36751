"""Injected NaN and OOM: detected before the optimizer step, on all processes alike."""

import json
from dataclasses import replace

import pytest
import torch
from launch import flags, launch
from safetensors.torch import load_file

import hftl
from hftl.errors import HftlError, NonfiniteError
from hftl.models.oom_retry import MicroBatchLimit, is_out_of_memory
from hftl.run_folder.checkpoint import read_state
from hftl.training.training_state import trainable_state

NAN_ROW = 17
"""Training row with a NaN loss."""


class NanTask(hftl.TextClassification):
    """Task with a NaN loss in one row."""

    value = float("nan")

    def loss(self, outputs, batch):
        bad = (batch["index"] == NAN_ROW) & outputs["logits"].requires_grad
        return torch.where(bad, self.value, super().loss(outputs, batch))


class InfTask(NanTask):
    """Task with an infinite loss and a finite gradient."""

    value = float("inf")


class InfGradientTask(hftl.TextClassification):
    """Task with finite losses and an infinite gradient in one row (the derivative of a square root at 0)."""

    def loss(self, outputs, batch):
        losses = super().loss(outputs, batch)
        bad = (batch["index"] == NAN_ROW) & losses.requires_grad
        return torch.where(bad, losses.sub(losses.detach()).sqrt(), losses)


def train(run, task_class):
    """Returns history, model, weights before training and the `NonfiniteError`, if any."""
    run, splits, task = hftl.setup_run(run, task_class)
    accelerator = hftl.create_accelerator(run)
    model = hftl.build_model(run, task.head)
    hftl.adapt(model, run.adapt)
    before = {name: tensor.clone() for name, tensor in trainable_state(model).items()}
    try:
        return hftl.fit(accelerator, model, task, splits, run), model, before, None
    except NonfiniteError as error:
        return None, model, before, error


@pytest.mark.parametrize(
    ("task_class", "expected"),
    [
        (NanTask, f"loss nan, .* non-finite loss in training row(s) {NAN_ROW}. "),
        (InfTask, f"loss inf, .* non-finite loss in training row(s) {NAN_ROW}. "),
        (InfGradientTask, "finite losses but non-finite gradient in training row(s) "),
    ],
)
def test_nonfinite_step_raises_before_weights_change(task_class, expected, text_run, tmp_path):
    _, model, before, error = train(text_run(num_epochs=3, logging_steps=1, batch_size_per_device=60), task_class)
    message = str(error)
    assert message.startswith("step 1: ") and all(part in message for part in expected.split(" .* "))
    assert "lr: backbone 0.0005, head 0.005" in message and str(NAN_ROW) in message
    assert all(torch.equal(tensor, before[name]) for name, tensor in trainable_state(model).items())
    assert error.exit_code == 2


def test_nonfinite_stop_saves_checkpoint_and_skip_resumes(text_run, tmp_path):
    run = text_run(num_epochs=2, logging_steps=1, batch_size_per_device=8)
    _, _, _, error = train(run, NanTask)
    failed_at = int(str(error).partition(":")[0].removeprefix("step "))
    (saved,) = (tmp_path / "run" / "checkpoints").glob("step-*")
    assert read_state(saved)["recorder"]["history"]["steps"] == failed_at - 1
    assert all(bool(tensor.isfinite().all()) for tensor in load_file(saved / "weights.safetensors").values())
    run = replace(run, resume="auto", train=replace(run.train, on_nonfinite="skip"))
    history, model, _, error = train(run, NanTask)
    assert error is None and history.skipped == 2 and history.steps == 16
    assert all(bool(tensor.isfinite().all()) for tensor in trainable_state(model).values())
    records = [json.loads(line) for line in (tmp_path / "run" / "history.jsonl").read_text().splitlines()]
    skipped = [record for record in records if "skipped_steps" in record]
    assert [record["skipped_steps"] for record in skipped] == [1, 2]
    assert all(record["train/loss"] is None for record in skipped)
    assert sum(record.get("train/loss") is not None for record in records) == 14
    report = json.loads((tmp_path / "run" / "history.jsonl").read_text().splitlines()[-1])
    assert report["step"] == 16


@pytest.mark.parametrize("how", ["stop", "skip"])
def test_nonfinite_step_restores_running_statistics(how, image_run, tmp_path):
    """An image of infinities changes the running statistics in the forward pass, before the loss is known."""

    class InfImageTask(hftl.ImageClassification):
        def collate(self, examples):
            batch = super().collate(examples)
            bad = torch.tensor([example["pixel_values"].sum() == bad_sum for example in examples])
            batch["inputs"]["pixel_values"][bad] = float("inf")
            return batch

    run = image_run(num_epochs=2, on_nonfinite=how, logging_steps=1)
    run = replace(run, adapt=replace(run.adapt, batch_norm="train"))
    run = replace(run, data=replace(run.data, augment=hftl.AugmentConfig(crop_scale=1, hflip=0, color_jitter=0)))
    resolved, splits, task = hftl.setup_run(run, hftl.ImageClassification)
    rows = task.encode(splits["train"], hftl.build_model(resolved, task.head).processor, 0, None)
    bad_sum = rows.fetch([5], 0)[0]["pixel_values"].sum()
    history, model, _, error = train(run, InfImageTask)
    assert all(bool(tensor.isfinite().all()) for tensor in trainable_state(model).values())
    for file in (tmp_path / "run").rglob("weights.safetensors"):
        assert all(bool(tensor.isfinite().all()) for tensor in load_file(file).values())
    assert (history.skipped == 2) if how == "skip" else "The weights before this step are saved" in str(error)


class AlwaysInfGradientTask(hftl.TextClassification):
    """Task with finite losses and infinite gradients in all rows."""

    def loss(self, outputs, batch):
        losses = super().loss(outputs, batch)
        return losses.sub(losses.detach()).sqrt() + losses.detach() if losses.requires_grad else losses


def test_fp16_without_finite_loss_scale_raises(text_run, monkeypatch):
    run, splits, task = hftl.setup_run(text_run(num_epochs=9), AlwaysInfGradientTask)
    accelerator = hftl.create_accelerator(run)
    model = hftl.build_model(run, task.head)
    hftl.adapt(model, run.adapt)
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**4)
    with pytest.raises(NonfiniteError, match=r"step 6: .* finite losses but non-finite gradient"):
        hftl.fit(accelerator, model, task, splits, run)  # loss scales 16, 8, 4, 2, 1
    assert accelerator.scaler.get_scale() < 1


def test_max_nonfinite_steps_limits_skipping(text_run):
    run = text_run(num_epochs=4, on_nonfinite="skip", max_nonfinite_steps=2)
    _, _, _, error = train(run, NanTask)
    assert error is not None and int(str(error).partition(":")[0].removeprefix("step ")) > 16


def test_oom_halves_micro_batch_and_preserves_weights(text_run, monkeypatch, capsys):
    """Without dropout, weights equal those with enough memory up to rounding; each halving is logged once."""
    from hftl.models.text_model import TextModel

    forward, weights = TextModel.forward, []
    for limit in (None, 3):
        sizes = []

        def forward_with_oom(model, inputs, limit=limit, sizes=sizes):
            rows = len(inputs["input_ids"])
            if limit and rows > limit:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
            sizes.append(rows)
            return forward(model, inputs)

        monkeypatch.setattr(TextModel, "forward", forward_with_oom)
        run = text_run(num_epochs=1, batch_size_per_device=16)
        run = replace(run, model=replace(run.model, dropout=0.0), overwrite=True)
        history, model, _, _ = train(run, hftl.TextClassification)
        weights.append({name: tensor.clone() for name, tensor in trainable_state(model).items()})
        if limit:
            assert max(sizes) <= 3 and history.steps == 4
    for name, tensor in weights[0].items():
        torch.testing.assert_close(weights[1][name], tensor, atol=1e-4, rtol=1e-3)
    output = capsys.readouterr().out
    assert output.count("out of memory in training") == 2 and "with 15 rows per forward pass" in output  # 15 -> 7 -> 3
    assert output.count("out of memory in evaluation") >= 2


@pytest.mark.parametrize("enabled", [True, False])
def test_oom_with_one_row_or_without_retry_raises(enabled):
    def attempt():
        raise MemoryError("no")

    rows = 1 if enabled else 8
    with pytest.raises(
        HftlError, match=rf"out of memory in training with {rows} row\(s\) per forward pass: no\. Reduce"
    ):
        MicroBatchLimit("training", enabled).retrying(attempt, lambda: 8)


def test_is_out_of_memory_rejects_other_errors():
    assert not is_out_of_memory(RuntimeError("shape mismatch")) and not is_out_of_memory(ValueError("out of memory."))
    assert is_out_of_memory(RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"))
    with pytest.raises(RuntimeError, match="shape"):
        MicroBatchLimit("training").retrying(lambda: (_ for _ in ()).throw(RuntimeError("shape")), lambda: 8)


@pytest.mark.parametrize("limit", [None, 1, 2, 3, 5, 8, 100])
@pytest.mark.parametrize("rows", [1, 2, 5, 8])
def test_cut_preserves_batch(rows, limit):
    batch = {
        "inputs": {"x": torch.arange(rows * 3).view(rows, 3)},
        "index": torch.arange(rows),
        "weight": torch.full((rows,), 1 / rows),
        "names": [str(row) for row in range(rows)],
        "about": "all",
    }
    limiter = MicroBatchLimit("training")
    limiter.rows = limit
    pieces = list(limiter.cut(batch))
    assert torch.equal(torch.cat([piece["inputs"]["x"] for piece in pieces]), batch["inputs"]["x"])
    assert [name for piece in pieces for name in piece["names"]] == batch["names"]
    assert all(len(piece["index"]) <= (limit or rows) and piece["about"] == "all" for piece in pieces)


@pytest.fixture(scope="module")
def two(texts, tiny_bert, forks, tmp_path_factory):
    """Folder with the results of runs on two processes with a fault on one of them."""
    root = tmp_path_factory.mktemp("two")
    options = {
        "train__max_steps": 6,
        "train__batch_size_per_device": 8,
        "model__dropout": 0.0,
        "train__logging_steps": 1,
    }

    def job(name, settings=None, **spec):
        arguments = flags(texts, tiny_bert, root / name / "run", **options, **(settings or {}))
        return "faulty", {"recipe": "text_classification", "flags": arguments, **spec}, root / name

    launch(
        2,
        [
            job("reference"),
            job("stopped", nan_rows=[NAN_ROW]),
            job("skipped", {"train__on_nonfinite": "skip"}, nan_rows=[NAN_ROW]),
            job("oom", train_limit=3, eval_limit=2, on_rank=1),
        ],
        forks=forks,
        logs=root / "logs",
    )
    return root


def results_of(folder):
    """Returns the results of both processes and their weights, which must be equal."""
    results = [json.loads((folder / f"result{rank}.json").read_text()) for rank in (0, 1)]
    weights = [load_file(folder / f"weights{rank}.safetensors") for rank in (0, 1)]
    for name, tensor in weights[0].items():
        assert torch.equal(tensor, weights[1][name]), f"processes differ in {name}"
    return results, weights[0]


def test_nonfinite_loss_on_one_process_stops_both(two):
    (first, second), weights = results_of(two / "stopped")
    assert first["error"] == second["error"] and f"training row(s) {NAN_ROW}." in first["error"]
    assert all(bool(tensor.isfinite().all()) for tensor in weights.values())
    (first, second), _ = results_of(two / "skipped")
    assert first["skipped"] == second["skipped"] == 1 and first["error"] is None


def test_oom_on_one_process_preserves_weights(two):
    (first, second), weights = results_of(two / "oom")
    assert max(first["rows"]) == 8 and max(second["rows"]) <= 3 and first["steps"] == second["steps"] == 6
    _, expected = results_of(two / "reference")
    for name, tensor in expected.items():
        torch.testing.assert_close(weights[name], tensor, atol=1e-4, rtol=1e-3)
