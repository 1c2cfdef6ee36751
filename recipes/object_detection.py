r"""Fine-tune an object detector: RT-DETR on any timm backbone, or any detection model of transformers.

    accelerate launch --config_file accelerate_config.yaml recipes/object_detection.py \
        --config recipes/configs/bccd_mobilenetv2.yaml --data.source path/to/images_with_coco_or_voc_files

Data: images with COCO or VOC annotation files, or a column `objects`. Metrics need `pip install "hftl[detection]"`.

Results on test (mobilenetv2_100, 256 x 320 pixels, full, seeds 0 / 1 / 2, one CPU core, 25 minutes each, 2026-11-21;
commands in RESULTS.md): bccd, 205 training images, AP50 0.804 / 0.747 / 0.727, AP 0.530 / 0.504 / 0.478.
"""

import hftl

DEFAULTS = hftl.RunConfig()


def main(run: hftl.RunConfig) -> dict[str, float]:
    """Trains, evaluates and saves; returns validation and test metrics."""
    run, splits, task = hftl.setup_run(run, hftl.ObjectDetection)
    accelerator = hftl.create_accelerator(run)
    model = hftl.build_model(run, task.head)
    counts = hftl.adapt(model, run.adapt)
    history = hftl.fit(accelerator, model, task, splits, run)
    metrics = hftl.evaluate(accelerator, model, task, splits, run, hftl.get_run_folder(run) / "predictions.parquet")
    hftl.save_run(accelerator, model, task, splits, run, hftl.RunResult(counts, history, metrics))
    return metrics


if __name__ == "__main__":
    hftl.run_recipe(main, DEFAULTS, __doc__)
