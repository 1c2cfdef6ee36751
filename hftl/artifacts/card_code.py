"""Usage code of model cards, one template per library and kind of artifact."""

from __future__ import annotations

from hftl.reporting.run_record import RunRecord


def usage_code(record: RunRecord, part: str, repo: str | None) -> str:
    """Returns the code that loads the model; it needs hftl only if no timm or transformers class holds the head.

    Args:
        record: The finished run.
        part: `model` or `adapter`.
        repo: Repo id in the code; None writes a placeholder for the local folder.
    """
    base = record.description["base_model"]
    path = repo or f"path/to/{part}"
    fields = {
        "path": path,
        "task": pipeline_task(record),
        "timm": f"hf-hub:{repo}" if repo else f"local-dir:{path}",
        "top_k": "" if record.classes else f", top_k={record.description['head']['num_outputs']}",
        "trust": ", trust_remote_code=True" if _is_pooled(record) else "",
        "adapter": f'"{path}"' + (', subfolder="adapter"' if repo else ""),
        "folder": f'snapshot_download("{repo}", allow_patterns="adapter/*") + "/adapter"' if repo else f'"{path}"',
        "model_class": record.description["head"]["model_class"],
        "outputs": record.description["head"]["num_outputs"],
        "base": base["name"],
        "revision": repr(base["revision"]),
        "arguments": "".join(f", {name}={value!r}" for name, value in base["arguments"].items()),
    }
    usage = record.description.get("usage")
    if usage and part == "model":
        return "```python\n" + usage.replace("{place}", path).strip() + "\n```"
    kind = "pooled" if _is_pooled(record) and part == "adapter" else saved_library(record)
    if part == "adapter" and (usage or saved_library(record) != base["library"]):
        kind = "composed"
    if has_sklearn_head(record):
        fields["head"] = _SKLEARN_HEADS[record.description["sklearn_head"]]
        return _USAGE["sklearn", part].format(**fields)
    code = "```python\n" + _USAGE[kind, part].format(**fields) + "\n```"
    if part == "model" and repo and "adapter" in record.parts:
        code += "\n\nThe adapter on its base model:\n\n" + usage_code(record, "adapter", repo)
    return code


def saved_library(record: RunRecord) -> str:
    """Returns the library of the saved class; a transformers model can contain a timm backbone."""
    library, model_class = record.description["base_model"]["library"], record.description["head"]["model_class"]
    return "transformers" if library == "timm" and model_class != "timm" else library


_SKLEARN_HEADS = {
    "svm": "a support vector machine",
    "random_forest": "a random forest",
    "knn": "a k-nearest-neighbors classifier",
}
_USAGE = {
    ("timm", "model"): """\
import timm, transformers

classify = transformers.pipeline("{task}", "{path}"{top_k})  # transformers
model = timm.create_model("{timm}", pretrained=True).eval()  # or timm""",
    ("timm", "adapter"): """\
import timm, peft

base = timm.create_model("{base}", pretrained=True, num_classes={outputs}{arguments})
model = peft.PeftModel.from_pretrained(base, {adapter}).eval()""",
    ("sklearn", "model"): """\
```python
import hftl  # with scikit-learn and skops: hftl[probe]

model = hftl.load("{path}")
model.predict([…])
```

The head is {head} from scikit-learn (`head.skops`). timm and transformers classes cannot contain it:
`timm.create_model` and `transformers.AutoModel` load the backbone only and return features. A `pipeline` raises an
error, or adds a head with random weights and warns.""",
    ("transformers", "model"): """\
import transformers

classify = transformers.pipeline("{task}", "{path}"{top_k}{trust})""",
    ("transformers", "adapter"): """\
import peft, transformers

base = transformers.{model_class}.from_pretrained(
    "{base}", revision={revision}, num_labels={outputs}, ignore_mismatched_sizes=True
)
model = peft.PeftModel.from_pretrained(base, {adapter}).eval()""",
    ("composed", "adapter"): """\
import hftl  # adds the new head to the backbone {base}; the merged model loads without hftl

model = hftl.load({adapter})""",
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
    """Returns the pipeline tag of the task, as used by the Hub and by `transformers.pipeline`."""
    return record.description.get("pipeline_tag") or record.description["task"].replace("_", "-")


def has_sklearn_head(record: RunRecord) -> bool:
    """Whether the head is a scikit-learn classifier."""
    return record.description.get("sklearn_head") is not None


def _is_pooled(record: RunRecord) -> bool:
    return record.description["class"].startswith("Pooled")
