r"""Fine-tune any timm model on images: single-label or multi-label classification, or regression.

    accelerate launch --config_file accelerate_config.yaml recipes/image_classification.py \
        --data.source path/to/images --model.name resnet50.a1_in1k --adapt.method lora

Lists of labels, `--data.label_separator` and 0/1 columns in `--data.label_columns` select multi-label classification;
numbers with fractions and other `--data.label_columns` select regression. The detected problem type is logged;
`--data.problem_type` sets it.

Results on test (seeds 0 / 1 / 2, 2 CPU cores, 2026-11-21; commands and caveats in RESULTS.md):
hymenoptera, mobilenetv2_100 with ImageNet weights, accuracy: frozen 0.974 / 0.947 / 0.974, lora 0.921 / 0.921 / 0.921,
full 0.934 / 0.934 / 0.921, scratch 0.382 / 0.539 / 0.539. Multi-label (2 x 2 tiles of CIFAR-10 images, frozen
tf_mobilenetv3_small_100): mAP 0.647 / 0.647 / 0.649. Regression of two numbers (3 x 3 tiles of digits: their count and
sum; embedded:letters, full): mean R2 0.718 / 0.719 / 0.719.
"""

import hftl

DEFAULTS = hftl.RunConfig()


def main(run: hftl.RunConfig) -> dict[str, float]:
    """Trains, evaluates and saves; returns validation and test metrics."""
    run, splits, task = hftl.setup_run(run, hftl.ImageClassification)
    accelerator = hftl.create_accelerator(run)
    model = hftl.build_model(run, task.head)
    counts = hftl.adapt(model, run.adapt)
    history = hftl.fit(accelerator, model, task, splits, run)
    metrics = hftl.evaluate(accelerator, model, task, splits, run, hftl.get_run_folder(run) / "predictions.parquet")
    hftl.save_run(accelerator, model, task, splits, run, hftl.RunResult(counts, history, metrics))
    return metrics


if __name__ == "__main__":
    hftl.run_recipe(main, DEFAULTS, __doc__)
