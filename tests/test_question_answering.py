"""Answers in contexts: SQuAD's numbers, exact search over windows, no answer, what is refused."""

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
def asked(tmp_path_factory):
    return write_questions(tmp_path_factory.mktemp("asked"))


@pytest.fixture(scope="module")
def some_unanswered(tmp_path_factory):
    return write_questions(tmp_path_factory.mktemp("some"), answerable=0.6)


@pytest.fixture
def answer_run(asked, text_run):
    def make(method="full", source=asked, **train):
        return replace(text_run(method, **train), data=hftl.DataConfig(source=str(source)))

    return make


def open_rows(run, *rows, **data):
    run = replace(run, data=hftl.DataConfig(source="given", **data), train=replace(run.train, batch_size_per_device=1))
    return hftl.setup_run(run, hftl.QuestionAnswering, {"train": list(rows), "validation": list(rows)})


def row_of(context="my cat eats", text=("cat",), start=(3,)):
    return {"question": "which", "context": context, "answers": {"text": list(text), "answer_start": list(start)}}


def test_metrics_equal_torchmetrics():
    """Random texts with case, punctuation and articles, several answers each; one accumulator and three uneven ones."""
    from torchmetrics.text import SQuAD

    rng, reference = random.Random(1), SQuAD()
    whole, parts = AnswerMetrics(None, None), [AnswerMetrics(None, None) for _ in range(3)]
    for number in range(300):
        true = [" ".join(rng.choice(WORDS[:8]) for _ in range(rng.randint(1, 4))) for _ in range(rng.randint(1, 3))]
        said = true[0] + "." if rng.random() < 0.2 else " ".join(rng.choice(WORDS) for _ in range(rng.randint(1, 4)))
        for each in (whole, parts[0 if number < 200 else 1 + number % 2]):
            each.add(Answered(said, 0.0), true)
        answers = {"text": true, "answer_start": [0] * len(true)}
        reference.update([{"prediction_text": said, "id": str(number)}], [{"id": str(number), "answers": answers}])
    parts[2].merge(parts[0])
    parts[2].merge(parts[1])
    found, wanted = whole.compute(), reference.compute()
    assert parts[2].compute() == found and 0.1 < found["f1"] < 0.9
    assert found == {name: pytest.approx(float(wanted[name]) / 100, abs=1e-6) for name in ("exact_match", "f1")}


def test_no_answer_is_scored_as_in_squad_2():
    assert answer_scores("", []) == (True, 1.0) and answer_scores("cat", []) == (False, 0.0)
    assert answer_scores("", ["cat"]) == (False, 0.0) and answer_scores("The cat!", ["cat"]) == (True, 1.0)


def test_the_threshold_is_the_best_of_all():
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
def test_the_search_finds_what_trying_every_span_finds(null):
    rng = torch.Generator().manual_seed(0)
    logits = torch.randn(4, 3, 9, 2, generator=rng)
    offsets = torch.full((4, 3, 9, 2), -1)
    windows = torch.tensor([[True, True, True], [True, True, False], [True, False, False], [True, False, False]])
    for row, window in windows[:3].nonzero().tolist():
        place = torch.arange(5) + 3 * window  # windows share two tokens
        offsets[row, window, 2:7] = torch.stack([place * 4, place * 4 + 3], -1)
    for row, found in enumerate(find_spans(logits, offsets, windows, 3, 4, null)):
        spans: dict[tuple[int, int], float] = {}
        every = []
        for window in windows[row].nonzero().flatten().tolist():
            inside = range(2, 7) if offsets[row, window, 2, 0] >= 0 else ()
            for first in inside:
                for last in range(first, min(first + 3, 7)):
                    score = float(logits[row, window, first, 0] + logits[row, window, last, 1])
                    place = int(offsets[row, window, first, 0]), int(offsets[row, window, last, 1])
                    spans[place] = max(score, spans.get(place, -1e9))
                    every.append(score)
        best = sorted(spans.items(), key=lambda item: -item[1])[:4]
        assert [(c.start, c.end) for c in found.candidates] == [place for place, _ in best]
        nulls = [float(logits[row, window, 0].sum()) for window in windows[row].nonzero().flatten()]
        assert found.null_score == pytest.approx(min(nulls), abs=1e-5)
        total = torch.tensor(every + ([min(nulls)] if null else [])).exp().sum()
        shares = [float(torch.tensor(score).exp() / total) for _, score in best]
        assert [c.share for c in found.candidates] == pytest.approx(shares)


@pytest.mark.parametrize("kind", ["asked", "some_unanswered"])
def test_the_task_passes_the_contract(kind, answer_run, request):
    run, splits, task = hftl.setup_run(answer_run(source=request.getfixturevalue(kind)), hftl.QuestionAnswering)
    assert task.target.null == (kind == "some_unanswered")
    check_task(task, splits, run)


def test_an_answer_is_learnt_in_each_window_that_has_all_of_it(answer_run, tiny_bert):
    """Windows of 20 tokens: labels give the answer's text back where they are not (0, 0), and some window has it."""
    from transformers import AutoTokenizer

    tokenizer, rng = AutoTokenizer.from_pretrained(tiny_bert), random.Random(4)
    rows = [question_row(rng, length, answerable=length != 31) for length in (5, 31, 60, 80, 120)]
    context = "my dog the the the the the the cat a " + "the " * 40
    rows.append({"question": "my", "context": context, "answers": {"text": [context[3:40]], "answer_start": [3]}})
    _, splits, task = open_rows(answer_run(), *rows, max_length=20, stride=5)
    examples = task.encode(splits["train"], tokenizer, None, 20).fetch(range(6), 0)
    batch = task.collate(examples)
    assert batch["labels"].shape == (6, *batch["windows"].shape[1:], 2)
    for row, answers in enumerate(batch["answers"]):
        count = int(batch["windows"][row].sum())
        assert (batch["labels"][row, count:] == -100).all()
        learnt = [
            (int(batch["offsets"][row, window, first, 0]), int(batch["offsets"][row, window, last, 1]))
            for window, (first, last) in enumerate(batch["labels"][row, :count].tolist())
            if (first, last) != (0, 0)
        ]
        texts = {batch["contexts"][row][start:end] for start, end in learnt}
        assert texts == set(answers)
    long = task.encode(splits["train"].select([5]), tokenizer, None, 10)
    cut = task.collate(long.fetch([0], 0))
    assert int((cut["labels"].sum(-1) > 0).sum()) == 1  # longer than any window: where most of it stands


def test_padding_has_no_say_in_the_loss(answer_run):
    run, splits, task = hftl.setup_run(answer_run(), hftl.QuestionAnswering)
    model = hftl.build_model(run, task.head).eval()
    rows = task.encode(splits["train"], model.processor, None, 40)
    with torch.no_grad():
        together, alone = (
            torch.cat([task.loss(model(batch["inputs"]), batch) for batch in map(task.collate, batches)])
            for batches in ([rows.fetch([0, 2, 5], 0)], [rows.fetch([row], 0) for row in (0, 2, 5)])
        )
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)


def test_where_windows_end_makes_no_difference_to_a_model_without_context(answer_run):
    """Attention and positions switched off: the answer in a context of one window is that of five windows."""
    run, splits, task = hftl.setup_run(answer_run(), hftl.QuestionAnswering)
    model = hftl.build_model(run, task.head).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "attention.output.dense" in name or "position_embeddings" in name:
                parameter.zero_()
    few = splits["train"].select([10, 15, 20])
    decoded = []
    for length in (64, 18):
        batch = task.collate(task.encode(few, model.processor, None, length).fetch(range(3), 0))
        with torch.no_grad():
            decoded.append(task.decode(model(batch["inputs"]), batch))
    assert batch["windows"].sum(1).max() >= 3
    for one, several in zip(*decoded, strict=True):
        assert len(one["candidates"]) == 5 and {k: one[k] for k in ("answer", "start")} == {
            k: several[k] for k in ("answer", "start")
        }


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (row_of(start=(4,)), r"row 1: answer not at answer_start: says 4, stands at 3 \('cat'\)"),
        (row_of(text=("dog",)), r"row 1: answer not in context: says 3 \('dog'\)"),
        (row_of(text=("",)), "row 1: empty answer"),
        (row_of(start=()), r"row 1: answers and their starts differ in number: 1 text\(s\), 0 answer_start"),
        ({"question": "which", "context": "my cat", "answers": None}, "row 1: no answers"),
        (row_of(context=" "), r"column 'context' has 1 empty text\(s\), at row 1"),
    ],
)
def test_rows_that_cannot_be_used_are_named_or_left_out(row, message, answer_run):
    with pytest.raises(ConfigError, match=message):
        open_rows(answer_run(), row_of(), row)
    run, splits, _ = open_rows(answer_run(), *[row_of()] * 9, row, on_error="skip", max_skipped_fraction=0.2)
    assert [len(rows) for rows in splits.values()] == [9, 9] and run.quarantine[0]["row"] == 9


def test_no_answer_anywhere_is_refused_and_columns_are_never_guessed(answer_run):
    with pytest.raises(ConfigError, match="no question of train has an answer"):
        open_rows(answer_run(), row_of(text=(), start=()))
    with pytest.raises(ConfigError, match=r"data\.label_column: no answers column found"):
        open_rows(answer_run(), {"question": "which", "context": "my cat", "reply": "cat"})


def test_validation_chooses_when_no_answer_is_given_and_it_is_kept(answer_run, some_unanswered, capsys):
    run = answer_run(source=some_unanswered, num_epochs=2, lr=3e-3)
    metrics = run_undrawn("question_answering", run)
    assert {"test/f1", "test/exact_match", "test/answerable_f1", "test/unanswerable_accuracy"} <= set(metrics)
    said = capsys.readouterr().out
    assert "questions without an answer: train" in said and "no answer is given where its score is higher by" in said
    predictor = hftl.load(run.output_dir)
    assert predictor.task.target.threshold != 0.0
    rows = predictor.predict([("my a", "the cat the"), ("my a", "the rope the")])
    assert all({"answer", "start", "end", "confidence", "no_answer", "candidates"} == set(row) for row in rows)
    nothing = [row for row in rows if not row["answer"]]
    assert all(row["start"] == -1 and row["confidence"] == row["no_answer"] for row in nothing)
