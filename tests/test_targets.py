"""Choice of the label target (`hftl.tasks.targets.label_target`), and restoring targets from their state."""

import pytest
from datasets import ClassLabel, Dataset, Features, List, Value

import hftl
from hftl.data.splits import Splits
from hftl.errors import DataError
from hftl.tasks.auto_task import infer_task
from hftl.tasks.registry import MultiLabelTarget, RegressionTarget, SingleLabelTarget
from hftl.tasks.targets.label_target import choose_problem, find_target, restore_target

SINGLE, MULTI, REGRESSION = "single_label_classification", "multi_label_classification", "regression"


def make_splits(columns, features=None, names=None, **config):
    rows = Dataset.from_dict(columns, features=features)
    return Splits({"train": rows}, hftl.DataConfig(**config), names)


def choose(values, feature=None, **config):
    features = None if feature is None else Features({"label": feature})
    return choose_problem(make_splits({"label": values}, features, **config))


@pytest.mark.parametrize(
    ("values", "problem", "reason"),
    [
        (["a", "b"], SINGLE, "string"),
        ([True, False], SINGLE, "bool"),
        ([0.5, 1.0], REGRESSION, "numbers with fractions"),
        ([0.5, None, float("nan")], REGRESSION, "numbers with fractions"),
        ([1.0, 2.0, None], SINGLE, "2 distinct whole numbers"),
        ([1, 5, 3], SINGLE, "set --data.problem_type regression"),
        (list(range(30)) * 2, SINGLE, "30 distinct whole numbers from 0"),
        (list(range(30)), REGRESSION, "30 distinct whole numbers in 30 rows"),
        (list(range(1990, 2020)) * 9, REGRESSION, "with gaps; for classes set --data.problem_type single"),
        ([["a"], [], ["a", "b"]], MULTI, "holds lists"),
    ],
)
def test_choose_problem_by_values_returns_reason(values, problem, reason):
    choice = choose(values)
    assert choice[0] == problem and reason in choice[1], choice


def test_choose_problem_prefers_types_and_settings():
    assert choose([0, 1], ClassLabel(names=["x", "y"]))[0] == SINGLE
    assert choose([[0], [1]], List(ClassLabel(names=["x", "y"])))[0] == MULTI
    assert choose([1, 2, 3], Value("int64"), problem_type=REGRESSION) == (REGRESSION, "data.problem_type")
    assert choose(["a|b", "a"], label_separator="|")[0] == MULTI
    many = {"label": [number for number in range(0, 200, 7) for _ in range(3)]}
    assert choose_problem(make_splits(many))[0] == REGRESSION
    assert choose_problem(make_splits(many, names=[str(n) for n in range(200)]))[0] == SINGLE, "named in labels.json"
    flags = {"a": [0, 1, 1], "b": [True, False, None], "c": [0.0, 1.0, 2.0]}
    assert choose_problem(make_splits(flags, label_columns=["a", "b"]))[0] == MULTI
    assert choose_problem(make_splits(flags, label_columns=["a", "c"]))[0] == REGRESSION
    with pytest.raises(DataError, match="Set only one"):
        choose_problem(make_splits(flags, label_columns=["a"], label_column="b"))


@pytest.mark.parametrize(
    ("values", "feature", "target_type"),
    [
        (["a", "b"] * 12 + ["rare"], Value("string"), SingleLabelTarget),
        ([["a"], ["b"]] * 12 + [["rare"]], List(Value("string")), MultiLabelTarget),
    ],
)
def test_target_accepts_rare_label_in_own_validation_split(values, feature, target_type):
    """Labels only in validation are valid if hftl split it off, and an error if the source provides it."""
    features = Features(text=Value("string"), label=feature)
    rows = Dataset.from_dict({"text": ["x"] * 25, "label": values}, features=features)
    sets = {"train": rows.select(range(20)), "validation": rows.select(range(20, 25))}
    config = hftl.DataConfig(source="here")
    target = target_type.find(Splits(sets, config, cut=True))
    assert not target.problems and target.names == ["a", "b", "rare"]
    assert "missing from train" in target_type.find(Splits(sets, config)).problems[0]


def test_restore_target_preserves_state():
    cells = {SingleLabelTarget: ["a", "b"], MultiLabelTarget: [["a"], ["b"]], RegressionTarget: [0.5, 2.0]}
    for target_type, values in cells.items():
        target = find_target(make_splits({"label": values}))
        assert isinstance(target, target_type) and not target.problems
        restored = restore_target(target.state())
        assert isinstance(restored, target_type)
        assert restored.state() == target.state() and restored.head("x") == target.head("x")


def test_single_label_with_label_columns_is_rejected():
    target = find_target(make_splits({"a": [0, 1]}, label_columns=["a"], problem_type=SINGLE))
    assert any("takes one label column" in problem for problem in target.problems)


def test_infer_task_with_label_columns_returns_classification():
    pairs = {"sentence1": ["a"], "sentence2": ["b"], "good": [1], "new": [0]}
    assert infer_task(make_splits(pairs, label_columns=["good", "new"])) is hftl.TextClassification
