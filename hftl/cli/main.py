"""The `hftl` command line. Commands import heavy packages lazily."""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from hftl.config.schema import DataConfig
from hftl.distributed import readable
from hftl.errors import ConfigError, nearest
from hftl.launcher import threads_option
from hftl.logging import leave_process_group
from hftl.renames import FLAGS


def main(argv: Sequence[str] | None = None) -> None:
    """Runs one command; errors of hftl print a message and exit with their `exit_code`."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser = _parser()
    try:
        # arguments after the recipe, --help included, belong to the recipe
        if arguments[:1] == ["run"] and arguments[1:] not in ([], ["--help"], ["-h"]):
            run_with_launcher(arguments[1:])
            return
        if renamed := [f"{old} was renamed to {new}." for old, new in FLAGS.items() if old in arguments]:
            raise ConfigError(*renamed)
        options = parser.parse_args(arguments or ["--help"])
        options.act(options)
    except Exception as raised:
        error = readable(raised)
        if error is None:
            raise
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    finally:
        leave_process_group()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="hftl", description="Fine-tune pretrained vision and text models: full, frozen, LoRA or probe."
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    command = commands.add_parser(
        "quickstart", help="compare transfer learning with training from scratch, in a minute, offline"
    )
    command.add_argument("--output_dir", default="runs/quickstart", help="run folder of the best model (%(default)s)")
    command.add_argument("--num_seeds", type=positive_int, default=3, help="runs per method (%(default)s)")
    command.add_argument("--overwrite", action="store_true", help="replace an existing run folder")
    command.set_defaults(act=_quickstart)

    command = commands.add_parser("recipes", help="list the recipes")
    command.set_defaults(act=_recipes)

    command = commands.add_parser("copy", help="copy a recipe for editing")
    command.add_argument("recipe", help="name from `hftl recipes`, or file")
    command.add_argument("destination", nargs="?", default=".", help="folder or file (%(default)s)")
    command.set_defaults(act=_copy)

    command = commands.add_parser(
        "run",
        help="train with a recipe (`accelerate launch`)",
        usage="hftl run [launcher options] RECIPE [recipe options]",
        description="Runs `accelerate launch [launcher options] RECIPE [recipe options]`. RECIPE is a name from "
        "`hftl recipes` or a file. Default --config_file: ./accelerate_config.yaml, if it exists. "
        "`hftl run RECIPE --help` lists the recipe's options.",
    )
    command.set_defaults(act=lambda options, launch=command: launch.print_help())

    add_commands_on_data(commands)
    _add_commands_on_models(commands)

    command = commands.add_parser("doctor", help="print versions, devices and access to the Hub")
    command.set_defaults(act=_doctor)
    return parser


def _add_commands_on_models(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    command = commands.add_parser("evaluate", help="evaluate a trained model on a labeled split")
    command.add_argument("model", metavar="MODEL", help="run folder, its model/ folder, or Hub repo id")
    command.add_argument("--revision", help="branch, tag or commit of a Hub repo id")
    command.add_argument("--data", help="source as in data.source; default: data of the run")
    command.add_argument("--split", default="test", choices=("train", "validation", "test"), help="(%(default)s)")
    command.add_argument("--batch_size", type=positive_int, default=32, help="batch size (%(default)s)")
    command.add_argument("--output", help="write predictions to this .parquet, .csv or .jsonl file")
    command.set_defaults(act=_evaluate)

    command = commands.add_parser("predict", help="predict for an image, a folder, a text or a table")
    command.add_argument("model", metavar="MODEL", help="run folder, its model/ folder, or Hub repo id")
    command.add_argument("--revision", help="branch, tag or commit of a Hub repo id")
    command.add_argument("input", metavar="INPUT", help="image file, folder of images, table, or a text in quotes")
    command.add_argument("--pair", help="second text, for models of text pairs")
    command.add_argument("--batch_size", type=positive_int, default=32, help="batch size (%(default)s)")
    command.add_argument(
        "--output", help="write to this .parquet, .csv or .jsonl file, or folder (with masks), not to the terminal"
    )
    command.add_argument("--labels", nargs="+", help="image-text models: candidate labels, zero-shot")
    command.add_argument("--template", help="prompt per label, such as 'a photo of a {}'")
    command.add_argument("--query", help="image-text models: rank images by similarity to this text")
    command.set_defaults(act=_predict)

    command = commands.add_parser("push", help="upload a completed run to the Hub")
    command.add_argument("run", metavar="RUN", help="run folder")
    command.add_argument("repo", metavar="USER/NAME", help="Hub repository; created if it does not exist")
    command.add_argument("--private", action="store_true", help="create a private repository; reject a public one")
    command.add_argument(
        "--no_verify", dest="verify", action="store_false", help="skip reloading of the pushed revision"
    )
    command.set_defaults(act=_push)
    command = commands.add_parser("report", help="render an HTML report of a run, or a comparison of several")
    command.add_argument("runs", metavar="RUN", nargs="+", help="run folder; several are compared")
    command.add_argument("--output", help="HTML file (RUN/report.html; for several runs compare.html)")
    command.set_defaults(act=_report)
    command = commands.add_parser("export", help="export a trained model to ONNX (fp32, int8) or torch.export")
    command.add_argument("model", metavar="MODEL", help="run folder, its model/ folder, or Hub repo id")
    command.add_argument("--revision", help="branch, tag or commit of a Hub repo id")
    command.add_argument("--format", default="onnx", choices=("onnx", "torch"), help="(%(default)s)")
    command.add_argument("--output", help="output folder; default: export/FORMAT in the run folder")
    command.add_argument("--data", help="source as in data.source; default: data of the run")
    command.add_argument("--split", default="test", choices=("train", "validation", "test"), help="(%(default)s)")
    command.add_argument(
        "--rows",
        type=positive_int,
        default=100,
        help="rows on which to compare outputs with the trained model (%(default)s)",
    )
    command.add_argument("--no_int8", action="store_true", help="skip the quantized ONNX file")
    command.set_defaults(act=_export)

    command = commands.add_parser("demo", help="serve a local web demo of a trained model")
    command.add_argument("model", metavar="MODEL", help="run folder, its model/ folder, or Hub repo id")
    command.add_argument("--revision", help="branch, tag or commit of a Hub repo id")
    command.add_argument("--host", default="127.0.0.1", help="address to listen on (%(default)s); 0.0.0.0 for all")
    command.add_argument("--port", type=positive_int, help="port to listen on; default: first free port from 7860")
    command.add_argument("--data", help="source of the examples, as in data.source; default: data of the run")
    command.set_defaults(act=_demo)


def recipes_folder() -> Path:
    """Returns the folder of the recipes: inside an installed wheel, or at the top of a checkout."""
    package = Path(__file__).parents[1]
    installed = package / "_recipes"
    return installed if installed.is_dir() else package.parent / "recipes"


def find_recipe(name: str) -> Path:
    """Returns the file of a recipe.

    Args:
        name: Name from `hftl recipes`, or path to a .py file.

    Raises:
        ConfigError: The recipe does not exist.
    """
    if name.endswith(".py") and Path(name).is_file():
        return Path(name)
    names = sorted(file.stem for file in recipes_folder().glob("*.py"))
    if name not in names:
        raise ConfigError(f"recipe: '{name}' does not exist; allowed: {', '.join(names)}.{nearest(name, names)}")
    return recipes_folder() / f"{name}.py"


def run_with_launcher(arguments: list[str]) -> None:
    """Replaces this process by `accelerate launch [launcher options] RECIPE [recipe options]`."""
    names = {file.stem for file in recipes_folder().glob("*.py")}
    position = next((i for i, argument in enumerate(arguments) if argument in names or argument.endswith(".py")), None)
    if position is None:
        candidates = [argument for argument in arguments if not argument.startswith("-")]
        if candidates:
            find_recipe(next((candidate for candidate in candidates if nearest(candidate, names)), candidates[0]))
        raise ConfigError("recipe: is missing. Pass a name from `hftl recipes`: hftl run RECIPE …")
    before, recipe, after = arguments[:position], find_recipe(arguments[position]), arguments[position + 1 :]
    if not {"--help", "-h", "--print_config"}.isdisjoint(after):
        command = [sys.executable, str(recipe), *after]  # skip the launcher: it takes seconds
    else:
        config = Path("accelerate_config.yaml")
        if "--config_file" not in before and config.is_file():
            before = ["--config_file", str(config), *before]
        before = [*threads_option(before), *before]
        command = [sys.executable, "-m", "accelerate.commands.launch", *before, str(recipe), *after]
    sys.stdout.flush()
    os.execv(sys.executable, command)


def _recipes(options: argparse.Namespace) -> None:
    import ast

    for file in sorted(recipes_folder().glob("*.py")):
        summary = (ast.get_docstring(ast.parse(file.read_text())) or "").splitlines()[0]
        print(f"{file.stem:<24} {summary}")


def _copy(options: argparse.Namespace) -> None:
    recipe = find_recipe(options.recipe)
    target = Path(options.destination)
    target = target if target.suffix == ".py" else target / recipe.name
    if target.exists():
        raise ConfigError(f"destination: '{target}' exists. Pass another path.")
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(recipe, target)
    print(f"{target}\nRun it: hftl run {target} --data.source … --model.name …")


def _quickstart(options: argparse.Namespace) -> None:
    from hftl.cli.quickstart import quickstart

    quickstart(options.output_dir, options.num_seeds, options.overwrite)


def _evaluate(options: argparse.Namespace) -> None:
    from hftl.inference.batch_inference import evaluate_saved
    from hftl.logging import log

    metrics = evaluate_saved(
        options.model, options.data, options.split, options.batch_size, options.output, options.revision
    )
    for name, value in metrics.items():
        log(f"{name:<28} {value:.4f}")


def _predict(options: argparse.Namespace) -> None:
    from hftl.inference.batch_inference import predict_to_file

    labels = options.labels
    if labels is not None and len(labels) == 1:
        labels = [label.strip() for label in labels[0].split(",")]
    predict_to_file(
        options.model,
        options.input,
        options.pair,
        options.batch_size,
        options.output,
        options.revision,
        labels=labels,
        template=options.template,
        query=options.query,
    )


def _push(options: argparse.Namespace) -> None:
    from hftl.artifacts.push import push

    push(options.run, options.repo, options.private, options.verify)


def _report(options: argparse.Namespace) -> None:
    from hftl.reporting import compare_reports, write_report

    if len(options.runs) == 1:
        print(write_report(options.runs[0], options.output))
    else:
        print(compare_reports(options.runs, options.output or "compare.html"))


def _export(options: argparse.Namespace) -> None:
    from hftl.artifacts.export import export_folder

    export_folder(
        options.model,
        options.format,
        options.output,
        source=options.data,
        split=options.split,
        rows=options.rows,
        int8=not options.no_int8,
        revision=options.revision,
    )


def _demo(options: argparse.Namespace) -> None:
    from hftl.inference.demo import serve

    serve(options.model, options.host, options.port, options.revision, options.data)


def _doctor(options: argparse.Namespace) -> None:
    from hftl.cli.doctor import examine

    sys.exit(0 if examine() else 1)


_CONFIG = "YAML file with data settings, such as columns, as for a recipe"


def add_commands_on_data(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the commands check, rank, compare and features."""
    command = commands.add_parser("check", help="audit data: duplicates, leaks, label errors, outliers; one HTML page")
    command.add_argument("data", metavar="DATA", help="source as in data.source")
    command.add_argument("--model", help="backbone for label errors, outliers and texts that are too long")
    command.add_argument("--output", default="check", help="folder for check.html and check.json (%(default)s)")
    command.add_argument(
        "--fail_on",
        nargs="*",
        metavar="FINDING",
        help="exit with status 1 if any of these is found; empty: the serious ones",
    )
    command.add_argument("--fix", metavar="FOLDER", help="write a cleaned copy of the data to this new folder")
    command.add_argument("--config", help=_CONFIG)
    command.set_defaults(act=_check)

    command = commands.add_parser("rank", help="rank candidate backbones by transferability")
    command.add_argument("data", metavar="DATA", help="source as in data.source")
    command.add_argument(
        "--models", nargs="+", metavar="MODEL", required=True, help="names, or one file with one name per line"
    )
    command.add_argument("--rows", type=positive_int, default=10_000, help="maximum training rows (%(default)s)")
    command.add_argument("--by", default="linear probe", help="score to rank by (%(default)s)")
    command.add_argument("--output", default="rank", help="folder for rank.html and rank.json (%(default)s)")
    command.add_argument("--explain", action="store_true", help="print assumptions and source of each score")
    command.add_argument("--config", help=_CONFIG)
    command.set_defaults(act=_rank)

    command = commands.add_parser("compare", help="compare training methods with the same split and budget")
    command.add_argument("data", metavar="DATA", help="source as in data.source")
    command.add_argument("--model", required=True, help="as model.name")
    command.add_argument(
        "--methods",
        nargs="+",
        default=["scratch", "frozen", "lora", "full"],
        choices=("scratch", "frozen", "probe", "lora", "full"),
        help="training methods (scratch frozen lora full)",
    )
    command.add_argument("--num_seeds", type=positive_int, default=3, help="runs per method (%(default)s)")
    command.add_argument("--config", help="YAML file with settings shared by all runs")
    command.add_argument("--output_dir", default="runs/compare", help="folder of the runs (%(default)s)")
    command.add_argument("--overwrite", action="store_true", help="replace an existing folder")
    command.set_defaults(act=_compare)

    command = commands.add_parser("features", help="extract backbone features to Parquet")
    command.add_argument("data", metavar="DATA", help="source as in data.source")
    command.add_argument("--model", required=True, help="as model.name")
    layers = "head input, mean of the pooled layers of a text model, or all layers (%(default)s)"
    command.add_argument("--layers", default="head", choices=("head", "mean", "all"), help=layers)
    command.add_argument("--batch_size", type=positive_int, default=32, help="batch size (%(default)s)")
    command.add_argument("--output", default="features", help="folder for SPLIT.parquet (%(default)s)")
    command.add_argument("--config", help=_CONFIG)
    command.set_defaults(act=_features)


def positive_int(text: str) -> int:
    """Returns a positive integer from the command line."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is invalid; allowed: integers, at least 1")
    return int(text)


def _data(options: argparse.Namespace) -> DataConfig:
    from hftl.config.parse import load_config

    data = load_config(options.config).data if options.config else DataConfig()
    return replace(data, source=options.data)


def _check(options: argparse.Namespace) -> None:
    from hftl.audit.check import check

    result = check(_data(options), options.model, output=options.output, fix=options.fix, fail_on=options.fail_on)
    sys.exit(1 if result.failed else 0)


def _rank(options: argparse.Namespace) -> None:
    from hftl.selection.ranking import rank

    rank(
        _data(options),
        options.models,
        rows=options.rows,
        output=options.output,
        explain=options.explain,
        by=options.by,
    )


def _compare(options: argparse.Namespace) -> None:
    from hftl.selection.comparison import compare

    comparison = compare(
        options.data,
        options.model,
        options.methods,
        num_seeds=options.num_seeds,
        config=options.config,
        output_dir=options.output_dir,
        overwrite=options.overwrite,
    )
    sys.exit(0 if comparison.conclusion else 1)


def _features(options: argparse.Namespace) -> None:
    from hftl.features.parquet import write_features

    write_features(
        _data(options), options.model, layers=options.layers, batch_size=options.batch_size, output=options.output
    )
