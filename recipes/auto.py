r"""Fine-tune on any labelled folder or table: the task is found from its columns and labels, and said.

    accelerate launch --config_file accelerate_config.yaml recipes/auto.py \
        --data.source path/to/folder_or_table --model.name resnet50.a1_in1k

`--task NAME` says it instead. The recipes named after tasks do the same for one task each, and carry measured figures.
"""

import hftl

DEFAULTS = hftl.RunConfig()


def main(run: hftl.RunConfig) -> dict[str, float]:
    """Trains, measures and saves; returns the metrics of validation and test."""
    run, splits, task = hftl.setup_run(run)
    accelerator = hftl.create_accelerator(run)
    model = hftl.build_model(run, task.head)
    report = hftl.adapt(model, run.adapt)
    history = hftl.fit(accelerator, model, task, splits, run)
    metrics = hftl.evaluate(accelerator, model, task, splits, run, hftl.get_run_folder(run) / "predictions.parquet")
    hftl.save_run(accelerator, model, task, splits, run, hftl.RunResult(report, history, metrics))
    return metrics


if __name__ == "__main__":
    hftl.run_recipe(main, DEFAULTS, __doc__)
