r"""Fine-tune any BERT-family model for extractive question answering (data in SQuAD format).

    accelerate launch --config_file accelerate_config.yaml recipes/question_answering.py \
        --data.source path/to/folder --model.name bert-base-uncased --adapt.method lora

Columns: question, context and answers (text, answer_start); answers of unanswerable questions are empty lists. Long
contexts are divided into overlapping windows.

Results on test (MiniLM-L6, full, seeds 0 / 1 / 2, 2 CPU cores, 2026-11-21; commands in RESULTS.md): xquad_en, 854
training questions, F1 0.491 / 0.368 / 0.443, exact match 0.366 / 0.251 / 0.309; baseline, the first sentence of the
context: F1 0.069, exact match 0.
"""

import hftl

DEFAULTS = hftl.RunConfig()


def main(run: hftl.RunConfig) -> dict[str, float]:
    """Trains, evaluates and saves; returns validation and test metrics."""
    run, splits, task = hftl.setup_run(run, hftl.QuestionAnswering)
    accelerator = hftl.create_accelerator(run)
    model = hftl.build_model(run, task.head)
    counts = hftl.adapt(model, run.adapt)
    history = hftl.fit(accelerator, model, task, splits, run)
    metrics = hftl.evaluate(accelerator, model, task, splits, run, hftl.get_run_folder(run) / "predictions.parquet")
    hftl.save_run(accelerator, model, task, splits, run, hftl.RunResult(counts, history, metrics))
    return metrics


if __name__ == "__main__":
    hftl.run_recipe(main, DEFAULTS, __doc__)
