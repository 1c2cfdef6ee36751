"""Text embeddings: task contract, reloading with sentence-transformers and transformers, early errors."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import run_undrawn
from pair_data import positive_pairs, scored_pairs, write_lines

import hftl
from hftl.errors import ConfigError
from hftl.inference.batch_inference import evaluate_saved
from hftl.reporting import write_report
from hftl.run.testing import check_task


@pytest.fixture
def pair_run(tiny_bert, tmp_path):
    """Returns a function that creates the configuration of a short run on rows per split."""

    def make(
        method: str = "full", splits=None, pooling: str = "auto", pair_loss: str = "auto", **data
    ) -> hftl.RunConfig:
        splits = splits or {"train": scored_pairs(40), "validation": scored_pairs(8, 1), "test": scored_pairs(11, 2)}
        return hftl.RunConfig(
            hftl.DataConfig(source=write_lines(tmp_path / "data", **splits), **data),
            hftl.ModelConfig(name=tiny_bert, pooling=pooling),
            hftl.AdaptConfig(method=method),
            hftl.TrainConfig(
                num_epochs=1, lr=1e-3, head_lr=1e-3, batch_size_per_device=8, trackers=[], pair_loss=pair_loss
            ),
            output_dir=str(tmp_path / "run"),
        )

    return make


@pytest.mark.parametrize("loss", ["cosent", "infonce"])
def test_check_task_accepts_text_embedding(loss, pair_run):
    rows = {"train": positive_pairs(24), "test": positive_pairs(8, 1)} if loss == "infonce" else None
    run, splits, task = hftl.setup_run(pair_run(splits=rows, pair_loss=loss), hftl.TextEmbedding)
    check_task(task, splits, run)


STANDALONE = """
import json, sys, torch
from sentence_transformers import SentenceTransformer
from transformers import AutoModel, AutoTokenizer
folder, texts = sys.argv[1], json.loads(sys.argv[2])
first = SentenceTransformer(folder, device="cpu").encode(texts, convert_to_tensor=True)
tokens = AutoTokenizer.from_pretrained(folder)(texts, padding=True, truncation=True, return_tensors="pt")
with torch.no_grad():
    features = AutoModel.from_pretrained(folder).eval()(**tokens).last_hidden_state
mask = tokens["attention_mask"].unsqueeze(-1)
second = torch.nn.functional.normalize((features * mask).sum(1) / mask.sum(1), dim=-1)
torch.testing.assert_close(first, second, atol=1e-5, rtol=1e-4)
print("EMBEDDINGS", json.dumps(first.tolist()))
"""


def test_saved_embedding_model_without_hftl_matches_hftl(pair_run, capsys, run_without_hftl):
    """The merged LoRA model is loaded by sentence-transformers and AutoModel in a process without hftl."""
    pytest.importorskip("sentence_transformers")
    run = pair_run("lora")
    metrics = run_undrawn("text_embedding", run)
    assert write_report(Path(run.output_dir)).is_file()
    assert {"test/spearman", "test/pearson", "test/loss"} <= set(metrics)
    assert "0 to 5 (scaled to 0..1)" in capsys.readouterr().out
    texts = ["cat dog", "the saw", "bread rice soup cheese apple " * 30]  # the last text is truncated
    output = run_without_hftl(STANDALONE, f"{run.output_dir}/model", json.dumps(texts))
    expected = torch.tensor(json.loads(output.partition("EMBEDDINGS ")[2].splitlines()[0]))
    model = hftl.load(run.output_dir)
    embeddings = torch.tensor([row["embedding"] for row in model.predict(texts)])
    torch.testing.assert_close(embeddings, expected, atol=1e-5, rtol=1e-4)
    (pair,) = model.predict([("cat dog", "the saw")])
    assert pair["similarity"] == pytest.approx(float(embeddings[0] @ embeddings[1]), abs=1e-5)
    test_metrics = {name: value for name, value in metrics.items() if name.startswith("test/")}
    assert evaluate_saved(run.output_dir) == pytest.approx(test_metrics, abs=1e-6)
    adapter = hftl.load(f"{run.output_dir}/adapter").predict(texts)
    torch.testing.assert_close(torch.tensor([row["embedding"] for row in adapter]), embeddings, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("splits", "settings", "message"),
    [
        ({"train": [{"text": "a cat", "score": 1.0}] * 20}, {}, "no second text column"),
        ({"train": [*scored_pairs(20), {"sentence1": "a", "sentence2": "", "score": 1.0}]}, {}, "empty text"),
        (
            {"train": [*scored_pairs(20), {"sentence1": "a", "sentence2": "b", "score": None}]},
            {},
            "without a finite score",
        ),
        ({"train": [row | {"score": 2.0} for row in scored_pairs(20)]}, {}, "are 2 and cannot be learned"),
        ({"train": [row | {"score": "high"} for row in scored_pairs(20)]}, {}, "does not hold numbers"),
        ({"train": scored_pairs(20)}, {"label_column": "scor"}, "Did you mean 'score'"),
        ({"train": scored_pairs(20)}, {"pair_loss": "infonce"}, "needs positive pairs"),
        ({"train": positive_pairs(20)}, {"pair_loss": "cosent"}, "needs scores"),
        ({"train": positive_pairs(20), "validation": positive_pairs(1)}, {}, "validation has a single pair"),
    ],
)
def test_setup_with_invalid_pairs_raises(splits, settings, message, pair_run):
    with pytest.raises(ConfigError, match=message):
        hftl.setup_run(pair_run(splits=splits, **settings), hftl.TextEmbedding)


@pytest.mark.parametrize("loss", ["cosent", "infonce"])
def test_batch_dependent_loss_with_batch_size_one_raises(loss, pair_run):
    rows = scored_pairs(20) if loss == "cosent" else positive_pairs(20)
    run = pair_run(splits={"train": rows}, pair_loss=loss)
    run = replace(run, train=replace(run.train, batch_size_per_device=1, gradient_accumulation_steps=4))
    with pytest.raises(ConfigError, match=r"train\.batch_size_per_device: this loss compares the rows of a batch"):
        hftl.setup_run(run, hftl.TextEmbedding)


def test_labeled_rows_without_score_raises(pair_run, tmp_path):
    from hftl.artifacts.labeled_data import labeled_rows

    run, _, task = hftl.setup_run(pair_run(), hftl.TextEmbedding)
    rows = [*scored_pairs(4), {"sentence1": "a", "sentence2": "b", "score": None}]
    write_lines(tmp_path / "other", test=rows)
    with pytest.raises(hftl.HftlError, match="1 row.*row 4: no score"):
        labeled_rows(task, run.data, str(tmp_path / "other"), "test", {})


def test_invalid_pairs_are_skipped(pair_run):
    invalid = [{"sentence1": "a", "sentence2": " ", "score": 1.0}, {"sentence1": "a", "sentence2": "b", "score": None}]
    run = pair_run(splits={"train": scored_pairs(60) + invalid, "test": scored_pairs(9)}, on_error="skip")
    run, splits, _ = hftl.setup_run(run, hftl.TextEmbedding)
    assert len(splits["train"]) + len(splits["validation"]) == 60
    assert [row["row"] for row in run.quarantine] == [60, 61]


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ("frozen", "'frozen' trains only the head, and this model has no head; allowed"),
        ("probe", "'probe' does not support text_embedding"),
    ],
)
def test_head_only_method_for_text_embedding_raises(method, message, pair_run):
    with pytest.raises(ConfigError, match=message):
        hftl.setup_run(pair_run(method), hftl.TextEmbedding)


def test_setup_rejects_default_pooling_for_embeddings(pair_run):
    with pytest.raises(ConfigError, match="'default' is invalid for text embedding"):
        hftl.setup_run(pair_run(pooling="default"), hftl.TextEmbedding)


def test_build_model_rejects_sentence_transformers_dense(pair_run, tiny_bert, tmp_path):
    import shutil

    folder = shutil.copytree(tiny_bert, tmp_path / "dense")
    modules = [{"type": f"sentence_transformers.models.{name}"} for name in ("Transformer", "Pooling", "Dense")]
    (folder / "modules.json").write_text(json.dumps(modules))
    run, _, task = hftl.setup_run(pair_run(), hftl.TextEmbedding)
    run = replace(run, model=replace(run.model, name=str(folder)))
    with pytest.raises(hftl.HftlError, match="unsupported sentence-transformers modules: Dense"):
        hftl.build_model(run, task.head)
