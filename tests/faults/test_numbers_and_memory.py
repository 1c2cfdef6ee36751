"""NaN and short memory, injected: seen before the weights change, the same on all processes, never hidden."""

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

POISON = 17
"""A training row whose loss is NaN."""


class Poisoned(hftl.TextClassification):
    """One row's loss is NaN."""

    value = float("nan")

    def loss(self, outputs, batch):
        bad = (batch["index"] == POISON) & outputs["logits"].requires_grad
        return torch.where(bad, self.value, super().loss(outputs, batch))


class Endless(Poisoned):
    """The loss is infinite, the gradient finite."""

    value = float("inf")


class SteepTask(hftl.TextClassification):
    """Every loss is finite, the gradient of one row is not: the slope of a root at 0 is infinite."""

    def loss(self, outputs, batch):
        losses = super().loss(outputs, batch)
        bad = (batch["index"] == POISON) & losses.requires_grad
        return torch.where(bad, losses.sub(losses.detach()).sqrt(), losses)


def trained(run, kind):
    run, splits, task = hftl.setup_run(run, kind)
    accelerator = hftl.create_accelerator(run)
    model = hftl.build_model(run, task.head)
    hftl.adapt(model, run.adapt)
    before = {name: tensor.clone() for name, tensor in trainable_state(model).items()}
    try:
        return hftl.fit(accelerator, model, task, splits, run), model, before, None
    except NonfiniteError as error:
        return None, model, before, error


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        (Poisoned, f"loss nan, .* non-finite loss in training row(s) {POISON}. "),
        (Endless, f"loss inf, .* non-finite loss in training row(s) {POISON}. "),
        (SteepTask, "finite losses but non-finite gradient in training row(s) "),
    ],
)
def test_a_number_that_is_not_finite_stops_before_the_weights_change(kind, said, text_run, tmp_path):
    _, model, before, error = trained(text_run(num_epochs=3, logging_steps=1, batch_size_per_device=60), kind)
    text = str(error)
    assert text.startswith("step 1: ") and all(part in text for part in said.split(" .* "))
    assert "lr: backbone 0.0005, head 0.005" in text and str(POISON) in text
    assert all(torch.equal(tensor, before[name]) for name, tensor in trainable_state(model).items())
    assert error.exit_code == 2


def test_after_a_stop_the_last_good_state_is_saved_and_skipping_goes_on_from_it(text_run, tmp_path):
    run = text_run(num_epochs=2, logging_steps=1, batch_size_per_device=8)
    _, _, _, error = trained(run, Poisoned)
    failed_at = int(str(error).partition(":")[0].removeprefix("step "))
    (saved,) = (tmp_path / "run" / "checkpoints").glob("step-*")
    assert read_state(saved)["recorder"]["history"]["steps"] == failed_at - 1
    assert all(bool(tensor.isfinite().all()) for tensor in load_file(saved / "weights.safetensors").values())
    run = replace(run, resume="auto", train=replace(run.train, on_nonfinite="skip"))
    history, model, _, error = trained(run, Poisoned)
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
def test_running_statistics_of_a_step_that_is_not_taken_are_taken_back(how, image_run, tmp_path):
    """An image of infinities spoils what batch norms count in the forward pass, before any loss is seen."""

    class Spoilt(hftl.ImageClassification):
        def collate(self, examples):
            batch = super().collate(examples)
            bad = torch.tensor([example["pixel_values"].sum() == spoil for example in examples])
            batch["inputs"]["pixel_values"][bad] = float("inf")
            return batch

    run = image_run(num_epochs=2, on_nonfinite=how, logging_steps=1)
    run = replace(run, adapt=replace(run.adapt, batch_norm="train"))
    run = replace(run, data=replace(run.data, augment=hftl.AugmentConfig(crop_scale=1, hflip=0, color_jitter=0)))
    prepared, splits, task = hftl.setup_run(run, hftl.ImageClassification)
    rows = task.encode(splits["train"], hftl.build_model(prepared, task.head).processor, 0, None)
    spoil = rows.fetch([5], 0)[0]["pixel_values"].sum()
    history, model, _, error = trained(run, Spoilt)
    assert all(bool(tensor.isfinite().all()) for tensor in trainable_state(model).values())
    for file in (tmp_path / "run").rglob("weights.safetensors"):
        assert all(bool(tensor.isfinite().all()) for tensor in load_file(file).values())
    assert (history.skipped == 2) if how == "skip" else "The weights before this step are saved" in str(error)


class Steep(hftl.TextClassification):
    """Finite losses whose gradient is never finite."""

    def loss(self, outputs, batch):
        losses = super().loss(outputs, batch)
        return losses.sub(losses.detach()).sqrt() + losses.detach() if losses.requires_grad else losses


def test_fp16_that_finds_no_loss_scale_is_an_error_and_not_a_training(text_run, monkeypatch):
    run, splits, task = hftl.setup_run(text_run(num_epochs=9), Steep)
    accelerator = hftl.create_accelerator(run)
    model = hftl.build_model(run, task.head)
    hftl.adapt(model, run.adapt)
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**4)
    with pytest.raises(NonfiniteError, match=r"step 6: .* finite losses but non-finite gradient"):
        hftl.fit(accelerator, model, task, splits, run)  # 16, 8, 4, 2, 1: five steps of backing off
    assert accelerator.scaler.get_scale() < 1


def test_skipping_has_a_bound(text_run):
    run = text_run(num_epochs=4, on_nonfinite="skip", max_nonfinite_steps=2)
    _, _, _, error = trained(run, Poisoned)
    assert error is not None and int(str(error).partition(":")[0].removeprefix("step ")) > 16


def test_short_memory_halves_the_rows_and_computes_the_same(text_run, monkeypatch, capsys):
    """Dropout off: the same weights as with enough memory, up to rounding; said once for each halving."""
    from hftl.models.text_model import TextModel

    forward, weights = TextModel.forward, []
    for fits in (None, 3):
        seen = []

        def cramped(model, inputs, fits=fits, seen=seen):
            rows = len(inputs["input_ids"])
            if fits and rows > fits:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
            seen.append(rows)
            return forward(model, inputs)

        monkeypatch.setattr(TextModel, "forward", cramped)
        run = text_run(num_epochs=1, batch_size_per_device=16)
        run = replace(run, model=replace(run.model, dropout=0.0), overwrite=True)
        history, model, _, _ = trained(run, hftl.TextClassification)
        weights.append({name: tensor.clone() for name, tensor in trainable_state(model).items()})
        if fits:
            assert max(seen) <= 3 and history.steps == 4
    for name, tensor in weights[0].items():
        torch.testing.assert_close(weights[1][name], tensor, atol=1e-4, rtol=1e-3)
    said = capsys.readouterr().out
    assert said.count("out of memory in training") == 2 and "with 15 rows at once" in said  # 15 -> 7 -> 3
    assert said.count("out of memory in evaluation") >= 2


@pytest.mark.parametrize("enabled", [True, False])
def test_memory_too_short_for_one_row_or_for_trying_again_is_an_error(enabled):
    def attempt():
        raise MemoryError("no")

    rows = 1 if enabled else 8
    with pytest.raises(HftlError, match=rf"out of memory in training with {rows} row\(s\) at once: no\. Make"):
        MicroBatchLimit("training", enabled).retrying(attempt, lambda: 8)


def test_other_errors_are_not_taken_for_short_memory():
    assert not is_out_of_memory(RuntimeError("shape mismatch")) and not is_out_of_memory(ValueError("out of memory."))
    assert is_out_of_memory(RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"))
    with pytest.raises(RuntimeError, match="shape"):
        MicroBatchLimit("training").retrying(lambda: (_ for _ in ()).throw(RuntimeError("shape")), lambda: 8)


@pytest.mark.parametrize("limit", [None, 1, 2, 3, 5, 8, 100])
@pytest.mark.parametrize("rows", [1, 2, 5, 8])
def test_pieces_are_the_batch(rows, limit):
    batch = {
        "inputs": {"x": torch.arange(rows * 3).view(rows, 3)},
        "index": torch.arange(rows),
        "weight": torch.full((rows,), 1 / rows),
        "names": [str(row) for row in range(rows)],
        "about": "all",
    }
    cutter = MicroBatchLimit("training")
    cutter.rows = limit
    pieces = list(cutter.cut(batch))
    assert torch.equal(torch.cat([piece["inputs"]["x"] for piece in pieces]), batch["inputs"]["x"])
    assert [name for piece in pieces for name in piece["names"]] == batch["names"]
    assert all(len(piece["index"]) <= (limit or rows) and piece["about"] == "all" for piece in pieces)


@pytest.fixture(scope="module")
def two(texts, tiny_bert, forks, tmp_path_factory):
    """What happens on two processes, of which one has the trouble."""
    root = tmp_path_factory.mktemp("two")
    options = {
        "train__max_steps": 6,
        "train__batch_size_per_device": 8,
        "model__dropout": 0.0,
        "train__logging_steps": 1,
    }

    def job(name, more=None, **spec):
        chosen = flags(texts, tiny_bert, root / name / "run", **options, **(more or {}))
        return "faulty", {"recipe": "text_classification", "flags": chosen, **spec}, root / name

    launch(
        2,
        [
            job("fine"),
            job("poisoned", poison=[POISON]),
            job("skipped", {"train__on_nonfinite": "skip"}, poison=[POISON]),
            job("cramped", fits_training=3, fits_evaluation=2, on_rank=1),
        ],
        forks=forks,
        logs=root / "logs",
    )
    return root


def found(folder):
    parts = [json.loads((folder / f"found{rank}.json").read_text()) for rank in (0, 1)]
    weights = [load_file(folder / f"weights{rank}.safetensors") for rank in (0, 1)]
    for name, tensor in weights[0].items():
        assert torch.equal(tensor, weights[1][name]), f"processes differ in {name}"
    return parts, weights[0]


def test_two_processes_agree_on_a_number_that_one_of_them_saw(two):
    (mine, other), weights = found(two / "poisoned")
    assert mine["error"] == other["error"] and f"training row(s) {POISON}." in mine["error"]
    assert all(bool(tensor.isfinite().all()) for tensor in weights.values())
    (mine, other), _ = found(two / "skipped")
    assert mine["skipped"] == other["skipped"] == 1 and mine["error"] is None


def test_a_process_short_of_memory_takes_more_pieces_and_the_others_wait(two):
    (mine, other), weights = found(two / "cramped")
    assert max(mine["rows"]) == 8 and max(other["rows"]) <= 3 and mine["steps"] == other["steps"] == 6
    _, wanted = found(two / "fine")
    for name, tensor in wanted.items():
        torch.testing.assert_close(weights[name], tensor, atol=1e-4, rtol=1e-3)
