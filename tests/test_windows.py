"""Long texts in windows: nothing is lost, each word counts once, and where a window ends makes no difference."""

import random

import numpy as np
import pytest
import torch
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from window_data import question_row, tagged_row

from hftl.config.schema import ModelConfig, RunConfig
from hftl.errors import DataError, ModelError
from hftl.models.build import build_model
from hftl.models.task_model import HeadSpec
from hftl.preprocessing.sliding_windows import (
    HOME,
    OFFSETS,
    home_windows,
    model_inputs,
    window_pairs,
    window_starts,
    window_words,
)
from hftl.preprocessing.sliding_windows import words_in as place_words

TOKENS = "AutoModelForTokenClassification"


@pytest.fixture(scope="module")
def tokenizer(tiny_bert):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_bert)


@given(st.integers(0, 300), st.integers(1, 40), st.integers(0, 40))
@settings(max_examples=200, deadline=None)
def test_windows_cover_a_text_and_overlap_as_asked(length, room, overlap):
    starts = window_starts(length, room, overlap)
    ends = [min(start + room, length) for start in starts]
    assert starts[0] == 0 and ends[-1] == length
    assert len(starts) == 1 or all(end - start == room for start, end in zip(starts, ends, strict=True))
    shared = [end - start for end, start in zip(ends, starts[1:], strict=False)]
    assert all(each >= min(overlap, room - 1) for each in shared)
    one_fewer = room + (len(starts) - 2) * max(room - overlap, 1)
    assert len(starts) == 1 or one_fewer < length  # no window more than needed


@given(st.integers(1, 200), st.integers(4, 40))
@settings(max_examples=100, deadline=None)
def test_each_word_counts_where_it_has_most_context(length, room):
    starts, places = window_starts(length, room, room // 2), np.arange(length)
    homes = home_windows(places, places, starts, room, length)
    for place, home in zip(places.tolist(), homes.tolist(), strict=True):
        context = [
            min(place - s if s else length, s + room - 1 - place if s + room < length else length) for s in starts
        ]
        assert starts[home] <= place < starts[home] + room and context[home] == max(context)


def test_a_word_longer_than_a_window_belongs_where_it_begins():
    length, room = 160, 62
    starts = window_starts(length, room, room // 4)
    (home,) = home_windows(np.array([50]), np.array([151]), starts, room, length).tolist()
    assert starts[home] <= 50 < starts[home] + room


@pytest.mark.parametrize("stride", [None, 0, 30])
def test_no_word_is_lost_and_each_has_one_place(stride, tokenizer):
    rng = random.Random(0)
    rows = [tagged_row(rng, length)["tokens"] for length in (1, 61, 62, 63, 200)] + [["xyzzy", "", "naïve", "a b"]]
    found = window_words(Dataset.from_dict({"tokens": rows}), tokenizer, "tokens", 64, stride, [])
    examples = found.fetch(range(len(rows)), 0)
    assert [len(example["input_ids"]) for example in examples][:3] == [1, 1, 1]
    assert len(examples[4]["input_ids"]) >= 4 and max(map(len, examples[4]["input_ids"])) == 64
    assert found.lengths.tolist() == [sum(map(len, example["input_ids"])) for example in examples]
    for words, example in zip(rows, examples, strict=True):
        assert len(example[HOME]) == len(words)
        for word, (window, place) in zip(words, example[HOME], strict=True):
            first = tokenizer(word, add_special_tokens=False)["input_ids"][:1]
            assert first == ([example["input_ids"][window][place]] if window >= 0 else [])


def test_a_text_and_its_words_are_placed_alike(tokenizer):
    words = ["my", "dog", "'s", "bread", ":-)"]
    rows = Dataset.from_dict({"tokens": [" ".join(words)]}), Dataset.from_dict({"tokens": [words]})
    first, second = (window_words(each, tokenizer, "tokens", 64, None, []).fetch([0], 0)[0] for each in rows)
    assert first["input_ids"] == second["input_ids"] and first[HOME] == second[HOME]
    text, spans = place_words("  two \n words ")
    assert [text[start:end] for start, end in spans] == ["two", "words"]


def test_every_window_of_a_pair_has_the_question_and_together_they_have_the_context(tokenizer):
    row = question_row(random.Random(1), 150)
    rows = Dataset.from_dict({name: [row[name]] for name in ("question", "context")})
    (example,) = window_pairs(rows, tokenizer, ["question", "context"], 32, 8, []).fetch([0], 0)
    question = tokenizer(row["question"])["input_ids"]
    covered = np.zeros(len(row["context"]), bool)
    for ids, kinds, offsets in zip(
        example["input_ids"], example["token_type_ids"], np.array(example[OFFSETS]).reshape(-1, 32, 2), strict=True
    ):
        assert ids[: len(question)] == question and ids[-1] == tokenizer.sep_token_id and len(ids) == 32
        assert kinds == [0] * len(question) + [1] * (32 - len(question))
        for token, (start, end) in zip(ids[len(question) : -1], offsets[len(question) : -1], strict=True):
            covered[start:end] = True
            assert tokenizer.decode([token]) == row["context"][start:end]
        assert (offsets[: len(question)] == -1).all() and (offsets[-1] == -1).all()
    assert covered[[not letter.isspace() for letter in row["context"]]].all()


def test_a_question_too_long_for_a_window_loses_its_end_and_that_is_said(tokenizer, capsys):
    rows = Dataset.from_dict({"question": ["the a my dog " * 30], "context": ["my cat " * 30]})
    (example,) = window_pairs(rows, tokenizer, ["question", "context"], 32, None, []).fetch([0], 0)
    assert all(len(window) == 32 for window in example["input_ids"])
    assert "1 of 1 questions are longer than half of 32 tokens" in capsys.readouterr().out
    with pytest.raises(DataError, match="no room"):
        window_pairs(rows, tokenizer, ["question", "context"], 3, None, [])


def test_windows_are_cached_by_what_they_depend_on(tokenizer, tmp_path):
    rows = Dataset.from_dict({"tokens": [["my", "dog"] * 50]})
    made = {
        (length, stride): window_words(rows, tokenizer, "tokens", length, stride, []).identity()
        for length, stride in ((64, None), (64, 5), (32, None))
    }
    assert len(set(made.values())) == 3
    tokenizer("used", truncation=True, max_length=3)  # its state is no part of what it computes
    assert window_words(rows, tokenizer, "tokens", 64, None, []).identity() == made[64, None]


def test_a_slow_tokenizer_is_refused(tokenizer):
    class Slow:
        is_fast, name_or_path, model_max_length = False, "old", 64

    with pytest.raises(DataError, match="fast tokenizer"):
        window_words(Dataset.from_dict({"tokens": [["a"]]}), Slow(), "tokens", 64, None, [])


def test_where_windows_end_makes_no_difference_to_a_model_without_context(tiny_bert, tokenizer):
    """Attention and positions switched off: each word's logits hang on itself, so one window says what five do."""
    model = build_model(RunConfig(model=ModelConfig(name=tiny_bert)), HeadSpec(TOKENS, 3, ("O", "B-a", "I-a"), None))
    model.eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "attention.output.dense" in name or "position_embeddings" in name:
                parameter.zero_()
    words = tagged_row(random.Random(3), 60)["tokens"]
    of_length = {}
    for length in (64, 20):
        rows = window_words(Dataset.from_dict({"tokens": [words, words[:7]]}), tokenizer, "tokens", length, None, [])
        examples = rows.fetch([0, 1], 0)
        with torch.no_grad():
            logits = model(model_inputs(examples, tokenizer))["logits"]
        assert logits.shape[:2] == (2, len(examples[0]["input_ids"])) and not logits[1, 1:].any()
        of_length[length] = torch.stack([logits[0, window, place] for window, place in examples[0][HOME]])
    assert len(examples[0]["input_ids"]) >= 3
    torch.testing.assert_close(of_length[64], of_length[20], atol=1e-5, rtol=1e-5)


def test_a_way_of_pooling_is_refused_for_single_tokens(tiny_bert):
    run = RunConfig(model=ModelConfig(name=tiny_bert, pooling="mean"))
    with pytest.raises(ModelError, match=r"model\.pooling"):
        build_model(run, HeadSpec(TOKENS, 3, (), None))


def test_a_checkpoint_that_pools_becomes_the_plain_stock_class(minilm):
    spec = HeadSpec("AutoModelForQuestionAnswering", 2, (), None)
    model = build_model(RunConfig(model=ModelConfig(name=minilm)), spec)
    assert type(model.net).__name__ == "BertForQuestionAnswering" and model.head_modules == ("qa_outputs",)
