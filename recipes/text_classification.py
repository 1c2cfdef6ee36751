r"""Fine-tune any BERT-family checkpoint on texts or pairs of texts: one class for each row.

    accelerate launch --config_file accelerate_config.yaml recipes/text_classification.py \
        --data.source path/to/table.csv --model.name bert-base-uncased --adapt.method lora

Measured (MiniLM-L6, seeds 0 / 1 / 2, 2 CPU cores, 2026-11-21; RESULTS.md has commands), test accuracy: trec6 frozen
0.898 / 0.900 / 0.900, lora 0.970 / 0.962 / 0.970, full 0.972 / 0.962 / 0.968; banking77 full 0.926 / 0.929 / 0.930.
"""

import hftl

DEFAULTS = hftl.RunConfig()


def main(run: hftl.RunConfig) -> dict[str, float]:
    """Trains, measures and saves; returns the metrics of validation and test."""
    run, splits, task = hftl.prepare(run, hftl.TextClassification)
    accelerator = hftl.start(run)
    model = hftl.build_model(run, task.head)
    report = hftl.adapt(model, run.adapt)
    history = hftl.fit(accelerator, model, task, splits, run)
    metrics = hftl.evaluate(accelerator, model, task, splits, run, hftl.run_folder(run) / "predictions.parquet")
    hftl.publish(accelerator, model, task, splits, run, hftl.Outcome(report, history, metrics))
    return metrics


if __name__ == "__main__":
    hftl.run_recipe(main, DEFAULTS, __doc__)
