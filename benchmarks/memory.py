"""Peak memory of training, evaluation and prediction with N and 10 N rows, each in a separate process.

`python -m benchmarks memory [--rows 3000] [--modality text|image]` prints peak resident memory and the ratios.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

_JOB_CODE = """
import json, resource, sys
job, source, run, modality, model_name = sys.argv[1:]
import hftl
from hftl.logging import suppress_logs
task_class = hftl.TextClassification if modality == "text" else hftl.ImageClassification
from hftl.inference.batch_inference import evaluate_saved, predict_to_file
with suppress_logs():
    if job == "train":
        config = hftl.RunConfig(
            hftl.DataConfig(source=source), hftl.ModelConfig(name=model_name),
            train=hftl.TrainConfig(num_epochs=1, trackers=[], logging_steps=1000), output_dir=run, overwrite=True,
        )
        config, splits, task = hftl.setup_run(config, task_class)
        accelerator = hftl.create_accelerator(config)
        model = hftl.build_model(config, task.head)
        counts = hftl.adapt(model, config.adapt)
        history = hftl.fit(accelerator, model, task, splits, config)
        hftl.save_run(accelerator, model, task, splits, config, hftl.RunResult(counts, history, {}))
    elif job == "evaluate":
        evaluate_saved(run, source, "train", output=run + "/evaluated.parquet")
    else:
        inputs = source if modality == "image" else source + "/train.csv"
        predict_to_file(run, inputs, output=run + "/predicted.parquet")
print(json.dumps(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024))
"""


def main(argv: list[str]) -> None:
    """Prints peak memory in MiB with N and 10 N rows, and their ratio, for each job."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=3000)
    parser.add_argument("--modality", choices=("text", "image"), default="text")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write = _texts if args.modality == "text" else _images
        sources = {rows: write(folder / str(rows), rows) for rows in (args.rows, 10 * args.rows)}
        model = _tiny_bert(folder / "bert") if args.modality == "text" else "embedded:letters"
        peaks = {
            job: [
                _peak(folder, job, source, folder / f"run-{rows}", args.modality, model)
                for rows, source in sources.items()
            ]
            for job in ("train", "evaluate", "predict")
        }
    print(f"\n{'job':<10} {args.rows:>8} rows {10 * args.rows:>8} rows   ratio   (peak resident MiB, {args.modality})")
    for job, (small, large) in peaks.items():
        print(f"{job:<10} {small:>13.0f} {large:>13.0f}   {large / small:.3f}")
    print(
        json.dumps(
            {
                "benchmark": "memory",
                "modality": args.modality,
                "rows": args.rows,
                "ratios": {job: round(large / small, 4) for job, (small, large) in peaks.items()},
            }
        )
    )


def _peak(folder: Path, job: str, source: Path, run: Path, modality: str, model: str) -> float:
    """Returns the peak resident memory of a job in MiB, with an empty cache of datasets."""
    environment = {**os.environ, "HF_DATASETS_CACHE": str(folder / "cache"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", _JOB_CODE, job, str(source), str(run), modality, model]
    process = subprocess.run(command, capture_output=True, text=True, env=environment)
    if process.returncode:
        raise SystemExit(process.stderr)
    return float(process.stdout.splitlines()[-1])


def _texts(folder: Path, rows: int) -> Path:
    folder.mkdir(parents=True)
    with (folder / "train.csv").open("w") as file:
        file.write("text,label\n")
        for row in range(rows):
            file.write(
                f"row {row} says {'left right up down'.split()[row % 4]} {'again and ' * (row % 15)}again,{row % 4}\n"
            )
    return folder


def _images(folder: Path, rows: int) -> Path:
    import numpy as np
    from PIL import Image

    rng = np.random.default_rng(0)
    for row in range(rows):
        class_folder = folder / "train" / f"class_{row % 4}"
        class_folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(class_folder / f"{row}.png")
    return folder


def _tiny_bert(folder: Path) -> str:
    from transformers import BertConfig, BertModel, BertTokenizerFast

    folder.mkdir()
    letters = [*"abcdefghijklmnopqrstuvwxyz0123456789"]
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{letter}" for letter in letters)]
    (folder / "vocab.txt").write_text("\n".join(words))
    BertTokenizerFast(str(folder / "vocab.txt"), model_max_length=128).save_pretrained(folder)
    BertModel(
        BertConfig(
            vocab_size=len(words), hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64
        )
    ).save_pretrained(folder)
    return str(folder)
