"""The commands of `hftl` that look at data before anything is trained."""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace

from hftl.config.schema import DataConfig

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
    command.add_argument("--rows", type=count, default=10_000, help="training rows to use at most (%(default)s)")
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
    command.add_argument("--seeds", type=count, default=3, help="trainings of each (%(default)s)")
    command.add_argument("--config", help="YAML file with settings that all trainings share")
    command.add_argument("--output_dir", default="runs/compare", help="folder of the runs (%(default)s)")
    command.add_argument("--overwrite", action="store_true", help="replace an existing folder")
    command.set_defaults(act=_compare)

    command = commands.add_parser("features", help="write what the head of a model sees, row by row, as Parquet")
    command.add_argument("data", metavar="DATA", help="source as in data.source")
    command.add_argument("--model", required=True, help="as model.name")
    layers = "input of the head, mean of the pooled layers of a text model, or all of them (%(default)s)"
    command.add_argument("--layers", default="head", choices=("head", "mean", "all"), help=layers)
    command.add_argument("--batch_size", type=count, default=32, help="rows at a time (%(default)s)")
    command.add_argument("--output", default="features", help="folder for SPLIT.parquet (%(default)s)")
    command.add_argument("--config", help=_CONFIG)
    command.set_defaults(act=_features)


def count(text: str) -> int:
    """Returns a number of at least 1 from the command line."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def _data(options: argparse.Namespace) -> DataConfig:
    from hftl.config.parse import load

    data = load(options.config).data if options.config else DataConfig()
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
        seeds=options.seeds,
        config=options.config,
        output_dir=options.output_dir,
        overwrite=options.overwrite,
    )
    sys.exit(0 if found.verdict else 1)


def _features(options: argparse.Namespace) -> None:
    from hftl.features.parquet import write_features

    write_features(
        _data(options), options.model, layers=options.layers, batch_size=options.batch_size, output=options.output
    )
