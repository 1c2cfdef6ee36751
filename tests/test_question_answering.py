"""Question answering: metrics against torchmetrics, span search against brute force, unanswerable questions, errors."""

import random
from dataclasses import replace

import pytest
import torch
from conftest import run_undrawn
from window_data import question_row, write_questions

import hftl
from hftl.errors import ConfigError
from hftl.run.testing import check_task
from hftl.tasks.targets.question_answering.metrics import Answered, AnswerMetrics, answer_scores
from hftl.tasks.targets.question_answering.span_search import find_spans

WORDS = "cat Dog. it's New-York 1,000 über (big) red the a An answer".split()


@pytest.fixture(scope="module")
def answerable(tmp_path_factory):
    return write_questions(tmp_path_factory.mktemp("answerable"))


@pytest.fixture(scope="module")
def partly_answerable(tmp_path_factory):
    return write_questions(tmp_path_factory.mktemp("partly_answerable"), answerable=0.6)


@pytest.fixture
def answer_run(answerable, text_run):
    def make(method="full", source=answerable, **train):
        return replace(text_run(method, **train), data=hftl.DataConfig(source=str(source)))

    return make


def setup_rows(run, *rows, **data):
    run = replace(run, data=hftl.DataConfig(source="given", **data), train=replace(run.train, batch_size_per_device=1))
    return hftl.setup_run(run, hftl.QuestionAnswering, {"train": list(rows), "validation": list(rows)})


def make_row(context="my cat eats", text=("cat",), start=(3,)):
    return {"question": "which", "context": context, "answers": {"text": list(text), "answer_start": list(start)}}


def test_answer_metrics_match_torchmetrics():
    """Random texts with case, punctuation, articles and several answers, on one and on three merged accumulators."""
    from torchmetrics.text import SQuAD

    rng, reference = random.Random(1), SQuAD()
    single, metrics = AnswerMetrics(None, None), [AnswerMetrics(None, None) for _ in range(3)]
    for number in range(300):
        true = [" ".join(rng.choice(WORDS[:8]) for _ in range(rng.randint(1, 4))) for _ in range(rng.randint(1, 3))]
        text = true[0] + "." if rng.random() < 0.2 else " ".join(rng.choice(WORDS) for _ in range(rng.randint(1, 4)))
        for metric in (single, metrics[0 if number < 200 else 1 + number % 2]):
            metric.add(Answered(text, 0.0), true)
        answers = {"text": true, "answer_start": [0] * len(true)}
        reference.update([{"prediction_text": text, "id": str(number)}], [{"id": str(number), "answers": answers}])
    metrics[2].merge(metrics[0])
    metrics[2].merge(metrics[1])
    scores, expected = single.compute(), reference.compute()
    assert metrics[2].compute() == scores and 0.1 < scores["f1"] < 0.9
    assert scores == {name: pytest.approx(float(expected[name]) / 100, abs=1e-6) for name in ("exact_match", "f1")}


def test_answer_scores_without_answer_follow_squad_2():
    assert answer_scores("", []) == (True, 1.0) and answer_scores("cat", []) == (False, 0.0)
    assert answer_scores("", ["cat"]) == (False, 0.0) and answer_scores("The cat!", ["cat"]) == (True, 1.0)


def test_best_threshold_maximizes_f1():
    rng = random.Random(2)
    for _ in range(30):
        metric = AnswerMetrics(None, 0.0)
        for _ in range(rng.randint(1, 12)):
            true = ["cat"] if rng.random() < 0.6 else []
            metric.add(Answered(rng.choice(["cat", "cat dog", "dog"]), rng.choice([-2.0, -1.0, 0.5, 3.0])), true)
        scores = {}
        for threshold in (-3.0, -1.5, -0.25, 1.75, 4.0):
            metric.threshold = threshold
            scores[threshold] = metric.compute()["f1"]
        metric.threshold = metric.best_threshold()
        assert metric.compute()["f1"] == pytest.approx(max(scores.values()))
    assert AnswerMetrics(None, 0.0).best_threshold() == 0.0


@pytest.mark.parametrize("null", [False, True])
def test_find_spans_matches_brute_force(null):
    rng = torch.Generator().manual_seed(0)
    logits = torch.randn(4, 3, 9, 2, generator=rng)
    offsets = torch.full((4, 3, 9, 2), -1)
    windows = torch.tensor([[True, True, True], [True, True, False], [True, False, False], [True, False, False]])
    for row, window in windows[:3].nonzero().tolist():
        words = torch.arange(5) + 3 * window  # windows overlap by two tokens
        offsets[row, window, 2:7] = torch.stack([words * 4, words * 4 + 3], -1)
    for row, result in enumerate(find_spans(logits, offsets, windows, 3, 4, null)):
        spans: dict[tuple[int, int], float] = {}
        scores = []
        for window in windows[row].nonzero().flatten().tolist():
            context = range(2, 7) if offsets[row, window, 2, 0] >= 0 else ()
            for first in context:
                for last in range(first, min(first + 3, 7)):
                    score = float(logits[row, window, first, 0] + logits[row, window, last, 1])
                    span = int(offsets[row, window, first, 0]), int(offsets[row, window, last, 1])
                    spans[span] = max(score, spans.get(span, -1e9))
                    scores.append(score)
        best = sorted(spans.items(), key=lambda item: -item[1])[:4]
        assert [(c.start, c.end) for c in result.candidates] == [span for span, _ in best]
        null_scores = [float(logits[row, window, 0].sum()) for window in windows[row].nonzero().flatten()]
        assert result.null_score == pytest.approx(min(null_scores), abs=1e-5)
        total = torch.tensor(scores + ([min(null_scores)] if null else [])).exp().sum()
        probabilities = [float(torch.tensor(score).exp() / total) for _, score in best]
        assert [c.probability for c in result.candidates] == pytest.approx(probabilities)


@pytest.mark.parametrize("questions", ["answerable", "partly_answerable"])
def test_check_task_accepts_question_answering(questions, answer_run, request):
    run, splits, task = hftl.setup_run(answer_run(source=request.getfixturevalue(questions)), hftl.QuestionAnswering)
    assert task.target.null == (questions == "partly_answerable")
    check_task(task, splits, run)


def test_labels_mark_answer_in_each_complete_window(answer_run, tiny_bert):
    """Windows of 20 tokens; labels other than (0, 0) select the text of the answer."""
    from transformers import AutoTokenizer

    tokenizer, rng = AutoTokenizer.from_pretrained(tiny_bert), random.Random(4)
    rows = [question_row(rng, length, answerable=length != 31) for length in (5, 31, 60, 80, 120)]
    context = "my dog the the the the the the cat a " + "the " * 40
    rows.append({"question": "my", "context": context, "answers": {"text": [context[3:40]], "answer_start": [3]}})
    _, splits, task = setup_rows(answer_run(), *rows, max_length=20, stride=5)
    examples = task.encode(splits["train"], tokenizer, None, 20).fetch(range(6), 0)
    batch = task.collate(examples)
    assert batch["labels"].shape == (6, *batch["windows"].shape[1:], 2)
    for row, answers in enumerate(batch["answers"]):
        count = int(batch["windows"][row].sum())
        assert (batch["labels"][row, count:] == -100).all()
        labeled = [
            (int(batch["offsets"][row, window, first, 0]), int(batch["offsets"][row, window, last, 1]))
            for window, (first, last) in enumerate(batch["labels"][row, :count].tolist())
            if (first, last) != (0, 0)
        ]
        texts = {batch["contexts"][row][start:end] for start, end in labeled}
        assert texts == set(answers)
    short_windows = task.encode(splits["train"].select([5]), tokenizer, None, 10)
    batch = task.collate(short_windows.fetch([0], 0))
    assert int((batch["labels"].sum(-1) > 0).sum()) == 1  # no window holds the answer: the largest part is labeled


def test_loss_is_independent_of_padding(answer_run):
    run, splits, task = hftl.setup_run(answer_run(), hftl.QuestionAnswering)
    model = hftl.build_model(run, task.head).eval()
    rows = task.encode(splits["train"], model.processor, None, 40)
    with torch.no_grad():
        padded, unpadded = (
            torch.cat([task.loss(model(batch["inputs"]), batch) for batch in map(task.collate, batches)])
            for batches in ([rows.fetch([0, 2, 5], 0)], [rows.fetch([row], 0) for row in (0, 2, 5)])
        )
    torch.testing.assert_close(padded, unpadded, atol=1e-5, rtol=1e-5)


def test_answer_is_independent_of_window_size(answer_run):
    """Without attention and positions, a context split into windows has the same answer as in one window."""
    run, splits, task = hftl.setup_run(answer_run(), hftl.QuestionAnswering)
    model = hftl.build_model(run, task.head).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "attention.output.dense" in name or "position_embeddings" in name:
                parameter.zero_()
    rows = splits["train"].select([10, 15, 20])
    decoded = []
    for length in (64, 18):
        batch = task.collate(task.encode(rows, model.processor, None, length).fetch(range(3), 0))
        with torch.no_grad():
            decoded.append(task.decode(model(batch["inputs"]), batch))
    assert batch["windows"].sum(1).max() >= 3
    for single, split in zip(*decoded, strict=True):
        assert len(single["candidates"]) == 5
        assert (single["answer"], single["start"]) == (split["answer"], split["start"])


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (make_row(start=(4,)), r"row 1: answer not at answer_start: answer_start is 4, text is at 3 \('cat'\)"),
        (make_row(text=("dog",)), r"row 1: answer not in context: answer_start is 3 \('dog'\)"),
        (make_row(text=("",)), "row 1: empty answer"),
        (make_row(start=()), r"row 1: unequal numbers of answers and starts: 1 text\(s\), 0 answer_start"),
        ({"question": "which", "context": "my cat", "answers": None}, "row 1: no answers"),
        (make_row(context=" "), r"column 'context' has 1 empty text\(s\), at row 1"),
    ],
)
def test_invalid_answers_raise_or_are_skipped(row, message, answer_run):
    with pytest.raises(ConfigError, match=message):
        setup_rows(answer_run(), make_row(), row)
    run, splits, _ = setup_rows(answer_run(), *[make_row()] * 9, row, on_error="skip", max_skipped_fraction=0.2)
    assert [len(rows) for rows in splits.values()] == [9, 9] and run.quarantine[0]["row"] == 9


def test_setup_without_answers_or_answer_column_raises(answer_run):
    with pytest.raises(ConfigError, match="no training question has an answer"):
        setup_rows(answer_run(), make_row(text=(), start=()))
    with pytest.raises(ConfigError, match=r"data\.label_column: no answers column found"):
        setup_rows(answer_run(), {"question": "which", "context": "my cat", "reply": "cat"})


def test_saved_model_preserves_tuned_threshold(answer_run, partly_answerable, capsys):
    run = answer_run(source=partly_answerable, num_epochs=2, lr=3e-3)
    metrics = run_undrawn("question_answering", run)
    assert {"test/f1", "test/exact_match", "test/answerable_f1", "test/unanswerable_accuracy"} <= set(metrics)
    output = capsys.readouterr().out
    assert "unanswerable questions: train" in output and "with the highest F1 on validation" in output
    predictor = hftl.load(run.output_dir)
    assert predictor.task.target.threshold != 0.0
    rows = predictor.predict([("my a", "the cat the"), ("my a", "the rope the")])
    assert all({"answer", "start", "end", "confidence", "no_answer", "candidates"} == set(row) for row in rows)
    unanswered = [row for row in rows if not row["answer"]]
    assert all(row["start"] == -1 and row["confidence"] == row["no_answer"] for row in unanswered)
