"""Object detection: the loss of each image, COCO's numbers, what is saved and what other detectors become."""

import contextlib
import io
import json
import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch
from boxes import SIZE, make_coco
from conftest import run_undrawn
from launch import flags, launch
from torchvision.ops import box_convert

import hftl
from hftl.reporting import write_report
from hftl.run.testing import check_task
from hftl.tasks.targets.detection.metrics import DetectionMetrics
from hftl.tasks.targets.detection.set_prediction_loss import set_loss
from hftl.tasks.targets.detection.target import LabelledBoxes


@pytest.fixture
def detection_run(tiny_timm, tmp_path):
    """Returns a function that makes the configuration of a quick run over 12 pictures of squares."""

    def make(method="full", name=None, **train):
        options = {"num_epochs": 1, "lr": 1e-3, "head_lr": 1e-3, "batch_size_per_device": 4, "trackers": []} | train
        detector = hftl.DetectorConfig(d_model=32, num_feature_levels=2, decoder_layers=2, num_queries=10)
        return hftl.RunConfig(
            data=hftl.DataConfig(source=str(make_coco(tmp_path / "data"))),
            model=hftl.ModelConfig(name=name or tiny_timm["test_resnet"], image_size=SIZE, detector=detector),
            adapt=hftl.AdaptConfig(method=method),
            train=hftl.TrainConfig(**options),
            output_dir=str(tmp_path / "run"),
        )

    return make


def random_labels(counts, classes, seed=0):
    rng = np.random.default_rng(seed)
    labels = []
    for count in counts:
        centre = rng.uniform(0.3, 0.7, (count, 2))
        boxes = np.concatenate([centre, rng.uniform(0.05, 0.4, (count, 2))], 1)
        labels.append(
            {
                "class_labels": torch.tensor(rng.integers(0, classes, count), dtype=torch.int64),
                "boxes": torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
            }
        )
    return labels


def random_outputs(batch, queries, width, layers=0):
    torch.manual_seed(0)
    found = {"logits": torch.randn(batch, queries, width), "pred_boxes": torch.rand(batch, queries, 4) * 0.6 + 0.2}
    if layers:
        found["layer_logits"] = torch.randn(batch, layers, queries, width)
        found["layer_boxes"] = torch.rand(batch, layers, queries, 4) * 0.6 + 0.2
    return {name: value.requires_grad_() for name, value in found.items()}


def test_the_loss_of_an_image_is_that_of_the_stock_detectors():
    from transformers import DetrConfig, RTDetrConfig
    from transformers.loss.loss_for_object_detection import ForObjectDetectionLoss
    from transformers.loss.loss_rt_detr import RTDetrForObjectDetectionLoss

    labels = random_labels([3, 0, 7], 4)
    outputs = random_outputs(3, 12, 4, layers=2)
    names = {number: str(number) for number in range(4)}
    config = RTDetrConfig(id2label=names)
    ours = set_loss(outputs, labels, 4)
    for row, label in enumerate(labels):
        one = {name: value[row : row + 1] for name, value in outputs.items()}
        layers = [torch.cat([one[f"layer_{kind}"], one[last][:, None]], 1) for kind, last in KINDS]
        # the stock loss takes the proposals of the encoder apart, as one more layer
        model_class = RTDetrForObjectDetectionLoss(
            one["logits"], [label], "cpu", one["pred_boxes"], config, layers[0][:, 1:], layers[1][:, 1:],
            enc_topk_logits=layers[0][:, 0], enc_topk_bboxes=layers[1][:, 0],
        )  # fmt: skip
        torch.testing.assert_close(ours[row], model_class[0])

    outputs = random_outputs(3, 12, 5)
    ours = set_loss(outputs, labels, 4)
    for row in (0, 2):  # of an image without boxes the stock loss is the same but for its mean
        model_class = ForObjectDetectionLoss(
            outputs["logits"][row : row + 1], [labels[row]], "cpu", outputs["pred_boxes"][row : row + 1],
            DetrConfig(id2label=names),
        )  # fmt: skip
        torch.testing.assert_close(ours[row], model_class[0])


KINDS = (("logits", "logits"), ("boxes", "pred_boxes"))


@pytest.mark.parametrize("width", [3, 4])
def test_an_image_does_not_know_its_neighbours_and_may_be_empty(width):
    labels = random_labels([5, 0, 12, 1], 3)
    outputs = random_outputs(4, 8, width, layers=1)  # 12 boxes for 8 queries, too
    together = set_loss(outputs, labels, 3)
    alone = [
        set_loss({name: value[row : row + 1] for name, value in outputs.items()}, labels[row : row + 1], 3)
        for row in range(4)
    ]
    torch.testing.assert_close(together, torch.cat(alone))
    together.sum().backward()
    assert torch.isfinite(together).all()
    for value in outputs.values():
        assert torch.isfinite(value.grad).all() and value.grad.abs().sum() > 0
    for name in ("logits", "pred_boxes"):
        broken = {name: value.detach().clone() for name, value in outputs.items()}
        broken[name][0, 0, 0] = float("nan")
        finite = torch.isfinite(set_loss(broken, labels, 3)).tolist()
        assert finite == [False, True, True, True]  # said by the loop, not an error of the matcher


def test_a_rare_category_may_fall_into_the_validation_cut():
    from datasets import Dataset

    from hftl.data.splits import Splits

    def rows(*names):
        return Dataset.from_list([{"objects": {"bbox": [[0.0, 0.0, 5.0, 5.0]], "category": [name]}} for name in names])

    parts = {"train": rows("a", "b", "a"), "validation": rows("rare", "a")}
    found = LabelledBoxes.find(Splits(parts, hftl.DataConfig(source="here"), cut=True), "image")
    assert not found.problems and found.names == ["a", "b", "rare"]
    assert LabelledBoxes.find(Splits(parts, hftl.DataConfig(source="here")), "image").names == ["a", "b"]


def test_detections_are_shown_on_a_terminal(capsys):
    from hftl.inference.batch_inference import _Terminal

    terminal = _Terminal()
    terminal.write([{"input": "a.jpg", "row": 0, "objects": []}])
    found = [{"label": "cat", "score": 0.91, "box": [1.0, 2.0, 3.0, 4.0]}] * 2
    terminal.write([{"input": "b.jpg", "row": 1, "objects": found}])
    lines = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    one = "cat 0.9100 [1.0, 2.0, 3.0, 4.0]"
    assert lines == [["input", "row", "objects"], ["a.jpg", "0", "none"], ["b.jpg", "1", f"{one}, {one}"]]


@pytest.mark.parametrize("task", [hftl.ObjectDetection, hftl.SemanticSegmentation])
def test_a_backbone_with_channels_last_is_refused(task, image_run):
    from hftl.models.build import build_model
    from hftl.models.task_model import HeadSpec

    run = image_run()
    run = replace(run, model=hftl.ModelConfig(name="mambaout_femto", pretrained=False, image_size=64))
    with pytest.raises(hftl.HftlError, match="channels-last"):
        build_model(run, HeadSpec(task.model_class, 2, ("a", "b"), None))


def random_scenes(count, classes, rng):
    """Images with boxes of any number, some of them crowds, and detections near them, far from them, or none."""
    scenes = []
    for row in range(count):
        size = rng.integers(50, 300, 2)
        true = random_boxes(rng, int(rng.integers(0, 9)) if row % 4 else 0, size)
        near = true + rng.normal(0, 4, true.shape)
        boxes = np.concatenate([near, random_boxes(rng, int(rng.integers(0, 120)) if row % 5 else 0, size)])
        boxes = np.concatenate([np.minimum(boxes[:, :2], boxes[:, 2:]), np.maximum(boxes[:, :2], boxes[:, 2:])], 1)
        boxes = boxes.clip(0, np.tile(size[::-1], 2)).astype(np.float32)
        scores = rng.integers(1, 20, len(boxes)) / 30  # with ties
        scores[: len(true)] += 0.3
        order = np.argsort(-scores, kind="stable")
        kinds = rng.integers(0, classes, len(true))
        guessed = np.concatenate([kinds, rng.integers(0, classes, len(boxes) - len(true))])
        label = {
            "true_boxes": torch.tensor(true, dtype=torch.float32),
            "true_classes": torch.tensor(kinds),
            "crowd": torch.tensor(rng.random(len(true)) < 0.2),
        }
        found = (torch.tensor(boxes[order]), torch.tensor(guessed[order]), torch.tensor(scores[order]))
        scenes.append((size, label, found))
    return scenes


def random_boxes(rng, count, size):
    low = rng.uniform(0, 0.7, (count, 2))
    return np.concatenate([low, low + rng.uniform(0.05, 0.3, (count, 2))], 1) * np.tile(size[::-1], 2)


def by_pycocotools(scenes, names):
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    content = {"categories": [{"id": 10 + i, "name": name} for i, name in enumerate(names)], "annotations": []}
    content["images"] = [{"id": 100 + row} for row in range(len(scenes))]
    results = []
    for row, (_, label, (boxes, classes, scores)) in enumerate(scenes):
        corners = box_convert(label["true_boxes"].double(), "xyxy", "xywh").tolist()
        for box, kind, crowd in zip(corners, label["true_classes"].tolist(), label["crowd"].tolist(), strict=True):
            content["annotations"].append(
                {"id": len(content["annotations"]) + 1, "image_id": 100 + row, "category_id": 10 + kind, "bbox": box,
                 "area": box[2] * box[3], "iscrowd": int(crowd)}
            )  # fmt: skip
        corners = box_convert(boxes.double(), "xyxy", "xywh").tolist()
        for box, kind, score in zip(corners, classes.tolist(), scores.tolist(), strict=True):
            results.append({"image_id": 100 + row, "category_id": 10 + kind, "bbox": box, "score": score})
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        truth.dataset = content
        truth.createIndex()
        evaluation = COCOeval(truth, truth.loadRes(results), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    stats = evaluation.stats
    found = {"ap": stats[0], "ap50": stats[1], "ap75": stats[2], "ar100": stats[8]}
    precision = evaluation.eval["precision"][:, :, :, 0, 2]
    for number, name in enumerate(names):
        of_class = precision[:, :, number]
        if (of_class > -1).any():
            found[f"ap/{name}"] = of_class[of_class > -1].mean()
    return found


def update(metric, scenes, rows):
    """Adds images in batches of uneven sizes."""
    while rows:
        part, rows = rows[: 1 + len(rows) % 4], rows[1 + len(rows) % 4 :]
        metric.detect = lambda outputs, sizes, part=part: [scenes[row][2] for row in part]
        labels = [scenes[row][1] for row in part]
        metric.update({}, {"index": torch.tensor(part), "labels": labels, "size": torch.zeros(len(part), 2)})


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_metrics_are_those_of_pycocotools(seed):
    rng = np.random.default_rng(seed)
    names = ["cat", "dog", "cow", "never"]
    scenes = random_scenes(30, 3, rng)
    wanted = by_pycocotools(scenes, names)
    assert wanted["ap"] > 0.05 and "ap/never" not in wanted

    whole = DetectionMetrics(names, None)
    update(whole, scenes, list(range(30)))
    assert whole.compute() == pytest.approx(wanted, abs=1e-6)

    order = rng.permutation(30).tolist()
    parts = [DetectionMetrics(names, None) for _ in range(3)]
    for part, rows in zip(parts, (order[:5], order[5:22], order[22:]), strict=True):
        update(part, scenes, rows)
    sent = [pickle.loads(pickle.dumps(part)) for part in parts]  # as from other processes
    for part in sent[1:]:
        sent[0].merge(part)
    assert sent[0].compute() == whole.compute()


def test_metrics_without_boxes_or_detections():
    nothing = (torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64), torch.zeros(0))
    label = {
        "true_boxes": torch.zeros(0, 4),
        "true_classes": torch.zeros(0, dtype=torch.int64),
        "crowd": torch.zeros(0),
    }
    empty = DetectionMetrics(["a"], None)
    update(empty, [(None, label, nothing)] * 2, [0, 1])
    assert np.isnan(empty.compute()["ap"]) and "ap/a" not in empty.compute()
    one = {
        "true_boxes": torch.tensor([[1.0, 1, 5, 5]]),
        "true_classes": torch.tensor([0]),
        "crowd": torch.tensor([False]),
    }
    missed = DetectionMetrics(["a"], None)
    update(missed, [(None, one, nothing)] * 2, [0, 1])
    assert missed.compute() == {"ap": 0, "ap50": 0, "ap75": 0, "ar100": 0, "ap/a": 0}


@pytest.mark.parametrize("width", [3, 4])
def test_detections_are_those_of_the_stock_processors(width):
    from types import SimpleNamespace

    from transformers import RTDetrImageProcessor, YolosImageProcessor

    torch.manual_seed(0)
    outputs = {"logits": torch.randn(2, 9, width) * 3, "pred_boxes": torch.rand(2, 9, 4) * 0.3 + 0.35}
    sizes = torch.tensor([[100, 200], [50, 60]])
    kind = RTDetrImageProcessor if width == 3 else YolosImageProcessor
    wanted = kind().post_process_object_detection(SimpleNamespace(**outputs), threshold=0.0, target_sizes=sizes)
    found = LabelledBoxes("objects", ["a", "b", "c"]).detections(outputs, sizes)
    for (boxes, classes, scores), model_class in zip(found, wanted, strict=True):
        order = model_class["scores"].sort(descending=True, stable=True).indices
        torch.testing.assert_close(scores, model_class["scores"][order])
        assert classes.tolist() == model_class["labels"][order].tolist()
        torch.testing.assert_close(boxes, model_class["boxes"][order], atol=1e-3, rtol=1e-4)


def test_object_detection_passes_the_contract(detection_run):
    run, splits, task = hftl.setup_run(detection_run(), hftl.ObjectDetection)
    assert task.head.labels == ("blue", "red") and task.head.num_outputs == 2
    check_task(task, splits, run, rows=6)


def make_detector(kind, folder):
    """A detector with random weights for three classes of its own, as a folder of transformers."""
    import transformers

    names = {number: name for number, name in enumerate(("person", "car", "kite"))}
    torch.manual_seed(0)
    small = {"d_model": 32, "decoder_layers": 2, "num_queries": 9, "id2label": names}
    if kind == "yolos":
        config = transformers.YolosConfig(
            hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, image_size=[64, 64],
            num_detection_tokens=9, id2label=names, use_mid_position_embeddings=False,
        )  # fmt: skip
        net, processor = transformers.YolosForObjectDetection(config), transformers.YolosImageProcessor()
    elif kind == "detr":
        backbone = transformers.TimmBackboneConfig(backbone="test_resnet", out_indices=[4])
        wide = {"encoder_layers": 1, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "encoder_attention_heads": 2}
        config = transformers.DetrConfig(
            backbone_config=backbone, decoder_attention_heads=2, dropout=0.0, **wide, **small
        )
        net, processor = transformers.DetrForObjectDetection(config), transformers.DetrImageProcessor()
    else:
        body = transformers.RTDetrResNetConfig(
            embedding_size=8,
            hidden_sizes=[8, 16, 24, 32],
            depths=[1, 1, 1, 1],
            layer_type="basic",
            out_indices=[2, 3, 4],
        )
        wide = {"encoder_hidden_dim": 32, "encoder_in_channels": [16, 24, 32], "decoder_in_channels": [32] * 3}
        heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 32}
        config = transformers.RTDetrConfig(backbone_config=body, decoder_ffn_dim=32, **wide, **heads, **small)
        net, processor = transformers.RTDetrForObjectDetection(config), transformers.RTDetrImageProcessor()
    net.save_pretrained(folder)
    processor.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize(
    ("kind", "head"),
    [
        ("yolos", {"class_labels_classifier.layers.2"}),
        ("detr", {"class_labels_classifier"}),
        ("rt_detr", {"model.enc_score_head", "model.decoder.class_embed.0", "model.decoder.class_embed.1"}),
    ],
)
def test_detectors_of_transformers_get_new_class_layers_and_keep_the_rest(kind, head, detection_run, tmp_path):
    from transformers import AutoModelForObjectDetection

    name = make_detector(kind, tmp_path / "detector")
    run, splits, task = hftl.setup_run(detection_run(name=name), hftl.ObjectDetection)
    model = hftl.build_model(run, task.head)
    assert set(model.head_modules) == head and model.original_labels() == ["blue", "red"]
    before = AutoModelForObjectDetection.from_pretrained(name).state_dict()
    kept = {key: value for key, value in model.net.state_dict().items() if not model.in_head(key)}
    assert kept and all(torch.equal(value, before[key]) for key, value in kept.items())
    if kind == "yolos":  # unlike RT-DETR, with a class for no object, and without layers of proposals
        check_task(task, splits, run, rows=3)


FRESH = """
import json, sys, torch, transformers, pyarrow.parquet as pq
from PIL import Image
place, files, others = json.loads(sys.argv[1])
rows = [row["objects"] for row in pq.read_table(place + "/predictions.parquet").to_pylist() if row["split"] == "test"]
model = transformers.AutoModelForObjectDetection.from_pretrained(place + "/model").eval()
assert model.config.id2label == {0: "blue", 1: "red"}, model.config.id2label
pipe = transformers.pipeline("object-detection", place + "/model")
for file, expected in zip(files, rows, strict=True):
    found = pipe(file, threshold=0.3)
    found.sort(key=lambda each: -each["score"])
    assert [each["label"] for each in found] == [each["label"] for each in expected]
    for one, other in zip(found, expected):
        assert abs(one["score"] - other["score"]) < 1e-3, (one, other)
        for value, wanted, most in zip(one["box"].values(), other["box"], (64, 48, 64, 48)):
            assert abs(min(max(value, 0), most) - wanted) <= 1.01, (one, other)
print("equal", sum(map(len, rows)))
"""


def test_a_run_opens_without_hftl_and_predicts_the_same(detection_run, tmp_path, monkeypatch, run_without_hftl):
    from hftl.cli.main import main

    monkeypatch.setattr(
        "hftl.tasks.targets.detection.target.SCORE_FLOOR", 0.0
    )  # after so short a training nothing is certain
    run = detection_run("lora", num_epochs=1)
    metrics = run_undrawn("object_detection", run)
    assert write_report(tmp_path / "run").is_file()
    assert {"test/ap", "test/ap50", "test/ap75", "test/ar100", "test/loss", "validation/ap/red"} <= set(metrics)
    verified = json.loads((tmp_path / "run/report.json").read_text())["verified"]
    assert set(verified) == {"model/transformers", "adapter/peft"}
    files = [str(tmp_path / f"data/images/test/test{number}.png") for number in range(3)]
    code = FRESH.replace("threshold=0.3", "threshold=0.0")
    assert "equal 30" in run_without_hftl(code, json.dumps([run.output_dir, files, 0]))

    predictor = hftl.load(run.output_dir)
    found = predictor.predict(files)
    assert [len(row["objects"]) for row in found] == [10, 10, 10]
    assert set(found[0]["objects"][0]) == {"label", "score", "box"}
    main(["predict", run.output_dir, str(tmp_path / "data/images/test"), "--output", str(tmp_path / "found.jsonl")])
    lines = [json.loads(line) for line in (tmp_path / "found.jsonl").read_text().splitlines()]
    assert [line["objects"] for line in lines] == [row["objects"] for row in found]


def test_names_that_are_no_detector_are_refused(detection_run, tiny_timm, tiny_bert):
    for name, message in {
        tiny_bert: "has no object detector in transformers",
        "resnet5000": "timm has no model",
        "./nowhere/at/all": "does not exist",
    }.items():
        with pytest.raises(hftl.HftlError, match=message):
            hftl.setup_run(detection_run(name=name), hftl.ObjectDetection)
    run = detection_run(name=tiny_timm["test_vit"])
    _, _, task = hftl.setup_run(detection_run(), hftl.ObjectDetection)
    with pytest.raises(hftl.HftlError, match="feature maps of strides"):
        hftl.build_model(run, task.head)
    many = replace(run.model, name=tiny_timm["test_resnet"], detector=hftl.DetectorConfig(num_queries=100))
    with pytest.raises(hftl.HftlError, match="100 exceeds the 20 feature positions of an image of 64 x 64"):
        hftl.build_model(replace(run, model=many), task.head)
    with pytest.raises(hftl.HftlError, match=r"\[48, 64\] is not a multiple of 32.*Set \[64, 64\]"):
        hftl.build_model(replace(run, model=replace(many, image_size=[48, 64])), task.head)


def test_two_processes_train_and_one_measures_the_same(detection_run, forks, tmp_path):
    from hftl.inference.batch_inference import evaluate_saved

    run = detection_run()
    options = flags(run.data.source, run.model.name, run.output_dir, model__image_size=64, train__num_epochs=1)
    options += [f"--model.detector.{name}" for name in ("width=32", "num_queries=10")]
    options += ["--train.batch_size_per_device=2", "--train.lr=1e-3", "--train.head_lr=1e-3"]
    launch(2, [("recipe", {"recipe": "object_detection", "flags": options}, tmp_path)], forks=forks, logs=tmp_path)
    metrics = json.loads((tmp_path / "run/metrics.json").read_text())
    alone = evaluate_saved(run.output_dir, batch_size=2)
    assert alone and alone == pytest.approx({name: metrics[name] for name in alone}, abs=1e-6)
