"""`hftl …`: everything around a training. Nothing heavy is imported before it is needed."""

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
    """Runs one command; a problem ends it with a message and the `exit_code` of its error."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser = _parser()
    try:
        # everything after the recipe's name is the recipe's own, --help included
        if arguments[:1] == ["run"] and arguments[1:] not in ([], ["--help"], ["-h"]):
            run_with_launcher(arguments[1:])
            return
        renamed = [f"{old} was renamed to {new}." for old, new in FLAGS.items() if old in arguments]
        if renamed:
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
        prog="hftl",
        description="Fine-tune pretrained vision and text models: full, frozen or LoRA; open them anywhere.",
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    command = commands.add_parser("quickstart", help="see what transfer learning gives, in a minute, without a network")
    command.add_argument("--output_dir", default="runs/quickstart", help="run folder of the best model (%(default)s)")
    command.add_argument("--num_seeds", type=positive_int, default=3, help="trainings of each method (%(default)s)")
    command.add_argument("--overwrite", action="store_true", help="replace an existing run folder")
    command.set_defaults(act=_quickstart)

    command = commands.add_parser("recipes", help="list the recipes")
    command.set_defaults(act=_recipes)

    command = commands.add_parser("copy", help="copy a recipe here, to change it")
    command.add_argument("recipe")
    command.add_argument("destination", nargs="?", default=".", help="folder or file (%(default)s)")
    command.set_defaults(act=_copy)

    command = commands.add_parser(
        "run",
        help="train: `accelerate launch` of a recipe",
        usage="hftl run [launcher options] RECIPE [recipe options]",
        description="Runs `accelerate launch [launcher options] RECIPE [recipe options]`. RECIPE is a name from "
        "`hftl recipes` or a file. Without --config_file, ./accelerate_config.yaml is used where it exists. "
        "`hftl run RECIPE --help` lists the recipe's options.",
    )
    command.set_defaults(act=lambda options, launch=command: launch.print_help())

    add_commands_on_data(commands)
    _add_commands_on_models(commands)

    command = commands.add_parser("doctor", help="print versions and devices, and whether the hub answers")
    command.set_defaults(act=_doctor)
    return parser


def _add_commands_on_models(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    command = commands.add_parser("evaluate", help="measure a trained model on a labelled split")
    command.add_argument("model", metavar="MODEL", help="run folder, model/ folder of one, or hub id")
    command.add_argument("--revision", help="branch, tag or commit of a hub id")
    command.add_argument("--data", help="source as in data.source; by default the run's own data")
    command.add_argument("--split", default="test", choices=("train", "validation", "test"), help="(%(default)s)")
    command.add_argument("--batch_size", type=positive_int, default=32, help="rows at a time (%(default)s)")
    command.add_argument("--output", help="write predictions to this .parquet, .csv or .jsonl file")
    command.set_defaults(act=_evaluate)

    command = commands.add_parser("predict", help="apply a trained model to an image, a folder, a text or a table")
    command.add_argument("model", metavar="MODEL", help="run folder, model/ folder of one, or hub id")
    command.add_argument("--revision", help="branch, tag or commit of a hub id")
    command.add_argument("input", metavar="INPUT", help="image file, folder of images, table, or a text in quotes")
    command.add_argument("--pair", help="second text, for models of text pairs")
    command.add_argument("--batch_size", type=positive_int, default=32, help="rows at a time (%(default)s)")
    command.add_argument(
        "--output", help="write to this .parquet, .csv or .jsonl file, or folder (masks too), not the terminal"
    )
    command.add_argument("--labels", nargs="+", help="of a model of images and texts: which label each image gets")
    command.add_argument("--template", help="text for each label, such as 'a photo of a {}'")
    command.add_argument("--query", help="of such a model: list images by how near they are to this text")
    command.set_defaults(act=_predict)

    command = commands.add_parser("push", help="upload a finished run to the hub, for the first time or again")
    command.add_argument("run", metavar="RUN", help="run folder")
    command.add_argument("repo", metavar="USER/NAME", help="repository; created where it does not exist")
    command.add_argument("--private", action="store_true", help="create it private; refuse a public one")
    command.add_argument("--no_verify", dest="verify", action="store_false", help="do not load the revision back")
    command.set_defaults(act=_push)
    command = commands.add_parser("report", help="draw a run as one HTML page, or several side by side")
    command.add_argument("runs", metavar="RUN", nargs="+", help="run folder; several are compared")
    command.add_argument("--output", help="HTML file (RUN/report.html; of several runs compare.html)")
    command.set_defaults(act=_report)
    command = commands.add_parser("export", help="write a trained model as ONNX (fp32, int8) or a torch.export program")
    command.add_argument("model", metavar="MODEL", help="run folder, model/ folder of one, or hub id")
    command.add_argument("--revision", help="branch, tag or commit of a hub id")
    command.add_argument("--format", default="onnx", choices=("onnx", "torch"), help="(%(default)s)")
    command.add_argument("--output", help="folder to write; export/FORMAT in the run folder by default")
    command.add_argument("--data", help="source as in data.source; by default the run's own data")
    command.add_argument("--split", default="test", choices=("train", "validation", "test"), help="(%(default)s)")
    command.add_argument(
        "--rows", type=positive_int, default=100, help="rows to compare with the trained model (%(default)s)"
    )
    command.add_argument("--no_int8", action="store_true", help="write no quantized onnx file")
    command.set_defaults(act=_export)

    command = commands.add_parser("demo", help="show a trained model as a page in the browser, on this machine")
    command.add_argument("model", metavar="MODEL", help="run folder, model/ folder of one, or hub id")
    command.add_argument("--revision", help="branch, tag or commit of a hub id")
    command.add_argument("--host", default="127.0.0.1", help="address to listen on (%(default)s); 0.0.0.0 for all")
    command.add_argument("--port", type=positive_int, help="port to listen on; by default the first free one from 7860")
    command.add_argument("--data", help="source of the examples, as in data.source; by default the run's own data")
    command.set_defaults(act=_demo)


def recipes_folder() -> Path:
    """Returns where the recipes are: inside an installed wheel, or at the top of a checkout."""
    package = Path(__file__).parents[1]
    inside = package / "_recipes"
    return inside if inside.is_dir() else package.parent / "recipes"


def find_recipe(name: str) -> Path:
    """Returns the file of a recipe by name or path.

    Raises:
        ConfigError: There is no such recipe.
    """
    if name.endswith(".py") and Path(name).is_file():
        return Path(name)
    names = sorted(file.stem for file in recipes_folder().glob("*.py"))
    if name not in names:
        raise ConfigError(f"there is no recipe '{name}' (recipes: {', '.join(names)}).{nearest(name, names)}")
    return recipes_folder() / f"{name}.py"


def run_with_launcher(arguments: list[str]) -> None:
    """Becomes `accelerate launch [launcher options] RECIPE [recipe options]`."""
    names = {file.stem for file in recipes_folder().glob("*.py")}
    position = next((i for i, word in enumerate(arguments) if word in names or word.endswith(".py")), None)
    if position is None:
        words = [word for word in arguments if not word.startswith("-")]
        if words:
            find_recipe(next((word for word in words if nearest(word, names)), words[0]))
        raise ConfigError("say which recipe to run: hftl run RECIPE … (`hftl recipes` lists them)")
    before, recipe, after = arguments[:position], find_recipe(arguments[position]), arguments[position + 1 :]
    if not {"--help", "-h", "--print_config"}.isdisjoint(after):
        command = [sys.executable, str(recipe), *after]  # no launcher is needed to print, and it costs seconds
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
        raise ConfigError(f"'{target}' exists; name another destination.")
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


_CONFIG = "YAML file whose data section names columns and the like, as for a recipe"


def add_commands_on_data(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds check, rank, compare and features to the commands of `hftl`."""
    command = commands.add_parser("check", help="audit data: duplicates, leaks, wrong labels, odd rows; one HTML page")
    command.add_argument("data", metavar="DATA", help="source as in data.source")
    command.add_argument("--model", help="backbone whose features find near duplicates, wrong labels and odd rows")
    command.add_argument("--output", default="check", help="folder for check.html and check.json (%(default)s)")
    command.add_argument("--fail_on", nargs="*", metavar="FINDING", help="findings that make the exit code 1")
    command.add_argument("--fix", metavar="FOLDER", help="write a cleaned copy of the data into this new folder")
    command.add_argument("--config", help=_CONFIG)
    command.set_defaults(act=_check)

    command = commands.add_parser("rank", help="which backbone? candidates compared by features of this data")
    command.add_argument("data", metavar="DATA", help="source as in data.source")
    command.add_argument(
        "--models", nargs="+", metavar="MODEL", required=True, help="names, or one file that lists them"
    )
    command.add_argument("--rows", type=positive_int, default=10_000, help="training rows to use at most (%(default)s)")
    command.add_argument("--by", default="linear probe", help="score that orders the table (%(default)s)")
    command.add_argument("--output", default="rank", help="folder for rank.html and rank.json (%(default)s)")
    command.add_argument("--explain", action="store_true", help="say what each score assumes, and its source")
    command.add_argument("--config", help=_CONFIG)
    command.set_defaults(act=_rank)

    command = commands.add_parser("compare", help="did transfer help? ways of adapting on the same split and budget")
    command.add_argument("data", metavar="DATA", help="source as in data.source")
    command.add_argument("--model", required=True, help="as model.name")
    command.add_argument(
        "--methods",
        nargs="+",
        default=["scratch", "frozen", "lora", "full"],
        choices=("scratch", "frozen", "probe", "lora", "full"),
        help="ways of adapting (scratch frozen lora full)",
    )
    command.add_argument("--num_seeds", type=positive_int, default=3, help="trainings of each (%(default)s)")
    command.add_argument("--config", help="YAML file with settings that all trainings share")
    command.add_argument("--output_dir", default="runs/compare", help="folder of the runs (%(default)s)")
    command.add_argument("--overwrite", action="store_true", help="replace an existing folder")
    command.set_defaults(act=_compare)

    command = commands.add_parser("features", help="write what the head of a model sees, row by row, as Parquet")
    command.add_argument("data", metavar="DATA", help="source as in data.source")
    command.add_argument("--model", required=True, help="as model.name")
    layers = "input of the head, mean of the pooled layers of a text model, or all of them (%(default)s)"
    command.add_argument("--layers", default="head", choices=("head", "mean", "all"), help=layers)
    command.add_argument("--batch_size", type=positive_int, default=32, help="rows at a time (%(default)s)")
    command.add_argument("--output", default="features", help="folder for SPLIT.parquet (%(default)s)")
    command.add_argument("--config", help=_CONFIG)
    command.set_defaults(act=_features)


def positive_int(text: str) -> int:
    """Returns a number of at least 1 from the command line."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def _data(options: argparse.Namespace) -> DataConfig:
    from hftl.config.parse import load_config

    data = load_config(options.config).data if options.config else DataConfig()
    return replace(data, source=options.data)


def _check(options: argparse.Namespace) -> None:
    from hftl.audit.check import check

    found = check(_data(options), options.model, output=options.output, fix=options.fix, fail_on=options.fail_on)
    sys.exit(1 if found.failed else 0)


def _rank(options: argparse.Namespace) -> None:
    from hftl.selection.ranking import rank

    chosen = {"rows": options.rows, "output": options.output, "explain": options.explain, "by": options.by}
    rank(_data(options), options.models, **chosen)


def _compare(options: argparse.Namespace) -> None:
    from hftl.selection.comparison import compare

    found = compare(
        options.data,
        options.model,
        options.methods,
        seeds=options.num_seeds,
        config=options.config,
        output_dir=options.output_dir,
        overwrite=options.overwrite,
    )
    sys.exit(0 if found.conclusion else 1)


def _features(options: argparse.Namespace) -> None:
    from hftl.features.parquet import write_features

    write_features(
        _data(options), options.model, layers=options.layers, batch_size=options.batch_size, output=options.output
    )
