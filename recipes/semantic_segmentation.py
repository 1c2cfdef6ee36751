r"""Fine-tune any timm backbone with a UPerNet decoder for semantic segmentation.

    accelerate launch --config_file accelerate_config.yaml recipes/semantic_segmentation.py \
        --config recipes/configs/camvid_mobilenetv3.yaml --data.source path/to/camvid

Data: parallel folders of images and masks, or a table with both columns. Pixels of value 255 and of classes named void
are ignored.

Results on test (tf_mobilenetv3_small_100, 144 x 192 pixels, full, seeds 0 / 1 / 2, one CPU core, 5 minutes each,
2026-11-21; commands in RESULTS.md): camvid_small mean IoU 0.420 / 0.409 / 0.415. Baselines: linear decoder on the
frozen backbone 0.372 / 0.374 / 0.373, majority class per pixel position 0.170.
"""

import hftl

DEFAULTS = hftl.RunConfig()


def main(run: hftl.RunConfig) -> dict[str, float]:
    """Trains, evaluates and saves; returns validation and test metrics."""
    run, splits, task = hftl.setup_run(run, hftl.SemanticSegmentation)
    accelerator = hftl.create_accelerator(run)
    model = hftl.build_model(run, task.head)
    counts = hftl.adapt(model, run.adapt)
    history = hftl.fit(accelerator, model, task, splits, run)
    metrics = hftl.evaluate(accelerator, model, task, splits, run, hftl.get_run_folder(run) / "predictions.parquet")
    hftl.save_run(accelerator, model, task, splits, run, hftl.RunResult(counts, history, metrics))
    return metrics


if __name__ == "__main__":
    hftl.run_recipe(main, DEFAULTS, __doc__)
