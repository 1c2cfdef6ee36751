"""Object detection: loss against transformers, metrics against pycocotools, saved models and pretrained detectors."""

import contextlib
import io
import json
import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import run_undrawn
from detection_data import SIZE, make_coco
from launch import flags, launch
from torchvision.ops import box_convert

import hftl
from hftl.reporting import write_report
from hftl.run.testing import check_task
from hftl.tasks.targets.detection.metrics import DetectionMetrics
from hftl.tasks.targets.detection.set_prediction_loss import set_loss
from hftl.tasks.targets.detection.target import DetectionTarget


@pytest.fixture
def detection_run(tiny_timm, tmp_path):
    """Returns a function that creates the configuration of a short run on 12 images of squares."""

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
        center = rng.uniform(0.3, 0.7, (count, 2))
        boxes = np.concatenate([center, rng.uniform(0.05, 0.4, (count, 2))], 1)
        labels.append(
            {
                "class_labels": torch.tensor(rng.integers(0, classes, count), dtype=torch.int64),
                "boxes": torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
            }
        )
    return labels


def random_outputs(batch, queries, width, layers=0):
    torch.manual_seed(0)
    outputs = {"logits": torch.randn(batch, queries, width), "pred_boxes": torch.rand(batch, queries, 4) * 0.6 + 0.2}
    if layers:
        outputs["layer_logits"] = torch.randn(batch, layers, queries, width)
        outputs["layer_boxes"] = torch.rand(batch, layers, queries, 4) * 0.6 + 0.2
    return {name: value.requires_grad_() for name, value in outputs.items()}


def test_set_loss_of_each_image_matches_transformers():
    from transformers import DetrConfig, RTDetrConfig
    from transformers.loss.loss_for_object_detection import ForObjectDetectionLoss
    from transformers.loss.loss_rt_detr import RTDetrForObjectDetectionLoss

    labels = random_labels([3, 0, 7], 4)
    outputs = random_outputs(3, 12, 4, layers=2)
    names = {number: str(number) for number in range(4)}
    config = RTDetrConfig(id2label=names)
    losses = set_loss(outputs, labels, 4)
    for row, label in enumerate(labels):
        image = {name: value[row : row + 1] for name, value in outputs.items()}
        logits, boxes = (
            torch.cat([image[f"layer_{name}"], image[last][:, None]], 1)
            for name, last in (("logits", "logits"), ("boxes", "pred_boxes"))
        )
        # transformers passes the encoder proposals, here the first layer, as separate arguments
        expected = RTDetrForObjectDetectionLoss(
            image["logits"], [label], "cpu", image["pred_boxes"], config, logits[:, 1:], boxes[:, 1:],
            enc_topk_logits=logits[:, 0], enc_topk_bboxes=boxes[:, 0],
        )  # fmt: skip
        torch.testing.assert_close(losses[row], expected[0])

    outputs = random_outputs(3, 12, 5)
    losses = set_loss(outputs, labels, 4)
    for row in (0, 2):  # image 1 has no boxes, where transformers takes another mean
        expected = ForObjectDetectionLoss(
            outputs["logits"][row : row + 1], [labels[row]], "cpu", outputs["pred_boxes"][row : row + 1],
            DetrConfig(id2label=names),
        )  # fmt: skip
        torch.testing.assert_close(losses[row], expected[0])


@pytest.mark.parametrize("width", [3, 4])
def test_set_loss_is_independent_of_other_images(width):
    labels = random_labels([5, 0, 12, 1], 3)
    outputs = random_outputs(4, 8, width, layers=1)  # includes an image with more boxes than queries
    losses = set_loss(outputs, labels, 3)
    separate = [
        set_loss({name: value[row : row + 1] for name, value in outputs.items()}, labels[row : row + 1], 3)
        for row in range(4)
    ]
    torch.testing.assert_close(losses, torch.cat(separate))
    losses.sum().backward()
    assert torch.isfinite(losses).all()
    for value in outputs.values():
        assert torch.isfinite(value.grad).all() and value.grad.abs().sum() > 0
    for name in ("logits", "pred_boxes"):
        broken = {name: value.detach().clone() for name, value in outputs.items()}
        broken[name][0, 0, 0] = float("nan")
        finite = torch.isfinite(set_loss(broken, labels, 3)).tolist()
        assert finite == [False, True, True, True]  # the training loop reports NaN; the matcher must not raise


def test_target_accepts_rare_category_in_own_validation():
    from datasets import Dataset

    from hftl.data.splits import Splits

    def rows(*names):
        return Dataset.from_list([{"objects": {"bbox": [[0.0, 0.0, 5.0, 5.0]], "category": [name]}} for name in names])

    sets = {"train": rows("a", "b", "a"), "validation": rows("rare", "a")}
    target = DetectionTarget.find(Splits(sets, hftl.DataConfig(source="here"), cut=True), "image")
    assert not target.problems and target.names == ["a", "b", "rare"]
    assert DetectionTarget.find(Splits(sets, hftl.DataConfig(source="here")), "image").names == ["a", "b"]


def test_terminal_writer_prints_detections(capsys):
    from hftl.inference.batch_inference import _Terminal

    terminal = _Terminal()
    terminal.write([{"input": "a.jpg", "row": 0, "objects": []}])
    objects = [{"label": "cat", "score": 0.91, "box": [1.0, 2.0, 3.0, 4.0]}] * 2
    terminal.write([{"input": "b.jpg", "row": 1, "objects": objects}])
    lines = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    text = "cat 0.9100 [1.0, 2.0, 3.0, 4.0]"
    assert lines == [["input", "row", "objects"], ["a.jpg", "0", "none"], ["b.jpg", "1", f"{text}, {text}"]]


@pytest.mark.parametrize("task", [hftl.ObjectDetection, hftl.SemanticSegmentation])
def test_build_model_rejects_channels_last_backbone(task, image_run):
    from hftl.models.build import build_model
    from hftl.models.task_model import HeadSpec

    run = image_run()
    run = replace(run, model=hftl.ModelConfig(name="mambaout_femto", pretrained=False, image_size=64))
    with pytest.raises(hftl.HftlError, match="channels-last"):
        build_model(run, HeadSpec(task.model_class, 2, ("a", "b"), None))


def random_scenes(count, classes, rng):
    """Returns size, labels and detections of images with random boxes (some crowds), true and false positives."""
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
        true_classes = rng.integers(0, classes, len(true))
        predicted = np.concatenate([true_classes, rng.integers(0, classes, len(boxes) - len(true))])
        label = {
            "true_boxes": torch.tensor(true, dtype=torch.float32),
            "true_classes": torch.tensor(true_classes),
            "crowd": torch.tensor(rng.random(len(true)) < 0.2),
        }
        detections = (torch.tensor(boxes[order]), torch.tensor(predicted[order]), torch.tensor(scores[order]))
        scenes.append((size, label, detections))
    return scenes


def random_boxes(rng, count, size):
    low = rng.uniform(0, 0.7, (count, 2))
    return np.concatenate([low, low + rng.uniform(0.05, 0.3, (count, 2))], 1) * np.tile(size[::-1], 2)


def pycocotools_scores(scenes, names):
    """Returns COCO metrics computed with other ids, other order and `loadRes`."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    content = {"categories": [{"id": 10 + i, "name": name} for i, name in enumerate(names)], "annotations": []}
    content["images"] = [{"id": 100 + row} for row in range(len(scenes))]
    results = []
    for row, (_, label, (boxes, classes, scores)) in enumerate(scenes):
        corners = box_convert(label["true_boxes"].double(), "xyxy", "xywh").tolist()
        for box, category, crowd in zip(corners, label["true_classes"].tolist(), label["crowd"].tolist(), strict=True):
            content["annotations"].append(
                {"id": len(content["annotations"]) + 1, "image_id": 100 + row, "category_id": 10 + category,
                 "bbox": box, "area": box[2] * box[3], "iscrowd": int(crowd)}
            )  # fmt: skip
        corners = box_convert(boxes.double(), "xyxy", "xywh").tolist()
        for box, category, score in zip(corners, classes.tolist(), scores.tolist(), strict=True):
            results.append({"image_id": 100 + row, "category_id": 10 + category, "bbox": box, "score": score})
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        truth.dataset = content
        truth.createIndex()
        evaluation = COCOeval(truth, truth.loadRes(results), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    stats = evaluation.stats
    scores = {"ap": stats[0], "ap50": stats[1], "ap75": stats[2], "ar100": stats[8]}
    precision = evaluation.eval["precision"][:, :, :, 0, 2]
    for number, name in enumerate(names):
        of_class = precision[:, :, number]
        if (of_class > -1).any():
            scores[f"ap/{name}"] = of_class[of_class > -1].mean()
    return scores


def update(metric, scenes, rows):
    """Adds images in batches of different sizes."""
    while rows:
        batch, rows = rows[: 1 + len(rows) % 4], rows[1 + len(rows) % 4 :]
        metric.detect = lambda outputs, sizes, batch=batch: [scenes[row][2] for row in batch]
        labels = [scenes[row][1] for row in batch]
        metric.update({}, {"index": torch.tensor(batch), "labels": labels, "size": torch.zeros(len(batch), 2)})


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_detection_metrics_match_pycocotools(seed):
    rng = np.random.default_rng(seed)
    names = ["cat", "dog", "cow", "never"]
    scenes = random_scenes(30, 3, rng)
    expected = pycocotools_scores(scenes, names)
    assert expected["ap"] > 0.05 and "ap/never" not in expected

    single = DetectionMetrics(names, None)
    update(single, scenes, list(range(30)))
    assert single.compute() == pytest.approx(expected, abs=1e-6)

    order = rng.permutation(30).tolist()
    metrics = [DetectionMetrics(names, None) for _ in range(3)]
    for metric, rows in zip(metrics, (order[:5], order[5:22], order[22:]), strict=True):
        update(metric, scenes, rows)
    received = [pickle.loads(pickle.dumps(metric)) for metric in metrics]  # as sent by other processes
    for metric in received[1:]:
        received[0].merge(metric)
    assert received[0].compute() == single.compute()


def test_detection_metrics_without_boxes_return_nan():
    """Without true boxes metrics are NaN, without detections 0."""
    no_detections = (torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64), torch.zeros(0))
    no_boxes = {
        "true_boxes": torch.zeros(0, 4),
        "true_classes": torch.zeros(0, dtype=torch.int64),
        "crowd": torch.zeros(0),
    }
    empty = DetectionMetrics(["a"], None)
    update(empty, [(None, no_boxes, no_detections)] * 2, [0, 1])
    assert np.isnan(empty.compute()["ap"]) and "ap/a" not in empty.compute()
    one_box = {
        "true_boxes": torch.tensor([[1.0, 1, 5, 5]]),
        "true_classes": torch.tensor([0]),
        "crowd": torch.tensor([False]),
    }
    missed = DetectionMetrics(["a"], None)
    update(missed, [(None, one_box, no_detections)] * 2, [0, 1])
    assert missed.compute() == {"ap": 0, "ap50": 0, "ap75": 0, "ar100": 0, "ap/a": 0}


@pytest.mark.parametrize("width", [3, 4])
def test_detections_match_transformers_processors(width):
    from types import SimpleNamespace

    from transformers import RTDetrImageProcessor, YolosImageProcessor

    torch.manual_seed(0)
    outputs = {"logits": torch.randn(2, 9, width) * 3, "pred_boxes": torch.rand(2, 9, 4) * 0.3 + 0.35}
    sizes = torch.tensor([[100, 200], [50, 60]])
    processor = (RTDetrImageProcessor if width == 3 else YolosImageProcessor)()
    results = processor.post_process_object_detection(SimpleNamespace(**outputs), threshold=0.0, target_sizes=sizes)
    detections = DetectionTarget("objects", ["a", "b", "c"]).detections(outputs, sizes)
    for (boxes, classes, scores), expected in zip(detections, results, strict=True):
        order = expected["scores"].sort(descending=True, stable=True).indices
        torch.testing.assert_close(scores, expected["scores"][order])
        assert classes.tolist() == expected["labels"][order].tolist()
        torch.testing.assert_close(boxes, expected["boxes"][order], atol=1e-3, rtol=1e-4)


def test_check_task_accepts_object_detection(detection_run):
    run, splits, task = hftl.setup_run(detection_run(), hftl.ObjectDetection)
    assert task.head.labels == ("blue", "red") and task.head.num_outputs == 2
    check_task(task, splits, run, rows=6)


def make_detector(kind, folder):
    """Saves a transformers detector with random weights and three other classes, and returns its folder."""
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
def test_build_model_replaces_class_layers_of_detectors(kind, head, detection_run, tmp_path):
    from transformers import AutoModelForObjectDetection

    name = make_detector(kind, tmp_path / "detector")
    run, splits, task = hftl.setup_run(detection_run(name=name), hftl.ObjectDetection)
    model = hftl.build_model(run, task.head)
    assert set(model.head_modules) == head and model.original_labels() == ["blue", "red"]
    before = AutoModelForObjectDetection.from_pretrained(name).state_dict()
    backbone = {key: value for key, value in model.net.state_dict().items() if not model.in_head(key)}
    assert backbone and all(torch.equal(value, before[key]) for key, value in backbone.items())
    if kind == "yolos":  # unlike RT-DETR it has a "no object" class and no auxiliary layers
        check_task(task, splits, run, rows=3)


STANDALONE = """
import json, sys, torch, transformers, pyarrow.parquet as pq
from PIL import Image
folder, files = json.loads(sys.argv[1])
rows = [row["objects"] for row in pq.read_table(folder + "/predictions.parquet").to_pylist() if row["split"] == "test"]
model = transformers.AutoModelForObjectDetection.from_pretrained(folder + "/model").eval()
assert model.config.id2label == {0: "blue", 1: "red"}, model.config.id2label
pipe = transformers.pipeline("object-detection", folder + "/model")
for file, objects in zip(files, rows, strict=True):
    detections = sorted(pipe(file, threshold=0.0), key=lambda detection: -detection["score"])
    assert [detection["label"] for detection in detections] == [expected["label"] for expected in objects]
    for detection, expected in zip(detections, objects):
        assert abs(detection["score"] - expected["score"]) < 1e-3, (detection, expected)
        for value, edge, limit in zip(detection["box"].values(), expected["box"], (64, 48, 64, 48)):
            assert abs(min(max(value, 0), limit) - edge) <= 1.01, (detection, expected)
print("equal", sum(map(len, rows)))
"""


def test_saved_detector_without_hftl_predicts_equal_boxes(detection_run, tmp_path, monkeypatch, run_without_hftl):
    from hftl.cli.main import main

    # scores are low after a short run
    monkeypatch.setattr("hftl.tasks.targets.detection.target.SCORE_FLOOR", 0.0)
    run = detection_run("lora", num_epochs=1)
    metrics = run_undrawn("object_detection", run)
    assert write_report(tmp_path / "run").is_file()
    assert {"test/ap", "test/ap50", "test/ap75", "test/ar100", "test/loss", "validation/ap/red"} <= set(metrics)
    verified = json.loads((tmp_path / "run/report.json").read_text())["verified"]
    assert set(verified) == {"model/transformers", "adapter/peft"}
    files = [str(tmp_path / f"data/images/test/test{number}.png") for number in range(3)]
    assert "equal 30" in run_without_hftl(STANDALONE, json.dumps([run.output_dir, files]))

    predictor = hftl.load(run.output_dir)
    rows = predictor.predict(files)
    assert [len(row["objects"]) for row in rows] == [10, 10, 10]
    assert set(rows[0]["objects"][0]) == {"label", "score", "box"}
    output = tmp_path / "predictions.jsonl"
    main(["predict", run.output_dir, str(tmp_path / "data/images/test"), "--output", str(output)])
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    assert [line["objects"] for line in lines] == [row["objects"] for row in rows]


def test_setup_rejects_models_without_detector(detection_run, tiny_timm, tiny_bert):
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
    model = replace(run.model, name=tiny_timm["test_resnet"], detector=hftl.DetectorConfig(num_queries=100))
    with pytest.raises(hftl.HftlError, match="100 exceeds the 20 feature positions of an image of 64 x 64"):
        hftl.build_model(replace(run, model=model), task.head)
    with pytest.raises(hftl.HftlError, match=r"\[48, 64\] is not a multiple of 32.*Set \[64, 64\]"):
        hftl.build_model(replace(run, model=replace(model, image_size=[48, 64])), task.head)


def test_evaluate_matches_detection_run_on_two_processes(detection_run, forks, tmp_path):
    from hftl.inference.batch_inference import evaluate_saved

    run = detection_run()
    options = flags(run.data.source, run.model.name, run.output_dir, model__image_size=64, train__num_epochs=1)
    options += [f"--model.detector.{name}" for name in ("d_model=32", "num_queries=10")]
    options += ["--train.batch_size_per_device=2", "--train.lr=1e-3", "--train.head_lr=1e-3"]
    launch(2, [("recipe", {"recipe": "object_detection", "flags": options}, tmp_path)], forks=forks, logs=tmp_path)
    metrics = json.loads((tmp_path / "run/metrics.json").read_text())
    evaluated = evaluate_saved(run.output_dir, batch_size=2)
    assert evaluated and evaluated == pytest.approx({name: metrics[name] for name in evaluated}, rel=1e-6, abs=1e-6)
