r"""Fine-tune any BERT-family model on texts or text pairs: single-label or multi-label classification, or regression.

    accelerate launch --config_file accelerate_config.yaml recipes/text_classification.py \
        --data.source path/to/table.csv --model.name bert-base-uncased --adapt.method lora

Lists of labels, `--data.label_separator` and 0/1 columns in `--data.label_columns` select multi-label classification;
numbers with fractions and other `--data.label_columns` select regression. The detected problem type is logged;
`--data.problem_type` sets it.

Results on test (MiniLM-L6, seeds 0 / 1 / 2, 2 CPU cores, 2026-11-21; commands in RESULTS.md): accuracy on trec6,
frozen 0.898 / 0.900 / 0.900, lora 0.970 / 0.962 / 0.970, full 0.972 / 0.962 / 0.968; banking77 full
0.926 / 0.929 / 0.930. Pairs, full: mrpc accuracy 0.799 / 0.786 / 0.777, MCC 0.532 / 0.504 / 0.491; sts (regression)
Pearson 0.885 / 0.887 / 0.888 (cosine similarity of the same checkpoint without fine-tuning: 0.875). Multi-label (two
questions per text), full: mAP 0.967 / 0.976 / 0.974.
"""

import hftl

DEFAULTS = hftl.RunConfig()


def main(run: hftl.RunConfig) -> dict[str, float]:
    """Trains, evaluates and saves; returns validation and test metrics."""
    run, splits, task = hftl.setup_run(run, hftl.TextClassification)
    accelerator = hftl.create_accelerator(run)
    model = hftl.build_model(run, task.head)
    counts = hftl.adapt(model, run.adapt)
    history = hftl.fit(accelerator, model, task, splits, run)
    metrics = hftl.evaluate(accelerator, model, task, splits, run, hftl.get_run_folder(run) / "predictions.parquet")
    hftl.save_run(accelerator, model, task, splits, run, hftl.RunResult(counts, history, metrics))
    return metrics


if __name__ == "__main__":
    hftl.run_recipe(main, DEFAULTS, __doc__)
