"""The model card: what was measured, how to use it, what made it. Nothing in it is invented."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hftl.config.parse import dump
from hftl.config.schema import RunConfig
from hftl.errors import shorten
from hftl.models.parts import TaskModel
from hftl.tasks.task import Task

_USE = {
    ("timm", "model"): """\
```python
import timm, transformers
classify = transformers.pipeline("image-classification", "{path}")       # transformers
model = timm.create_model("local-dir:{path}", pretrained=True).eval()    # or timm
```""",
    ("timm", "adapter"): """\
```python
import timm, peft
base = timm.create_model("{base}", pretrained=True, num_classes={outputs}{arguments})
model = peft.PeftModel.from_pretrained(base, "{path}").eval()
```""",
    ("transformers", "model"): """\
```python
import transformers
classify = transformers.pipeline("text-classification", "{path}"{trust})
```""",
    ("transformers", "adapter"): """\
```python
import peft, transformers
base = transformers.AutoModelForSequenceClassification.from_pretrained(
    "{base}", revision={revision!r}, num_labels={outputs}, ignore_mismatched_sizes=True
)
model = peft.PeftModel.from_pretrained(base, "{path}").eval()
```""",
    ("pooled", "adapter"): """\
```python
import peft, transformers
from transformers.dynamic_module_utils import get_class_from_dynamic_module
pooled = get_class_from_dynamic_module("modeling_pooled_text.PooledTextForSequenceClassification", "{path}")
config = transformers.AutoConfig.from_pretrained("{path}", trust_remote_code=True)
base = pooled.from_backbone("{base}", config, revision={revision!r})
model = peft.PeftModel.from_pretrained(base, "{path}").eval()
```""",
}


def write_card(
    part: Path,
    model: TaskModel,
    task: Task,
    run: RunConfig,
    metrics: dict[str, float],
    facts: dict[str, Any],
) -> None:
    """Writes `part/README.md`.

    Args:
        part: The `model` or `adapter` folder.
        model: Already merged.
        task: Gives name and labels.
        run: Resolved configuration.
        metrics: By split, as `evaluate` returned them.
        facts: Lines for the section "How it was trained", by title.
    """
    from huggingface_hub import ModelCard, ModelCardData

    library = model.source.library
    base = model.source.name.removeprefix("hf-hub:")
    data = ModelCardData(
        library_name="peft" if part.name == "adapter" else library,
        pipeline_tag=task.name.replace("_", "-"),
        license=(model.source.licence or "").lower() or None,
        base_model=base if _is_hub_id(base) else None,
        tags=["hftl", run.adapt.method],
    )
    use = _use(part, model)
    table = "\n".join(f"| {name} | {value:.4f} |" for name, value in metrics.items())
    made = "\n".join(f"- {title}: {value}" for title, value in facts.items())
    body = f"""
# {run.data.source.rstrip("/").rsplit("/", 1)[-1]}: {task.name.replace("_", " ")} with {Path(base).name}

{base} ({"pretrained" if model.source.pretrained else "trained from random weights"}), adapted by
`{run.adapt.method}` on `{run.data.source}`.

## Use

{use}

## Labels

{shorten(list(model.spec.labels), 100) or "none"}

## Results

| metric | value |
|---|---|
{table}

Measured once, by hftl, on the split that each name begins with; validation chose the weights, test chose nothing.

## How it was trained

{made}

<details><summary>Configuration</summary>

```yaml
{dump(run)}```

</details>
"""
    ModelCard(f"---\n{data.to_yaml()}\n---\n{body}").save(part / "README.md")


def _use(part: Path, model: TaskModel) -> str:
    """Returns the code that opens a folder without hftl."""
    pooled = "Pooled" in type(model.net).__name__
    library = "pooled" if pooled and part.name == "adapter" else model.source.library
    return _USE[library, part.name].format(
        path=f"path/to/{part.name}",
        base=model.source.name,
        revision=model.source.revision,
        arguments="".join(f", {name}={value!r}" for name, value in model.build_args.items()),
        outputs=model.spec.num_outputs,
        trust=", trust_remote_code=True" if pooled else "",
    )


def _is_hub_id(name: str) -> bool:
    return ":" not in name and name.count("/") <= 1 and not Path(name).exists()
