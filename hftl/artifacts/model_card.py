"""The model card: what was measured, how to use it, what made it; from the record of the run, nothing invented."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from hftl.artifacts.card_code import has_sklearn_head, pipeline_task, saved_library, use_code
from hftl.errors import shorten
from hftl.redaction import sanitize
from hftl.reporting.run_record import RunRecord
from hftl.statistics.confidence_intervals import wilson
from hftl.tasks.predictions import MultiLabelPredictions
from hftl.tasks.targets.multi_label.metrics import label_scores

WEAK_F1, FEW_ROWS = 0.5, 20
"""Classes below this F1, or with fewer test rows than this, are named under "Limits"."""
_METHODS = {
    "full": "All parameters",
    "frozen": "A new head on the frozen backbone",
    "lora": "LoRA adapters and a new head",
    "probe": "A classic head on features of the frozen backbone",
}
_ALSO_SHOWN = ("weighted_f1", "macro_precision", "macro_recall", "loss")


def write_card(record: RunRecord, part: str, into: Path, repo: str | None = None) -> None:
    """Writes the card of one part of a run as `into/README.md`.

    Args:
        record: The finished run.
        part: `model` or `adapter`.
        into: Folder that receives the card.
        repo: Hub id that the code in the card should open; by default the folder.
    """
    from huggingface_hub import ModelCard

    sections = [
        f"# {_title(record)}\n\n{_summary(record)}",
        f"## Use\n\n{use_code(record, part, repo)}",
        f"## Labels\n\n{shorten([_plain(label) for label in _labels(record)], 200) or 'none'}",
        f"## Data\n\n{_data(record)}",
        f"## Results\n\n{_results(record)}",
        f"## Limits\n\n{_limits(record)}",
        f"## How it was trained\n\n{_training(record)}",
        f"## Environment\n\n{_environment(record)}",
    ]
    metadata = _metadata(record, part, repo).to_yaml()
    ModelCard(f"---\n{metadata}\n---\n\n" + "\n\n".join(sections) + "\n").save(into / "README.md")


def _metadata(record: RunRecord, part: str, repo: str | None) -> Any:
    from huggingface_hub import EvalResult, ModelCardData

    base = record.described["base_model"]
    bases = [each["hub_id"] for each in _sources(record) if each["hub_id"] and each["pretrained"]]
    source = _source(record)
    tests = {name: value for name, value in record.metrics.items() if name.startswith("test/") and value is not None}
    intervals = record.intervals("test")
    results = [
        EvalResult(
            task_type=pipeline_task(record),
            dataset_type=source if _is_hub_id(source) else _slug(source),
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
        language=next((each["language"] for each in _sources(record) if each["language"]), None),
        base_model=(bases if len(bases) > 1 else bases[0]) if bases else None,
        base_model_relation=("adapter" if part == "adapter" else "finetune") if bases else None,
        datasets=[source] if _is_hub_id(source) else None,
        tags=["hftl", record.described["method"]],
        model_name=(repo or str(record.folder)).rsplit("/", 1)[-1] if results else None,
        eval_results=results or None,
    )


def _sources(record: RunRecord) -> list[dict[str, Any]]:
    """Returns where each encoder came from: one, or the image and the text encoder."""
    base = record.described["base_model"]
    return [base, *([base["text_source"]] if base.get("text_source") else [])]


def _title(record: RunRecord) -> str:
    base = Path(record.settings["model.name"].rpartition(":")[2]).name
    return f"{_slug(record.settings['data.source'])}: {pipeline_task(record).replace('-', ' ')} with {base}"


def _summary(record: RunRecord) -> str:
    base = record.described["base_model"]
    start = "pretrained weights" if base["pretrained"] else "random weights"
    method = _METHODS.get(record.described["method"], record.described["method"])
    named = [
        each["hub_id"] or (record.settings["model.name"] if each is base else each["name"]) for each in _sources(record)
    ]
    revisions = [f" (revision `{each['revision']}`)" if each["revision"] else "" for each in _sources(record)]
    name = " and ".join(f"`{hub_id}`{revision}" for hub_id, revision in zip(named, revisions, strict=True))
    return f"{method} trained on {_code(record.settings['data.source'])}, starting from {start} of {name}."


def _data(record: RunRecord) -> str:
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
        lines.append(f"Rows of the source that could not be used, and were left out: {listed}.")
    if counts:
        fewest = min(counts["train"], key=lambda name: counts["train"][name])
        most = max(counts["train"], key=lambda name: counts["train"][name])
        lines.append(
            f"Training rows per class: {counts['train'][fewest]} ({_code(fewest)}) to "
            f"{counts['train'][most]} ({_code(most)})."
        )
    if record.facts["training"]["best"]:
        lines.append("Validation chose the weights that were kept" + ("; test did not." if "test" in rows else "."))
    return "\n".join(lines)


def _results(record: RunRecord) -> str:
    intervals = record.intervals("test")
    names = [name for name in record.metrics if record.metrics[name] is not None]
    shown = (
        [name for name in names if name.partition("/")[2] in (*record.primary_metrics, *_ALSO_SHOWN)]
        if record.answers
        else names
    )
    lines = ["| metric | value | 95 % interval |", "|---|---|---|"]
    for name in shown:
        split, _, metric = name.partition("/")
        low, high = intervals.get(metric, (None, None)) if split == "test" else (None, None)
        spread = f"{low:.4f} to {high:.4f}" if low is not None else ""
        lines.append(f"| {_cell(name)} | {record.metrics[name]:.4f} | {spread} |")
    if not intervals:
        return "\n".join(lines)
    note = "Intervals: over the rows of the test split (Wilson for proportions, bootstrap for others), not over seeds."
    classes = f"\n\n{_per_class(record)}" if "test" in record.judged else ""
    found = record.answers.get("test")
    if isinstance(found, MultiLabelPredictions):
        classes = f"\n\n{_per_label(found)}"
    return "\n".join(lines) + f"\n\n{note}{classes}"


def _scores(record: RunRecord) -> list[tuple[str, int, float, float, float, tuple[float, float]]]:
    """Returns (class, test rows, precision, recall, F1, interval of the recall) for each class."""
    confusion = record.judged["test"].confusion
    out = []
    for number, label in enumerate(_labels(record)):
        right, true, said = (
            int(confusion[number, number]),
            int(confusion[number].sum()),
            int(confusion[:, number].sum()),
        )
        precision, recall = right / said if said else 0.0, right / true if true else 0.0
        f1 = 2 * right / (true + said) if true + said else 0.0
        out.append((label, true, precision, recall, f1, wilson(right, true)))
    return out


def _per_class(record: RunRecord) -> str:
    lines = ["| class | test rows | precision | recall | 95 % interval of recall | F1 |", "|---|---|---|---|---|---|"]
    for label, rows, precision, recall, f1, (low, high) in _scores(record):
        spread = f"{low:.2f} to {high:.2f}" if rows else ""
        lines.append(f"| {_cell(label)} | {rows} | {precision:.3f} | {recall:.3f} | {spread} | {f1:.3f} |")
    return "\n".join(lines)


def _per_label(found: MultiLabelPredictions) -> str:
    scores = label_scores(found.labels, found.probabilities, found.thresholds)
    head = "| label | test rows | threshold | average precision | precision | recall | F1 |"
    lines = [head, "|---|---|---|---|---|---|---|"]
    for k, name in enumerate(found.names):
        numbers = [scores[of][k] for of in ("average_precision", "precision", "recall", "f1")]
        cells = [
            _cell(name),
            str(scores["rows"][k]),
            f"{found.thresholds[k]:.4f}",
            *(f"{each:.3f}" for each in numbers),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    note = "A row has a label where its probability is at least the threshold, which validation chose by F1."
    return "\n".join(lines) + f"\n\n{note}"


def _limits(record: RunRecord) -> str:
    if "test" not in record.facts["rows"]:
        return "There was no test split: nothing here was measured on rows that chose nothing."
    if "test" not in record.judged:
        found = record.answers.get("test")
        on = f"{len(found.rows):,} test rows of one data set" if found else "one test split"
        return f"Measured on {on}; other data may differ."
    scores = _scores(record)
    weak = [f"{_plain(label)} ({f1:.2f})" for label, rows, _, _, f1, _ in scores if rows and f1 < WEAK_F1]
    few = [f"{_plain(label)} ({rows})" for label, rows, *_ in scores if rows < FEW_ROWS]
    lines = [
        f"- Measured on {int(record.judged['test'].confusion.sum())} test rows of one data set; other data may differ."
    ]
    if weak:
        lines.append(f"- F1 below {WEAK_F1} on test: {shorten(weak, 30)}.")
    if few:
        lines.append(f"- Fewer than {FEW_ROWS} test rows, so their figures say little: {shorten(few, 30)}.")
    return "\n".join(lines)


def _training(record: RunRecord) -> str:
    environment = record.environment
    adapt, training = record.facts["adapt"], record.facts["training"]
    best = training["best"]
    kept = f"step {best['step']} ({best['metric']} {best['value']:.4f})" if best else "the last weights"
    made = (
        f"{training['steps']} steps in {training['seconds']:.0f} s, seed {record.settings['train.seed']}; kept: {kept}"
    )
    made = _selected(training) if training.get("selection") else made
    differences = ", ".join(f"{name} {value:.2g}" for name, value in record.facts.get("verified", {}).items())
    return f"""```bash
{environment.get("command", "not recorded")}
```

- {adapt["trainable"]:,} of {adapt["total"]:,} parameters trained (`{adapt["method"]}`)
- {made}
- largest logit difference between the trained model and the saved one, by reader: {differences or "not recorded"}

<details><summary>Configuration</summary>

```yaml
{(record.folder / "config.yaml").read_text(encoding="utf-8")}```

</details>"""


def _selected(training: dict[str, Any]) -> str:
    """Returns what cross-validation chose."""
    chosen = training["selection"]
    settings = ", ".join(f"{name} {value:g}" for name, value in chosen["settings"].items())
    return (
        f"{chosen['head']} with {settings}, the best of {len(chosen['tried'])} settings in {chosen['folds']}-fold "
        f"cross-validation on {chosen['rows']} training rows (accuracy {chosen['accuracy']:.4f}, log-loss "
        f"{chosen['loss']:.4f}); {training['seconds']:.0f} s with the features"
    )


def _environment(record: RunRecord) -> str:
    found = record.environment
    packages = ", ".join(f"{name} {number}" for name, number in found["packages"].items())
    return (
        f"{found['processes']} process(es) on {found['device']}, precision {found['precision']}; "
        f"Python {found['python']}, {packages}"
    )


def _labels(record: RunRecord) -> list[str]:
    return record.described["head"]["labels"]


def _source(record: RunRecord) -> str:
    return record.settings["data.source"]


def _slug(source: str) -> str:
    """Returns a short name for a data source: the last part of its path or id."""
    return Path(source.rstrip("/").rpartition(":")[2]).stem or "data"


def _cell(text: str) -> str:
    """Returns text that stays inside one cell of a Markdown table."""
    return _plain(text)


def _plain(text: str) -> str:
    """Returns text from data as Markdown shows it: no markup, no link, no line or cell of its own."""
    text = sanitize(" ".join(text.split())).replace("&", "&amp;").replace("<", "&lt;")
    return re.sub(r"([\\`*_\[\]|])", r"\\\1", text)


def _code(text: str) -> str:
    """Returns text from data as code within a line."""
    return "`" + sanitize(" ".join(text.split())).replace("`", "'") + "`"


def _is_hub_id(source: str) -> bool:
    return bool(source) and ":" not in source and source.count("/") <= 1 and not Path(source).expanduser().exists()
