r"""Fine-tune any BERT-family model for token classification: named entities, parts of speech, chunks.

    accelerate launch --config_file accelerate_config.yaml recipes/token_classification.py \
        --data.source path/to/folder --model.name bert-base-cased --adapt.method lora

Columns: lists of words and of their tags (BIO, IOBES or one class per word). Long texts are divided into overlapping
windows.

Results (MiniLM-L6, full, seeds 0 / 1 / 2, 2 CPU cores, 2026-11-21; commands in RESULTS.md): wnut17 entity F1
0.542 / 0.541 / 0.537 on validation, 0.402 / 0.387 / 0.397 on test (its test split has other sources by design).
"""

import hftl

DEFAULTS = hftl.RunConfig()


def main(run: hftl.RunConfig) -> dict[str, float]:
    """Trains, evaluates and saves; returns validation and test metrics."""
    run, splits, task = hftl.setup_run(run, hftl.TokenClassification)
    accelerator = hftl.create_accelerator(run)
    model = hftl.build_model(run, task.head)
    counts = hftl.adapt(model, run.adapt)
    history = hftl.fit(accelerator, model, task, splits, run)
    metrics = hftl.evaluate(accelerator, model, task, splits, run, hftl.get_run_folder(run) / "predictions.parquet")
    hftl.save_run(accelerator, model, task, splits, run, hftl.RunResult(counts, history, metrics))
    return metrics


if __name__ == "__main__":
    hftl.run_recipe(main, DEFAULTS, __doc__)
