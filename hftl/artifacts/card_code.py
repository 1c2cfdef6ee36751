"""The code in a model card: how each kind of artifact is opened."""

from __future__ import annotations

from hftl.reporting.run_record import RunRecord


def use_code(record: RunRecord, part: str, repo: str | None) -> str:
    """Returns the code that opens the model: without hftl, except where no stock class holds the head.

    Args:
        record: The finished run.
        part: `model` or `adapter`.
        repo: Hub id to open; by default the folder.
    """
    base = record.described["base_model"]
    place = repo or f"path/to/{part}"
    fill = {
        "place": place,
        "task": pipeline_task(record),
        "timm": f"hf-hub:{repo}" if repo else f"local-dir:{place}",
        "all": "" if record.classes else f", top_k={record.described['head']['num_outputs']}",
        "trust": ", trust_remote_code=True" if _is_pooled(record) else "",
        "where": f'"{place}"' + (', subfolder="adapter"' if repo else ""),
        "folder": f'snapshot_download("{repo}", allow_patterns="adapter/*") + "/adapter"' if repo else f'"{place}"',
        "model_class": record.described["head"]["model_class"],
        "outputs": record.described["head"]["num_outputs"],
        "base": base["name"],
        "revision": repr(base["revision"]),
        "arguments": "".join(f", {name}={value!r}" for name, value in base["arguments"].items()),
    }
    usage = record.described.get("usage")
    if usage and part == "model":
        return "```python\n" + usage.replace("{place}", place).strip() + "\n```"
    kind = "pooled" if _is_pooled(record) and part == "adapter" else saved_library(record)
    if part == "adapter" and (usage or saved_library(record) != base["library"]):
        kind = "composed"
    if has_sklearn_head(record):
        kind, fill["head"] = "classic", _CLASSIC[record.described["sklearn_head"]]
        return _USE[kind, part].format(**fill)
    code = "```python\n" + _USE[kind, part].format(**fill) + "\n```"
    if part == "model" and repo and "adapter" in record.parts:
        code += "\n\nThe adapter alone, on its base model:\n\n" + use_code(record, "adapter", repo)
    return code


def saved_library(record: RunRecord) -> str:
    """Returns the library whose class was saved: a timm backbone may stand in a network of transformers."""
    library, model_class = record.described["base_model"]["library"], record.described["head"]["model_class"]
    return "transformers" if library == "timm" and model_class != "timm" else library


_CLASSIC = {"svm": "a support vector machine", "random_forest": "a random forest", "knn": "a nearest-neighbour vote"}
_USE = {
    ("timm", "model"): """\
import timm, transformers

classify = transformers.pipeline("{task}", "{place}"{all})  # transformers
model = timm.create_model("{timm}", pretrained=True).eval()  # or timm""",
    ("timm", "adapter"): """\
import timm, peft

base = timm.create_model("{base}", pretrained=True, num_classes={outputs}{arguments})
model = peft.PeftModel.from_pretrained(base, {where}).eval()""",
    ("classic", "model"): """\
```python
import hftl  # with scikit-learn and skops: hftl[probe]

model = hftl.load("{place}")
model.predict([…])
```

The head is {head} of scikit-learn's (`head.skops`), which no stock class holds. Without hftl the folder is the backbone
alone: `timm.create_model` and `transformers.AutoModel` open it and give features. A `pipeline` refuses it,
or puts a head of random weights on it and warns.""",
    ("transformers", "model"): """\
import transformers

classify = transformers.pipeline("{task}", "{place}"{all}{trust})""",
    ("transformers", "adapter"): """\
import peft, transformers

base = transformers.{model_class}.from_pretrained(
    "{base}", revision={revision}, num_labels={outputs}, ignore_mismatched_sizes=True
)
model = peft.PeftModel.from_pretrained(base, {where}).eval()""",
    ("composed", "adapter"): """\
import hftl  # it puts the new head on the backbone {base}; the merged model opens without it

model = hftl.load({where})""",
    ("pooled", "adapter"): """\
import peft, transformers
from huggingface_hub import snapshot_download
from transformers.dynamic_module_utils import get_class_from_dynamic_module

folder = {folder}
pooled = get_class_from_dynamic_module("modeling_pooled_text.PooledTextForSequenceClassification", folder)
config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=True)
base = pooled.from_backbone("{base}", config, revision={revision})
model = peft.PeftModel.from_pretrained(base, folder).eval()""",
}


def pipeline_task(record: RunRecord) -> str:
    """Returns the name of a task as the hub and pipelines have it."""
    return record.described.get("pipeline_tag") or record.described["task"].replace("_", "-")


def has_sklearn_head(record: RunRecord) -> bool:
    """Whether scikit-learn computes the head."""
    return record.described.get("sklearn_head") is not None


def _is_pooled(record: RunRecord) -> bool:
    return record.described["class"].startswith("Pooled")
