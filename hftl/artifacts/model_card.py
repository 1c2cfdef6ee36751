"""Model card in the layout of the Hub template, generated from the run record alone."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from hftl.artifacts.card_code import has_sklearn_head, pipeline_task, saved_library, usage_code
from hftl.errors import shorten
from hftl.redaction import sanitize
from hftl.reporting.run_record import RunRecord
from hftl.statistics.confidence_intervals import wilson
from hftl.tasks.predictions import MultiLabelPredictions
from hftl.tasks.targets.multi_label.metrics import label_scores

WEAK_F1, FEW_ROWS = 0.5, 20
"""Thresholds of the "Limitations" section: minimum F1, and minimum number of test rows per class."""
_METHODS = {
    "full": "All parameters",
    "frozen": "A new head on the frozen backbone",
    "lora": "LoRA adapters and a new head",
    "probe": "A scikit-learn classifier on features of the frozen backbone",
}
_SECONDARY_METRICS = ("weighted_f1", "macro_precision", "macro_recall", "loss")


def write_card(record: RunRecord, part: str, into: Path, repo: str | None = None) -> None:
    """Writes the card of one artifact of a run as `into/README.md`.

    Args:
        record: The finished run.
        part: `model` or `adapter`.
        into: Output folder.
        repo: Repo id in the usage code of the card; None writes a placeholder for the local folder.
    """
    from huggingface_hub import ModelCard

    sections = [
        f"# {_title(record)}\n\n{_summary(record)}",
        f"## How to use\n\n{usage_code(record, part, repo)}",
        f"## Labels\n\n{shorten([_escape(label) for label in _labels(record)], 200) or 'none'}",
        f"## Training data\n\n{_training_data(record)}",
        f"## Evaluation results\n\n{_evaluation_results(record)}",
        f"## Limitations\n\n{_limitations(record)}",
        f"## Training procedure\n\n{_training_procedure(record)}",
        f"## Environment\n\n{_environment(record)}",
    ]
    metadata = _metadata(record, part, repo).to_yaml()
    ModelCard(f"---\n{metadata}\n---\n\n" + "\n\n".join(sections) + "\n").save(into / "README.md")


def _metadata(record: RunRecord, part: str, repo: str | None) -> Any:
    from huggingface_hub import EvalResult, ModelCardData

    base = record.description["base_model"]
    bases = [encoder["hub_id"] for encoder in _encoders(record) if encoder["hub_id"] and encoder["pretrained"]]
    source = record.settings["data.source"]
    tests = {name: value for name, value in record.metrics.items() if name.startswith("test/") and value is not None}
    intervals = record.intervals("test")
    results = [
        EvalResult(
            task_type=pipeline_task(record),
            dataset_type=source if _is_repo_id(source) else _slug(source),
            dataset_name=_slug(source),
            dataset_split="test",
            metric_type=name,
            metric_name=name.replace("_", " "),
            metric_value=round(tests[f"test/{name}"], 4),
            metric_args={"interval_95": [round(end, 4) for end in intervals[name]]} if name in intervals else None,
        )
        for name in ([name for name in record.primary_metrics if f"test/{name}" in tests] or ["loss"] if tests else [])
    ]
    return ModelCardData(
        library_name="peft" if part == "adapter" else "hftl" if has_sklearn_head(record) else saved_library(record),
        pipeline_tag=pipeline_task(record),
        license=(base["license"] or "").lower() or None,
        language=next((encoder["language"] for encoder in _encoders(record) if encoder["language"]), None),
        base_model=(bases if len(bases) > 1 else bases[0]) if bases else None,
        base_model_relation=("adapter" if part == "adapter" else "finetune") if bases else None,
        datasets=[source] if _is_repo_id(source) else None,
        tags=["hftl", record.description["method"]],
        model_name=(repo or str(record.folder)).rsplit("/", 1)[-1] if results else None,
        eval_results=results or None,
    )


def _encoders(record: RunRecord) -> list[dict[str, Any]]:
    """Returns the pretrained source of each encoder: one, or the image and the text encoder."""
    base = record.description["base_model"]
    return [base, *([base["text_source"]] if base.get("text_source") else [])]


def _title(record: RunRecord) -> str:
    base = Path(record.settings["model.name"].rpartition(":")[2]).name
    return f"{_slug(record.settings['data.source'])}: {pipeline_task(record).replace('-', ' ')} with {base}"


def _summary(record: RunRecord) -> str:
    base = record.description["base_model"]
    weights = "pretrained weights" if base["pretrained"] else "random weights"
    method = _METHODS.get(record.description["method"], record.description["method"])
    names = []
    for encoder in _encoders(record):
        name = encoder["hub_id"] or (record.settings["model.name"] if encoder is base else encoder["name"])
        names.append(f"`{name}`" + (f" (revision `{encoder['revision']}`)" if encoder["revision"] else ""))
    source = _code(record.settings["data.source"])
    return f"{method} trained on {source}, starting from {weights} of {' and '.join(names)}."


def _training_data(record: RunRecord) -> str:
    rows = record.facts["rows"]
    counts = record.facts.get("classes", {})
    lines = [
        f"{_code(record.settings['data.source'])}: "
        + ", ".join(f"{split} {count}" for split, count in rows.items())
        + " rows."
    ]
    left_out = record.facts.get("left_out")
    if left_out:
        listed = ", ".join(f"{split} {count}" for split, count in left_out.items())
        lines.append(f"Invalid rows of the source, skipped: {listed}.")
    if counts:
        fewest = min(counts["train"], key=lambda name: counts["train"][name])
        most = max(counts["train"], key=lambda name: counts["train"][name])
        lines.append(
            f"Training rows per class: {counts['train'][fewest]} ({_code(fewest)}) to "
            f"{counts['train'][most]} ({_code(most)})."
        )
    if record.facts["training"]["best"]:
        tested = "; the test split was not used." if "test" in rows else "."
        lines.append("The checkpoint was selected on the validation split" + tested)
    return "\n".join(lines)


def _evaluation_results(record: RunRecord) -> str:
    intervals = record.intervals("test")
    names = [name for name in record.metrics if record.metrics[name] is not None]
    if record.answers:
        listed = (*record.primary_metrics, *_SECONDARY_METRICS)
        names = [name for name in names if name.partition("/")[2] in listed]
    lines = ["| metric | value | 95 % interval |", "|---|---|---|"]
    for name in names:
        split, _, metric = name.partition("/")
        low, high = intervals.get(metric, (None, None)) if split == "test" else (None, None)
        interval = f"{low:.4f} to {high:.4f}" if low is not None else ""
        lines.append(f"| {_escape(name)} | {record.metrics[name]:.4f} | {interval} |")
    if not intervals:
        return "\n".join(lines)
    note = "Intervals: over the rows of the test split (Wilson for proportions, bootstrap for others), not over seeds."
    table = f"\n\n{_per_class_table(record)}" if "test" in record.class_predictions else ""
    predictions = record.answers.get("test")
    if isinstance(predictions, MultiLabelPredictions):
        table = f"\n\n{_per_label_table(predictions)}"
    return "\n".join(lines) + f"\n\n{note}{table}"


def _class_scores(record: RunRecord) -> list[tuple[str, int, float, float, float, tuple[float, float]]]:
    """Returns (class, test rows, precision, recall, F1, interval of the recall) for each class."""
    confusion = record.class_predictions["test"].confusion
    scores = []
    for k, label in enumerate(_labels(record)):
        correct, actual, predicted = int(confusion[k, k]), int(confusion[k].sum()), int(confusion[:, k].sum())
        precision, recall = correct / predicted if predicted else 0.0, correct / actual if actual else 0.0
        f1 = 2 * correct / (actual + predicted) if actual + predicted else 0.0
        scores.append((label, actual, precision, recall, f1, wilson(correct, actual)))
    return scores


def _per_class_table(record: RunRecord) -> str:
    lines = ["| class | test rows | precision | recall | 95 % interval of recall | F1 |", "|---|---|---|---|---|---|"]
    for label, rows, precision, recall, f1, (low, high) in _class_scores(record):
        interval = f"{low:.2f} to {high:.2f}" if rows else ""
        lines.append(f"| {_escape(label)} | {rows} | {precision:.3f} | {recall:.3f} | {interval} | {f1:.3f} |")
    return "\n".join(lines)


def _per_label_table(predictions: MultiLabelPredictions) -> str:
    scores = label_scores(predictions.labels, predictions.probabilities, predictions.thresholds)
    head = "| label | test rows | threshold | average precision | precision | recall | F1 |"
    lines = [head, "|---|---|---|---|---|---|---|"]
    for k, name in enumerate(predictions.names):
        values = [scores[metric][k] for metric in ("average_precision", "precision", "recall", "f1")]
        cells = [
            _escape(name),
            str(scores["rows"][k]),
            f"{predictions.thresholds[k]:.4f}",
            *(f"{value:.3f}" for value in values),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    note = "A label is predicted if its probability reaches the threshold, selected on validation by F1."
    return "\n".join(lines) + f"\n\n{note}"


def _limitations(record: RunRecord) -> str:
    if "test" not in record.facts["rows"]:
        return "There was no test split: all metrics are from splits that were used for training or model selection."
    if "test" not in record.class_predictions:
        predictions = record.answers.get("test")
        tested = f"{len(predictions.rows):,} test rows of one dataset" if predictions else "one test split"
        return f"Measured on {tested}; results on other data may differ."
    scores = _class_scores(record)
    weak = [f"{_escape(label)} ({f1:.2f})" for label, rows, _, _, f1, _ in scores if rows and f1 < WEAK_F1]
    few = [f"{_escape(label)} ({rows})" for label, rows, *_ in scores if rows < FEW_ROWS]
    rows = int(record.class_predictions["test"].confusion.sum())
    lines = [f"- Measured on {rows} test rows of one dataset; results on other data may differ."]
    if weak:
        lines.append(f"- F1 below {WEAK_F1} on test: {shorten(weak, 30)}.")
    if few:
        lines.append(f"- Fewer than {FEW_ROWS} test rows (uncertain metrics): {shorten(few, 30)}.")
    return "\n".join(lines)


def _training_procedure(record: RunRecord) -> str:
    adapt, training = record.facts["adapt"], record.facts["training"]
    best = training["best"]
    checkpoint = f"best, step {best['step']} ({best['metric']} {best['value']:.4f})" if best else "last step"
    fitted = (
        f"{training['steps']} steps in {training['seconds']:.0f} s, seed {record.settings['train.seed']}; "
        f"checkpoint: {checkpoint}"
    )
    fitted = _selected_classifier(training) if training.get("selection") else fitted
    differences = ", ".join(f"{name} {value:.2g}" for name, value in record.facts.get("verified", {}).items())
    return f"""```bash
{record.environment.get("command", "not recorded")}
```

- trainable parameters: {adapt["trainable"]:,} of {adapt["total"]:,} (`{adapt["method"]}`)
- {fitted}
- largest logit difference between trained and saved model, per library: {differences or "not recorded"}

<details><summary>Configuration</summary>

```yaml
{(record.folder / "config.yaml").read_text(encoding="utf-8")}```

</details>"""


def _selected_classifier(training: dict[str, Any]) -> str:
    """Returns the classifier and hyperparameters selected by cross-validation."""
    chosen = training["selection"]
    settings = ", ".join(f"{name} {value:g}" for name, value in chosen["settings"].items())
    return (
        f"{chosen['head']} with {settings}, best of {len(chosen['tried'])} settings in {chosen['folds']}-fold "
        f"cross-validation on {chosen['rows']} training rows (accuracy {chosen['accuracy']:.4f}, log-loss "
        f"{chosen['loss']:.4f}); {training['seconds']:.0f} s including feature extraction"
    )


def _environment(record: RunRecord) -> str:
    environment = record.environment
    packages = ", ".join(f"{name} {version}" for name, version in environment["packages"].items())
    return (
        f"{environment['processes']} process(es) on {environment['device']}, precision {environment['precision']}; "
        f"Python {environment['python']}, {packages}"
    )


def _labels(record: RunRecord) -> list[str]:
    return record.description["head"]["labels"]


def _slug(source: str) -> str:
    """Returns a short name of a data source: the last component of its path or id."""
    return Path(source.rstrip("/").rpartition(":")[2]).stem or "data"


def _escape(text: str) -> str:
    """Returns text from data escaped for Markdown: no markup, links, line breaks or table cells."""
    text = sanitize(" ".join(text.split())).replace("&", "&amp;").replace("<", "&lt;")
    return re.sub(r"([\\`*_\[\]|])", r"\\\1", text)


def _code(text: str) -> str:
    """Returns text from data as inline code."""
    return "`" + sanitize(" ".join(text.split())).replace("`", "'") + "`"


def _is_repo_id(source: str) -> bool:
    return bool(source) and ":" not in source and source.count("/") <= 1 and not Path(source).expanduser().exists()
