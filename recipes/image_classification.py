r"""Fine-tune any timm model on images: one class each, any number of labels, or numbers.

    accelerate launch --config_file accelerate_config.yaml recipes/image_classification.py \
        --data.source path/to/images --model.name resnet50.a1_in1k --adapt.method lora

Lists of labels (or `--data.label_separator`, or 0/1 columns in `--data.label_columns`) are any number of labels
an image; numbers with fractions, or other `--data.label_columns`, a regression. The choice is said, and
`--data.problem_type` decides it.

Measured (seeds 0 / 1 / 2, 2 CPU cores, 2026-11-21; RESULTS.md has commands and caveats), on test:
hymenoptera, ImageNet weights mobilenetv2_100, accuracy: frozen 0.974 / 0.947 / 0.974, lora 0.921 / 0.921 / 0.921,
full 0.934 / 0.934 / 0.921, scratch 0.382 / 0.539 / 0.539. Several labels (2 x 2 CIFAR-10 pictures, frozen
tf_mobilenetv3_small_100): mAP 0.647 / 0.647 / 0.649. Two numbers (3 x 3 digits: how many, their sum; embedded:letters,
full): mean R2 0.718 / 0.719 / 0.719.
"""

import hftl

DEFAULTS = hftl.RunConfig()


def main(run: hftl.RunConfig) -> dict[str, float]:
    """Trains, measures and saves; returns the metrics of validation and test."""
    run, splits, task = hftl.setup_run(run, hftl.ImageClassification)
    accelerator = hftl.create_accelerator(run)
    model = hftl.build_model(run, task.head)
    report = hftl.adapt(model, run.adapt)
    history = hftl.fit(accelerator, model, task, splits, run)
    metrics = hftl.evaluate(accelerator, model, task, splits, run, hftl.get_run_folder(run) / "predictions.parquet")
    hftl.save_run(accelerator, model, task, splits, run, hftl.RunResult(report, history, metrics))
    return metrics


if __name__ == "__main__":
    hftl.run_recipe(main, DEFAULTS, __doc__)
