r"""Fine-tune a timm model and a BERT-family checkpoint together on images with texts, numbers and categories.

    accelerate launch --config_file accelerate_config.yaml recipes/image_text_classification.py \
        --data.source path/to/table.csv --model.name mobilenetv2_100 --model.text_name bert-base-uncased

Columns: images, texts, numbers, categories and a label; any of the inputs may be missing (`--model.modality_dropout`).
`--adapt.image` and `--adapt.text` adapt each encoder in a way of its own.
"""

import hftl

DEFAULTS = hftl.RunConfig()


def main(run: hftl.RunConfig) -> dict[str, float]:
    """Trains, measures and saves; returns the metrics of validation and test."""
    run, splits, task = hftl.prepare(run, hftl.ImageTextClassification)
    accelerator = hftl.start(run)
    model = hftl.build_model(run, task.head)
    report = hftl.adapt(model, run.adapt)
    history = hftl.fit(accelerator, model, task, splits, run)
    metrics = hftl.evaluate(accelerator, model, task, splits, run, hftl.run_folder(run) / "predictions.parquet")
    hftl.publish(accelerator, model, task, splits, run, hftl.Outcome(report, history, metrics))
    return metrics


if __name__ == "__main__":
    hftl.run_recipe(main, DEFAULTS, __doc__)
