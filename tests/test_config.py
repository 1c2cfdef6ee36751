"""Run configuration: precedence of flags, YAML and defaults, error messages, defaults, and import time."""

import json
import math
import os
import resource
import subprocess
import sys
from dataclasses import replace

import pytest
import yaml
from conftest import ROOT

from hftl.config.allowed_values import value_problems
from hftl.config.defaults import resolve
from hftl.config.parse import dump_config, load_config, parse_config
from hftl.config.schema import (
    AdaptConfig,
    AugmentConfig,
    CheckpointConfig,
    DataConfig,
    FrozenConfig,
    LoraConfig,
    ModelConfig,
    ProbeConfig,
    RunConfig,
    TrainConfig,
    leaves,
)
from hftl.errors import ConfigError

# public settings: add new ones here
FLAGS = [
    "adapt.batch_norm",
    "adapt.frozen.cache",
    "adapt.frozen.lr_factors",
    "adapt.frozen.num_seeds",
    "adapt.frozen.num_views",
    "adapt.frozen.weight_decays",
    "adapt.image_method",
    "adapt.lora.alpha",
    "adapt.lora.dropout",
    "adapt.lora.r",
    "adapt.lora.target_modules",
    "adapt.method",
    "adapt.probe.num_folds",
    "adapt.probe.classifier",
    "adapt.text_method",
    "checkpoint.save_minutes",
    "checkpoint.save_steps",
    "checkpoint.total_limit",
    "data.augment.auto_augment",
    "data.augment.color_jitter",
    "data.augment.crop_scale",
    "data.augment.hflip",
    "data.categorical_columns",
    "data.ignore_columns",
    "data.ignore_index",
    "data.image_column",
    "data.label_column",
    "data.label_columns",
    "data.label_separator",
    "data.max_answer_length",
    "data.max_length",
    "data.max_pixels",
    "data.max_skipped_fraction",
    "data.num_workers",
    "data.numeric_columns",
    "data.on_error",
    "train.pair_loss",
    "data.problem_type",
    "data.revision",
    "data.seed",
    "data.source",
    "data.stride",
    "data.subset",
    "data.text_column",
    "data.text_pair_column",
    "data.text_template",
    "data.max_train_samples_per_class",
    "data.validation_fraction",
    "data.worker_timeout",
    "model.decoder_channels",
    "model.detector.decoder_layers",
    "model.detector.num_feature_levels",
    "model.detector.num_queries",
    "model.detector.d_model",
    "model.dropout",
    "model.fusion",
    "model.fusion_dim",
    "model.image_size",
    "model.modality_dropout",
    "model.name",
    "model.pooling",
    "model.pretrained",
    "model.projection_dim",
    "model.revision",
    "model.text_name",
    "model.trust_remote_code",
    "output_dir",
    "overwrite",
    "hub.private",
    "hub.repo_id",
    "hub.verify",
    "resume",
    "task",
    "train.batch_size_per_device",
    "train.metric_for_best_model",
    "train.early_stopping_patience",
    "train.eval_steps",
    "train.gradient_accumulation_steps",
    "train.freeze_backbone_ratio",
    "train.head_lr",
    "train.logging_steps",
    "train.lr",
    "train.max_grad_norm",
    "train.max_nonfinite_steps",
    "train.max_steps",
    "train.metrics",
    "train.num_epochs",
    "train.num_threads",
    "train.on_nonfinite",
    "train.on_oom",
    "train.lr_scheduler_type",
    "train.seed",
    "train.timeout_minutes",
    "train.trackers",
    "train.warmup_ratio",
    "train.weight_decay",
]


@pytest.fixture
def yaml_file(tmp_path):
    def write(text: str, name: str = "run.yaml"):
        (tmp_path / name).write_text(text)
        return f"--config={tmp_path / name}"

    return write


def problems_of(*argv: str) -> list[str]:
    """Returns the problems of invalid arguments."""
    with pytest.raises(ConfigError) as caught:
        parse_config(RunConfig(), list(argv))
    for problem in caught.value.problems:
        assert problem in str(caught.value)
    return caught.value.problems


def valid(**changes) -> RunConfig:
    return replace(RunConfig(DataConfig(source="images"), ModelConfig(name="resnet18")), **changes)


def test_settings_match_public_list():
    assert sorted(leaves(RunConfig())) == sorted(FLAGS)


def test_parse_config_flags_override_yaml_and_defaults(yaml_file):
    defaults = replace(RunConfig(), train=TrainConfig(lr=1.0, seed=1, logging_steps=1))
    run = parse_config(defaults, [yaml_file("train: {lr: 2.0, seed: 2}"), "--train.seed", "3"])
    assert (run.train.logging_steps, run.train.lr, run.train.seed) == (1, 2.0, 3)


def test_parse_config_flags_override_yaml_in_any_order(yaml_file):
    file = yaml_file("train: {lr: 2.0, seed: 2}")
    before = parse_config(RunConfig(), ["--train.seed", "3", file])
    assert before == parse_config(RunConfig(), [file, "--train.seed", "3"])
    assert before == parse_config(RunConfig(), ["--train.seed=3", "--config", file.partition("=")[2]])
    assert before.train.seed == 3


def test_parse_config_later_file_overrides_per_key(yaml_file):
    run = parse_config(
        RunConfig(), [yaml_file("train: {lr: 1, seed: 1}", "a.yaml"), yaml_file("train: {lr: 2}", "b.yaml")]
    )
    assert (run.train.lr, run.train.seed) == (2.0, 1)


@pytest.mark.parametrize("text", ["3e-4", "3.0e-4", "0.0003", "3E-04"])
def test_parse_config_reads_scientific_notation_as_float(text, yaml_file):
    lr = parse_config(RunConfig(), [yaml_file(f"train:\n  lr: {text}\n")]).train.lr
    assert isinstance(lr, float) and lr == 3e-4
    assert parse_config(RunConfig(), ["--train.lr", text]).train.lr == 3e-4


def test_parse_config_names_match_in_yaml_and_flags(yaml_file):
    expected = RunConfig(adapt=AdaptConfig(method="lora", lora=LoraConfig(r=3, target_modules=["qkv", "fc.*"])))
    nested = "adapt:\n  method: lora\n  lora:\n    r: 3\n    target_modules: [qkv, 'fc.*']\n"
    flags = ["--adapt.method=lora", "--adapt.lora.r", "3", "--adapt.lora.target_modules", "[qkv,fc.*]"]
    assert parse_config(RunConfig(), [yaml_file(nested)]) == parse_config(RunConfig(), flags) == expected


@pytest.mark.parametrize("text", ["", "# train:\n", "train:\n  # lr: 1\ndata:\n  augment:\n"])
def test_parse_config_empty_yaml_preserves_defaults(text, yaml_file):
    assert parse_config(RunConfig(), [yaml_file(text)]) == RunConfig()


@pytest.mark.parametrize("value", ["2024", "1e3", "1234567", "en"])
def test_parse_config_string_settings_accept_numbers(value, yaml_file):
    """Commit hashes may consist of digits; subsets are often years."""
    run = parse_config(RunConfig(), [yaml_file(f"data: {{subset: {value}}}\nmodel: {{revision: {value}}}")])
    assert run.data.subset == run.model.revision == value
    assert parse_config(RunConfig(), [f"--data.subset={value}", "--model.revision", value]) == run


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("train.num_epoch", "train.num_epochs"),
        ("train.LR", "train.lr"),
        ("lr", "train.lr"),
        ("data.max-length", "data.max_length"),
        ("data.augment.hflp", "data.augment.hflip"),
        ("adapt.lora.target_module", "adapt.lora.target_modules"),
        ("adapt.r", "adapt.lora.r"),
        ("lora.alpha", "adapt.lora.alpha"),
        ("train.learning_rate", "train.lr"),
        ("train.batch_size", "train.batch_size_per_device"),
        ("per_device_train_batch_size", "train.batch_size_per_device"),
        ("ouput_dir", "output_dir"),
    ],
)
def test_parse_config_unknown_key_raises_with_suggestion(key, nearest, yaml_file, tmp_path):
    [from_flag] = problems_of(f"--{key}", "1")
    assert from_flag == f"command line: there is no setting '{key}'. Did you mean '{nearest}'? --help lists all."
    nested = {}
    *groups, last = key.split(".")
    inner = nested
    for group in groups:
        inner = inner.setdefault(group, {})
    inner[last] = 1
    [from_yaml] = problems_of(yaml_file(yaml.safe_dump(nested)))
    assert from_yaml == from_flag.replace("command line", str(tmp_path / "run.yaml"))


def test_parse_config_dissimilar_key_raises_without_suggestion():
    [problem] = problems_of("--xyzzy", "1")
    assert "Did you mean" not in problem and "'xyzzy'" in problem


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("train.lr", "fast", "a number or null"),
        ("train.lr", "nan", "a number or null"),
        ("train.lr", "None", "a number or null"),
        ("train.seed", "1.5", "an integer"),
        ("train.max_steps", "ten", "an integer or null"),
        ("adapt.method", "loar", "one of full, frozen, lora, probe"),
        ("model.pretrained", "maybe", "true or false"),
        ("train.metrics", "f1", "a list such as [a,b]"),
    ],
)
def test_parse_config_wrong_type_raises_with_allowed_values(key, value, expected, yaml_file, tmp_path):
    message = f"{key}: {value!r} is invalid; allowed: {expected}."
    assert problems_of(f"--{key}", value) == [f"command line: {message}"]
    group, _, last = key.rpartition(".")
    assert problems_of(yaml_file(f"{group}: {{{last}: {value}}}")) == [f"{tmp_path / 'run.yaml'}: {message}"]


@pytest.mark.parametrize("argv", [["--model", "resnet50"], ["--data", "no/such/folder"], ["--train=5"]])
def test_parse_config_value_for_group_raises_with_settings(argv, yaml_file):
    group, value = argv[0].lstrip("-").partition("=")[0], argv[-1].rpartition("=")[2]
    for problems in (problems_of(*argv), problems_of(yaml_file(f"{group}: {value}"))):
        assert len(problems) == 1 and f"'{group}' is a group" in problems[0] and value in problems[0]
        assert all(flag in problems[0] for flag in FLAGS if flag.startswith(group + "."))


def test_parse_config_raises_all_problems_at_once(yaml_file):
    file = yaml_file(
        "train: {lr: fast, batchsize: 8, logging_steps: 5}\ndata: {augment: {hflp: 1, hflip: 0}}\nfoo: 3\n"
    )
    problems = problems_of("--train.seed", "x", file, "--model.name", "resnet18", "stray", "--train.num_epoch=3")
    values = ["'fast'", "'train.batchsize'", "'data.augment.hflp'", "'foo'", "'x'", "'stray'", "'train.num_epoch'"]
    assert len(problems) == len(values)
    for value in values:
        assert sum(value in problem for problem in problems) == 1, value
    assert not any("logging_steps" in problem or "resnet18" in problem for problem in problems)


def test_parse_config_defer_returns_problems(yaml_file):
    run = parse_config(
        RunConfig(), [yaml_file("train: {lr: fast, seed: 7}"), "--data.nope=1", "--data.seed=3"], defer=True
    )
    assert len(run.problems) == 2
    assert (run.train.seed, run.data.seed) == (7, 3)


@pytest.mark.parametrize(
    ("text", "expected"),
    [("train: {lr: 1e-3", "line 1"), ("a: 1\nb: [", "line 2"), ("- a\n- b\n", "a list"), ("just words", "a str")],
)
def test_parse_config_invalid_file_raises_with_path(text, expected, yaml_file, tmp_path):
    [problem] = problems_of(yaml_file(text))
    assert problem.startswith(str(tmp_path / "run.yaml")) and expected in problem


def test_parse_config_missing_file_raises_with_suggestion(yaml_file, tmp_path):
    yaml_file("{}", "letters.yaml")
    [problem] = problems_of("--config", str(tmp_path / "leters.yaml"))
    assert str(tmp_path / "leters.yaml") in problem and "Did you mean 'letters.yaml'?" in problem
    assert "directory" in problems_of("--config", str(tmp_path))[0]
    assert "--config: is empty" in problems_of("--config")[0]


def test_parse_config_boolean_flag_needs_no_value():
    for argv in (["--overwrite"], ["--overwrite", "--train.seed", "0"], ["--overwrite", "true"], ["--overwrite=true"]):
        assert parse_config(RunConfig(), argv).overwrite is True
    assert parse_config(RunConfig(overwrite=True), ["--overwrite", "false"]).overwrite is False
    assert parse_config(RunConfig(), ["--model.pretrained=false", "--overwrite"]).model.pretrained is False


def test_dump_config_round_trip_preserves_values(tmp_path):
    run = RunConfig(
        DataConfig(
            source="hub/name",
            subset="2024",
            revision="1e3",
            image_column="img",
            text_column="a: b",
            text_pair_column="x # y",
            label_column="  lead",
            label_columns=["yes", "1e3"],
            label_separator="|",
            problem_type="regression",
            validation_fraction=1e-7,
            max_train_samples_per_class=3,
            seed=4,
            max_length=5,
            augment=AugmentConfig(1, 0, 0.5, "rand-m9"),
            num_workers=0,
            worker_timeout=1.5,
            max_pixels=1000,
            on_error="skip",
            max_skipped_fraction=0.5,
            ignore_columns=["1", "a,b"],
            ignore_index=-1,
            text_template="{a}: {b}",
            numeric_columns=["1e3"],
            categorical_columns=[],
        ),
        ModelConfig(
            name="ünï",
            pretrained=False,
            pooling="mean",
            revision="true",
            image_size=[32, 48],
            dropout=0.1,
            trust_remote_code=True,
            text_name="true/1",
            fusion="gated",
            fusion_dim=64,
        ),
        AdaptConfig(
            method="lora",
            lora=LoraConfig(2, 3.5, 0.25, ["a.*[0-9]", "1", "null"]),
            frozen=FrozenConfig(False, 2, [1.0, 1e-9], [0.5], 3),
            probe=ProbeConfig("knn", 3),
        ),
        TrainConfig(
            0.5,
            7,
            1e-30,
            3e-4,
            num_threads=3,
            metrics=["a,b"],
            trackers=[],
            lr_scheduler_type="cosine",
            metric_for_best_model="macro_f1",
        ),
        CheckpointConfig(None, 7, 1),
        output_dir="12",
        overwrite=True,
        resume="auto",
    )
    unchanged = [name for name, value in leaves(run).items() if value == leaves(RunConfig())[name]]
    assert len(unchanged) < len(FLAGS) / 3
    for each in (run, RunConfig(), resolve(valid(), "image")):
        (tmp_path / "config.yaml").write_text(dump_config(each))
        assert load_config(tmp_path / "config.yaml") == each


@pytest.mark.parametrize("text", ["123", "12345e7", "true", "yes", "0x10", "2024-01-01", "[a]", "'q'", "a\nb", ""])
def test_dump_config_preserves_strings_of_other_types(text, tmp_path):
    run = RunConfig(DataConfig(source=text, subset=text), output_dir=text)
    (tmp_path / "config.yaml").write_text(dump_config(run))
    assert load_config(tmp_path / "config.yaml") == run


def test_dump_config_skips_problems():
    assert "problems" not in yaml.safe_load(dump_config(parse_config(RunConfig(), ["--nope=1"], defer=True)))


def test_recipe_configs_are_valid():
    folder = ROOT / "recipes" / "configs"
    files = sorted(folder.rglob("*.yaml"))
    on_disk = [name for _, _, names in os.walk(folder) for name in names if name.endswith((".yaml", ".yml"))]
    assert len(files) == len(on_disk) > 0
    for file in files:
        run = load_config(file)  # most of them leave the data to the user
        run = replace(run, data=replace(run.data, source=run.data.source or "data"))
        assert not value_problems(replace(run, model=replace(run.model, name=run.model.name or "model"))), file


@pytest.mark.parametrize(
    ("name", "good", "bad"),
    [
        ("data.augment.crop_scale", [1e-3, 1], [0, -0.1, 1.01]),
        ("data.augment.hflip", [0, 1], [-0.01, 1.01]),
        ("data.augment.color_jitter", [0, 2], [-0.1]),
        ("data.validation_fraction", [0, 0.99], [1, -0.1]),
        ("data.max_train_samples_per_class", [1, None], [0, -1]),
        ("data.seed", [0, 2**32 - 1], [-1, 2**32]),
        ("data.max_length", [2, None], [1, 0]),
        ("data.num_workers", [0, None], [-1]),
        ("model.image_size", [8, None, [180, 240]], [7, 0, -224, [8], [8, 7], [8, 8, 8], [8.5, 9]]),
        ("model.detector.d_model", [32, 256], [0, 16, 100]),
        ("model.detector.num_feature_levels", [1, 3], [0, 4]),
        ("model.dropout", [0, 0.99, None], [1, -0.1]),
        ("adapt.lora.r", [1], [0, -8]),
        ("adapt.lora.alpha", [1e-3], [0, -1]),
        ("adapt.lora.dropout", [0], [1, -0.1]),
        ("train.num_epochs", [0.1, None], [0, -1]),
        ("train.freeze_backbone_ratio", [0, 0.5, None], [-0.1, 1]),
        ("train.max_steps", [1, None], [0]),
        ("train.num_threads", [1, None], [0, -1, 5000]),
        ("train.lr", [0, 1e-3, None], [-1e-3, math.nan, math.inf]),
        ("train.head_lr", [0, None], [-1e-3, math.nan, math.inf]),
        ("train.weight_decay", [0], [-0.1, math.nan, math.inf]),
        ("train.batch_size_per_device", [1], [0, -8]),
        ("train.gradient_accumulation_steps", [1], [0]),
        ("train.max_grad_norm", [0], [-1, math.nan]),
        ("train.warmup_ratio", [0, 1], [-0.1, 1.1]),
        ("train.seed", [0, 2**32 - 1], [-1, 2**32]),
        ("train.eval_steps", [1, None], [0]),
        ("train.logging_steps", [1], [0]),
        ("train.early_stopping_patience", [1, None], [0]),
        ("train.lr", [], ["3e-4", True]),
        ("model.pooling", ["cls"], ["max"]),
        ("adapt.method", ["lora"], ["loar"]),
        ("adapt.batch_norm", ["frozen"], ["freeze"]),
        ("train.lr_scheduler_type", ["cosine"], ["cosin"]),
        ("data.source", ["images"], [""]),
        ("model.name", ["resnet18"], [""]),
    ],
)
def test_value_problems_returns_out_of_range_values(name, good, bad):
    for value in good:
        assert value_problems(with_value(valid(), name, value)) == []
    for value in bad:
        [problem] = value_problems(with_value(valid(), name, value))
        assert problem.startswith(name) and str(value) in problem


def test_value_problems_returns_one_problem_per_value():
    run = valid(train=TrainConfig(lr=-1, seed=-1, lr_scheduler_type="cosin"), model=ModelConfig())
    problems = value_problems(run)
    assert len(problems) == 4 and any("Did you mean 'cosine'?" in problem for problem in problems)


def with_value(config, path, value):
    name, _, rest = path.partition(".")
    return replace(config, **{name: with_value(getattr(config, name), rest, value) if rest else value})


def test_resolve_fills_defaults_by_method_and_modality():
    rates = {}
    for modality in ("image", "text"):
        for method, pretrained in (("full", True), ("frozen", True), ("lora", True), ("full", False)):
            run = valid(adapt=AdaptConfig(method=method), model=ModelConfig("net", pretrained=pretrained))
            train = resolve(run, modality).train
            assert None not in (train.lr, train.head_lr, train.num_epochs)
            assert train.num_epochs > 0 and train.head_lr > 0
            rates[modality, method, pretrained] = (train.lr, train.head_lr, train.num_epochs)
    assert rates["image", "frozen", True][0] == 0.0, "a frozen backbone has no learning rate"
    for modality in ("image", "text"):
        lora, full = rates[modality, "lora", True], rates[modality, "full", True]
        scratch = rates[modality, "full", False]
        assert lora[0] > full[0], "adapters have larger learning rates than full training"
        assert full[1] > full[0], "a new head has a larger learning rate than a pretrained backbone"
        assert scratch[0] == scratch[1], "random weights need no smaller learning rate than the head"
    assert rates["image", "full", True] != rates["text", "full", True]


def test_resolve_preserves_set_values():
    complete = valid(
        train=TrainConfig(lr=0.125, head_lr=0.5, num_epochs=2, freeze_backbone_ratio=0, seed=5), output_dir="here"
    )
    assert resolve(complete, "image") == complete
    partial = valid(train=TrainConfig(num_epochs=2))
    filled = resolve(partial, "text")
    changed = {name for name, value in leaves(filled).items() if value != leaves(partial)[name]}
    assert changed == {"train.lr", "train.head_lr", "output_dir"}
    assert resolve(filled, "text") == filled


@pytest.mark.parametrize("modality", ["image", "text"])
@pytest.mark.parametrize("method", ["full", "lora"])
def test_resolve_scales_head_lr_with_backbone_lr(method, modality):
    def rates(lr):
        train = resolve(valid(adapt=AdaptConfig(method=method), train=TrainConfig(lr=lr)), modality).train
        return train.lr, train.head_lr

    lr, head_lr = rates(None)
    assert rates(lr * 4) == pytest.approx((lr * 4, head_lr * 4))
    assert rates(lr) == pytest.approx((lr, head_lr))


def test_default_folders_of_different_runs_differ():
    runs = [
        valid(),
        valid(adapt=AdaptConfig(method="lora")),
        valid(train=TrainConfig(seed=1)),
        valid(data=DataConfig(source="a/other.csv")),
        valid(model=ModelConfig("resnet18", pretrained=False)),
        valid(model=ModelConfig("timm/resnet34.a1_in1k")),
        valid(model=ModelConfig("local-dir:/x/net/")),
    ]
    folders = [resolve(run, "image").output_dir for run in runs]
    assert len(set(folders)) == len(runs)
    assert all(folder.startswith("runs/") and folder.count("/") == 1 and ":" not in folder for folder in folders)


HEAVY = ("torch", "timm", "transformers", "datasets", "accelerate", "peft", "sklearn", "numpy")
LOADED = f"""
import atexit, json, sys
atexit.register(lambda: print(json.dumps([name for name in {HEAVY!r} if name in sys.modules]), file=sys.stderr))
"""


def run_quick(code: str, *arguments: str) -> str:
    """Returns the output of a new process that must load no heavy package and use less than 2 CPU seconds."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, "-c", LOADED + code, *arguments], capture_output=True, text=True, cwd=ROOT, timeout=60
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stderr.splitlines()[-1]) == []
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 2
    return done.stdout


RECIPE = "import runpy, sys; sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"


def test_import_hftl_loads_no_heavy_package():
    assert run_quick("import hftl; print(hftl.__version__, *sorted(hftl.__all__))").startswith("0.")


def test_command_help_loads_no_heavy_package():
    out = run_quick("from hftl.cli.main import main; main(['--help'])")
    for command in ("quickstart", "recipes", "copy", "run", "evaluate", "predict", "doctor"):
        assert command in out


def test_recipe_help_lists_all_flags_with_docs():
    out = run_quick(RECIPE, "recipes/image_classification.py", "--help")
    for flag in FLAGS:
        assert f"--{flag} " in out, flag
    assert "Fine-tune" in out and "Peak learning rate of the backbone" in out and "Fraction of train split off" in out
    assert "problems" not in out


def test_print_config_matches_run_config(tmp_path):
    out = run_quick(RECIPE, "recipes/text_classification.py", "--print_config", "--train.lr", "3e-4", "--data.source=x")
    (tmp_path / "printed.yaml").write_text(out)
    assert load_config(tmp_path / "printed.yaml") == RunConfig(DataConfig(source="x"), train=TrainConfig(lr=3e-4))
