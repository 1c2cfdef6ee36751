r"""Fine-tune any timm backbone under a UPerNet decoder: a class for each pixel of an image.

    accelerate launch --config_file accelerate_config.yaml recipes/semantic_segmentation.py \
        --config recipes/configs/camvid_mobilenetv3.yaml --data.source path/to/camvid

Data: folders of images and of masks side by side, or a table with both columns; 255 and classes named void do not
count.

Measured (tf_mobilenetv3_small_100, 144 x 192 pixels, full, seeds 0 / 1 / 2, one CPU core, 5 minutes each, 2026-11-21;
RESULTS.md has commands): camvid_small mean IoU 0.420 / 0.409 / 0.415 on test; a linear decoder on the frozen
backbone 0.372 / 0.374 / 0.373, the majority class of each place 0.170.
"""

import hftl

DEFAULTS = hftl.RunConfig()


def main(run: hftl.RunConfig) -> dict[str, float]:
    """Trains, measures and saves; returns the metrics of validation and test."""
    run, splits, task = hftl.setup_run(run, hftl.SemanticSegmentation)
    accelerator = hftl.create_accelerator(run)
    model = hftl.build_model(run, task.head)
    report = hftl.adapt(model, run.adapt)
    history = hftl.fit(accelerator, model, task, splits, run)
    metrics = hftl.evaluate(accelerator, model, task, splits, run, hftl.get_run_folder(run) / "predictions.parquet")
    hftl.save_run(accelerator, model, task, splits, run, hftl.RunResult(report, history, metrics))
    return metrics


if __name__ == "__main__":
    hftl.run_recipe(main, DEFAULTS, __doc__)
