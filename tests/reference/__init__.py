"""Reference runs: two trees, or one tree and a committed file, are compared run by run.

    python -m tests.reference --against COMMIT     compares the working tree with a commit, exactly
    python -m tests.reference --write              writes expected.json from the working tree

Each cell is a small run on CPU or a broken input. `renames.tsv` holds one `old<TAB>new` line per renamed setting, setting
value (`model.pooling=stock`), metric key, record key or file name. Cells use the new names.
"""
