"""Sliding windows of `hftl.preprocessing.sliding_windows`; the reference is the tokenizer without windows."""

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
    assign_windows,
    model_inputs,
    window_pairs,
    window_starts,
    window_words,
)
from hftl.preprocessing.sliding_windows import words_in as split_words

TOKENS = "AutoModelForTokenClassification"


@pytest.fixture(scope="module")
def tokenizer(tiny_bert):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_bert)


@given(st.integers(0, 300), st.integers(1, 40), st.integers(0, 40))
@settings(max_examples=200, deadline=None)
def test_window_starts_cover_text_with_minimum_overlap(length, capacity, overlap):
    starts = window_starts(length, capacity, overlap)
    ends = [min(start + capacity, length) for start in starts]
    assert starts[0] == 0 and ends[-1] == length
    assert len(starts) == 1 or all(end - start == capacity for start, end in zip(starts, ends, strict=True))
    overlaps = [end - start for end, start in zip(ends, starts[1:], strict=False)]
    assert all(tokens >= min(overlap, capacity - 1) for tokens in overlaps)
    covered_by_one_fewer = capacity + (len(starts) - 2) * max(capacity - overlap, 1)
    assert len(starts) == 1 or covered_by_one_fewer < length  # minimum number of windows


@given(st.integers(1, 200), st.integers(4, 40))
@settings(max_examples=100, deadline=None)
def test_assign_windows_maximizes_context(length, capacity):
    starts, tokens = window_starts(length, capacity, capacity // 2), np.arange(length)
    windows = assign_windows(tokens, tokens, starts, capacity, length)
    for token, window in zip(tokens.tolist(), windows.tolist(), strict=True):
        context = [
            min(token - s if s else length, s + capacity - 1 - token if s + capacity < length else length)
            for s in starts
        ]
        assert starts[window] <= token < starts[window] + capacity and context[window] == max(context)


def test_assign_windows_long_word_matches_first_token():
    length, capacity = 160, 62
    starts = window_starts(length, capacity, capacity // 4)
    (window,) = assign_windows(np.array([50]), np.array([151]), starts, capacity, length).tolist()
    assert starts[window] <= 50 < starts[window] + capacity


@pytest.mark.parametrize("stride", [None, 0, 30])
def test_window_words_preserves_all_words(stride, tokenizer):
    rng = random.Random(0)
    rows = [tagged_row(rng, length)["tokens"] for length in (1, 61, 62, 63, 200)] + [["xyzzy", "", "naïve", "a b"]]
    encoded = window_words(Dataset.from_dict({"tokens": rows}), tokenizer, "tokens", 64, stride, [])
    examples = encoded.fetch(range(len(rows)), 0)
    assert [len(example["input_ids"]) for example in examples][:3] == [1, 1, 1]
    assert len(examples[4]["input_ids"]) >= 4 and max(map(len, examples[4]["input_ids"])) == 64
    assert encoded.lengths.tolist() == [sum(map(len, example["input_ids"])) for example in examples]
    for words, example in zip(rows, examples, strict=True):
        assert len(example[HOME]) == len(words)
        for word, (window, position) in zip(words, example[HOME], strict=True):
            first = tokenizer(word, add_special_tokens=False)["input_ids"][:1]
            assert first == ([example["input_ids"][window][position]] if window >= 0 else [])


def test_window_words_string_matches_word_list(tokenizer):
    words = ["my", "dog", "'s", "bread", ":-)"]
    datasets = Dataset.from_dict({"tokens": [" ".join(words)]}), Dataset.from_dict({"tokens": [words]})
    first, second = (window_words(rows, tokenizer, "tokens", 64, None, []).fetch([0], 0)[0] for rows in datasets)
    assert first["input_ids"] == second["input_ids"] and first[HOME] == second[HOME]
    text, spans = split_words("  two \n words ")
    assert [text[start:end] for start, end in spans] == ["two", "words"]


def test_window_pairs_cover_context_and_repeat_question(tokenizer):
    row = question_row(random.Random(1), 150)
    rows = Dataset.from_dict({name: [row[name]] for name in ("question", "context")})
    (example,) = window_pairs(rows, tokenizer, ["question", "context"], 32, 8, []).fetch([0], 0)
    question = tokenizer(row["question"])["input_ids"]
    covered = np.zeros(len(row["context"]), bool)
    for ids, type_ids, offsets in zip(
        example["input_ids"], example["token_type_ids"], np.array(example[OFFSETS]).reshape(-1, 32, 2), strict=True
    ):
        assert ids[: len(question)] == question and ids[-1] == tokenizer.sep_token_id and len(ids) == 32
        assert type_ids == [0] * len(question) + [1] * (32 - len(question))
        for token, (start, end) in zip(ids[len(question) : -1], offsets[len(question) : -1], strict=True):
            covered[start:end] = True
            assert tokenizer.decode([token]) == row["context"][start:end]
        assert (offsets[: len(question)] == -1).all() and (offsets[-1] == -1).all()
    assert covered[[not character.isspace() for character in row["context"]]].all()


def test_window_pairs_truncates_and_logs_long_questions(tokenizer, capsys):
    rows = Dataset.from_dict({"question": ["the a my dog " * 30], "context": ["my cat " * 30]})
    (example,) = window_pairs(rows, tokenizer, ["question", "context"], 32, None, []).fetch([0], 0)
    assert all(len(window) == 32 for window in example["input_ids"])
    assert "truncated 1 of 1 questions to half of 32 tokens" in capsys.readouterr().out
    with pytest.raises(DataError, match="no space for text"):
        window_pairs(rows, tokenizer, ["question", "context"], 3, None, [])


def test_window_words_cache_key_covers_settings(tokenizer, tmp_path):
    rows = Dataset.from_dict({"tokens": [["my", "dog"] * 50]})
    keys = {
        (length, stride): window_words(rows, tokenizer, "tokens", length, stride, []).identity()
        for length, stride in ((64, None), (64, 5), (32, None))
    }
    assert len(set(keys.values())) == 3
    tokenizer("used", truncation=True, max_length=3)  # changes the state of the tokenizer, not its output
    assert window_words(rows, tokenizer, "tokens", 64, None, []).identity() == keys[64, None]


def test_window_words_rejects_slow_tokenizer(tokenizer):
    class Slow:
        is_fast, name_or_path, model_max_length = False, "old", 64

    with pytest.raises(DataError, match="fast tokenizer"):
        window_words(Dataset.from_dict({"tokens": [["a"]]}), Slow(), "tokens", 64, None, [])


def test_token_model_without_context_matches_any_window_size(tiny_bert, tokenizer):
    """Without attention and positions, the logits of a word depend on the word only."""
    model = build_model(RunConfig(model=ModelConfig(name=tiny_bert)), HeadSpec(TOKENS, 3, ("O", "B-a", "I-a"), None))
    model.eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "attention.output.dense" in name or "position_embeddings" in name:
                parameter.zero_()
    words = tagged_row(random.Random(3), 60)["tokens"]
    by_length = {}
    for length in (64, 20):
        rows = window_words(Dataset.from_dict({"tokens": [words, words[:7]]}), tokenizer, "tokens", length, None, [])
        examples = rows.fetch([0, 1], 0)
        with torch.no_grad():
            logits = model(model_inputs(examples, tokenizer))["logits"]
        assert logits.shape[:2] == (2, len(examples[0]["input_ids"])) and not logits[1, 1:].any()
        by_length[length] = torch.stack([logits[0, window, position] for window, position in examples[0][HOME]])
    assert len(examples[0]["input_ids"]) >= 3
    torch.testing.assert_close(by_length[64], by_length[20], atol=1e-5, rtol=1e-5)


def test_build_model_rejects_pooling_for_token_tasks(tiny_bert):
    run = RunConfig(model=ModelConfig(name=tiny_bert, pooling="mean"))
    with pytest.raises(ModelError, match=r"model\.pooling"):
        build_model(run, HeadSpec(TOKENS, 3, (), None))


def test_build_model_embedding_checkpoint_returns_qa_class(minilm):
    spec = HeadSpec("AutoModelForQuestionAnswering", 2, (), None)
    model = build_model(RunConfig(model=ModelConfig(name=minilm)), spec)
    assert type(model.net).__name__ == "BertForQuestionAnswering" and model.head_modules == ("qa_outputs",)
