r"""Find and name objects in images: RT-DETR over any timm backbone, or any detector that transformers has.

    accelerate launch --config_file accelerate_config.yaml recipes/object_detection.py \
        --config recipes/configs/bccd_mobilenetv2.yaml --data.source path/to/images_with_coco_or_voc_files

Data: COCO or VOC files beside images, or a column `objects`. Metrics need `pip install "hftl[detection]"`.

Measured (mobilenetv2_100, 256 x 320 pixels, full, seeds 0 / 1 / 2, one CPU core, 25 minutes each, 2026-11-21;
RESULTS.md has commands): bccd, 205 training images, AP50 0.804 / 0.747 / 0.727, AP 0.530 / 0.504 / 0.478 on test.
"""

import hftl

DEFAULTS = hftl.RunConfig()


def main(run: hftl.RunConfig) -> dict[str, float]:
    """Trains, measures and saves; returns the metrics of validation and test."""
    run, splits, task = hftl.setup_run(run, hftl.ObjectDetection)
    accelerator = hftl.create_accelerator(run)
    model = hftl.build_model(run, task.head)
    report = hftl.adapt(model, run.adapt)
    history = hftl.fit(accelerator, model, task, splits, run)
    metrics = hftl.evaluate(accelerator, model, task, splits, run, hftl.get_run_folder(run) / "predictions.parquet")
    hftl.save_run(accelerator, model, task, splits, run, hftl.RunResult(report, history, metrics))
    return metrics


if __name__ == "__main__":
    hftl.run_recipe(main, DEFAULTS, __doc__)
