"""What labels are is chosen from the data in one place, and said with the reason."""

import pytest
from datasets import ClassLabel, Dataset, Features, List, Value

import hftl
from hftl.data.splits import Splits
from hftl.errors import DataError
from hftl.tasks.auto_task import infer_task
from hftl.tasks.registry import MultiLabelTarget, RegressionTarget, SingleLabelTarget
from hftl.tasks.targets.label_target import choose_problem, find_target, restore_target

SINGLE, MULTI, NUMBERS = "single_label_classification", "multi_label_classification", "regression"


def splits(columns, features=None, names=None, **config):
    rows = Dataset.from_dict(columns, features=features)
    return Splits({"train": rows}, hftl.DataConfig(**config), names)


def of(values, feature=None, **config):
    features = None if feature is None else Features({"label": feature})
    return choose_problem(splits({"label": values}, features, **config))


@pytest.mark.parametrize(
    ("values", "problem", "why"),
    [
        (["a", "b"], SINGLE, "string"),
        ([True, False], SINGLE, "bool"),
        ([0.5, 1.0], NUMBERS, "numbers with fractions"),
        ([0.5, None, float("nan")], NUMBERS, "numbers with fractions"),
        ([1.0, 2.0, None], SINGLE, "2 different whole numbers"),
        ([1, 5, 3], SINGLE, "say --data.problem_type regression"),
        (list(range(30)) * 2, SINGLE, "30 different whole numbers that count from 0"),
        (list(range(30)), NUMBERS, "30 different whole numbers on 30 rows"),
        (list(range(1990, 2020)) * 9, NUMBERS, "with gaps; where they are classes, say --data.problem_type single"),
        ([["a"], [], ["a", "b"]], MULTI, "holds lists"),
    ],
)
def test_the_choice_and_its_reason(values, problem, why):
    found = of(values)
    assert found[0] == problem and why in found[1], found


def test_types_and_settings_decide_before_values():
    assert of([0, 1], ClassLabel(names=["x", "y"]))[0] == SINGLE
    assert of([[0], [1]], List(ClassLabel(names=["x", "y"])))[0] == MULTI
    assert of([1, 2, 3], Value("int64"), problem_type=NUMBERS) == (NUMBERS, "data.problem_type")
    assert of(["a|b", "a"], label_separator="|")[0] == MULTI
    many = {"label": [number for number in range(0, 200, 7) for _ in range(3)]}
    assert choose_problem(splits(many))[0] == NUMBERS
    assert choose_problem(splits(many, names=[str(n) for n in range(200)]))[0] == SINGLE, "named in labels.json"
    flags = {"a": [0, 1, 1], "b": [True, False, None], "c": [0.0, 1.0, 2.0]}
    assert choose_problem(splits(flags, label_columns=["a", "b"]))[0] == MULTI
    assert choose_problem(splits(flags, label_columns=["a", "c"]))[0] == NUMBERS
    with pytest.raises(DataError, match="Set only one"):
        choose_problem(splits(flags, label_columns=["a"], label_column="b"))


@pytest.mark.parametrize(
    ("column", "kind", "target"),
    [
        (["a", "b"] * 12 + ["rare"], Value("string"), SingleLabelTarget),
        ([["a"], ["b"]] * 12 + [["rare"]], List(Value("string")), MultiLabelTarget),
    ],
)
def test_a_rare_label_may_fall_into_the_validation_cut(column, kind, target):
    """hftl's own cut must not make rows unusable that are none; of a validation split that is given, they are."""
    rows = Dataset.from_dict({"text": ["x"] * 25, "label": column}, features=Features(text=Value("string"), label=kind))
    parts = {"train": rows.select(range(20)), "validation": rows.select(range(20, 25))}
    config = hftl.DataConfig(source="here")
    found = target.find(Splits(parts, config, cut=True))
    assert not found.problems and found.names == ["a", "b", "rare"]
    assert "missing from train" in target.find(Splits(parts, config)).problems[0]


def test_a_target_comes_back_from_its_state():
    for values, kind in (
        (["a", "b"], SingleLabelTarget),
        ([["a"], ["b"]], MultiLabelTarget),
        ([0.5, 2.0], RegressionTarget),
    ):
        found = find_target(splits({"label": values}))
        assert isinstance(found, kind) and not found.problems
        again = restore_target(found.state())
        assert isinstance(again, kind) and again.state() == found.state() and again.head("x") == found.head("x")


def test_a_class_in_one_column_is_not_named_by_several(capsys):
    found = find_target(splits({"a": [0, 1]}, label_columns=["a"], problem_type=SINGLE))
    assert any("stands in one column" in problem for problem in found.problems)


def test_labels_in_several_columns_are_labels_to_the_choice_of_a_task():
    pairs = {"sentence1": ["a"], "sentence2": ["b"], "good": [1], "new": [0]}
    assert infer_task(splits(pairs, label_columns=["good", "new"])) is hftl.TextClassification
