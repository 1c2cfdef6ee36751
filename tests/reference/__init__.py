"""Reference runs: two trees, or a tree and a committed file, are compared run by run.

    python -m tests.reference --against COMMIT     compares the working tree with a commit, exactly
    python -m tests.reference --write              writes expected.json from the working tree

`cells.py` holds small runs of every task on CPU, `broken_inputs.py` inputs that setup rejects. Runs of two trees must
agree in every loss, metric, final weight, prediction and file name; rejections in the settings that they name.

After a rename, cells use the new names and `renames.tsv` has a line `old<TAB>new` per name: a setting
(`train.log_every`), a setting with a value (`model.pooling=stock`), a key of history.jsonl or metrics.json, a column of
predictions.parquet, a tensor of a saved model, or a file of a run folder. Each tree gets the names that it knows, and
results are compared in the new names.

`recorded.json` holds longer runs of commit 274eaa5 (`record.py`), which no test repeats.
"""
