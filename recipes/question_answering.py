r"""Fine-tune any BERT-family checkpoint to find answers to questions in a context (SQuAD's layout).

    accelerate launch --config_file accelerate_config.yaml recipes/question_answering.py \
        --data.source path/to/folder --model.name bert-base-uncased --adapt.method lora

Columns: question, context and answers (text, answer_start); a row without an answer has empty lists. Contexts of any
length are read in windows.

Measured (MiniLM-L6, full, seeds 0 / 1 / 2, 2 CPU cores, 2026-11-21; RESULTS.md has commands): xquad_en, 854 training
questions, F1 0.491 / 0.368 / 0.443, exact match 0.366 / 0.251 / 0.309 on test; the first sentence as
the answer: F1 0.069, exact match 0.
"""

import hftl

DEFAULTS = hftl.RunConfig()


def main(run: hftl.RunConfig) -> dict[str, float]:
    """Trains, measures and saves; returns the metrics of validation and test."""
    run, splits, task = hftl.setup_run(run, hftl.QuestionAnswering)
    accelerator = hftl.create_accelerator(run)
    model = hftl.build_model(run, task.head)
    report = hftl.adapt(model, run.adapt)
    history = hftl.fit(accelerator, model, task, splits, run)
    metrics = hftl.evaluate(accelerator, model, task, splits, run, hftl.get_run_folder(run) / "predictions.parquet")
    hftl.save_run(accelerator, model, task, splits, run, hftl.RunResult(report, history, metrics))
    return metrics


if __name__ == "__main__":
    hftl.run_recipe(main, DEFAULTS, __doc__)
