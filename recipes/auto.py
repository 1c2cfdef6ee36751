r"""Fine-tune on any labeled folder or table, with the task detected from column names, column types and labels.

    accelerate launch --config_file accelerate_config.yaml recipes/auto.py \
        --data.source path/to/folder_or_table --model.name resnet50.a1_in1k

The detected task is logged with the reason; `--task NAME` sets it. The recipes named after tasks run the same code for
one task each and list results in their headers.
"""

import hftl

DEFAULTS = hftl.RunConfig()


def main(run: hftl.RunConfig) -> dict[str, float]:
    """Trains, evaluates and saves; returns validation and test metrics."""
    run, splits, task = hftl.setup_run(run)
    accelerator = hftl.create_accelerator(run)
    model = hftl.build_model(run, task.head)
    counts = hftl.adapt(model, run.adapt)
    history = hftl.fit(accelerator, model, task, splits, run)
    metrics = hftl.evaluate(accelerator, model, task, splits, run, hftl.get_run_folder(run) / "predictions.parquet")
    hftl.save_run(accelerator, model, task, splits, run, hftl.RunResult(counts, history, metrics))
    return metrics


if __name__ == "__main__":
    hftl.run_recipe(main, DEFAULTS, __doc__)
