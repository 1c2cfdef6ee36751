"""Configuration parsing: flags override --config YAML, which overrides defaults. Wraps jsonargparse."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Collection, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from hftl.config.schema import NO_OPTIONS, RunConfig, leaves
from hftl.errors import ConfigError, first_line, nearest
from hftl.renames import renamed_setting, upgrade_settings

# names in `transformers.TrainingArguments` and other libraries
_ELSEWHERE = {
    "learning_rate": "lr",
    "epochs": "num_epochs",
    "num_train_epochs": "num_epochs",
    "batch_size": "batch_size_per_device",
    "per_device_train_batch_size": "batch_size_per_device",
    "accumulate_grad_batches": "gradient_accumulation_steps",
    "rank": "r",
    "dataset": "source",
}
_TYPE_NAMES = {"NoneType": "null", "int": "an integer", "float": "a number", "bool": "true or false", "str": "a string"}


def parse_config(
    defaults: RunConfig,
    argv: Sequence[str] | None = None,
    description: str = "",
    *,
    defer: bool = False,
) -> RunConfig:
    """Returns the configuration of a run.

    Args:
        defaults: Defaults of the recipe; the lowest precedence.
        argv: Flags; default `sys.argv[1:]`. A `--config FILE` may contain any subset of the settings.
        description: Text for `--help`.
        defer: Return the valid settings, with the errors in `run.problems`, instead of raising. `setup_run`
            then reports them together with errors of data and model.

    Raises:
        ConfigError: Unknown settings, values of the wrong type or unreadable files; lists all of them.
    """
    argv = _files_first(_spell_out_switches(sys.argv[1:] if argv is None else list(argv), leaves(defaults)))
    parser = _parser(defaults, description)
    try:
        return _build(parser, parser.parse_args(argv))
    except _parse_errors() as error:
        problems, rest = _each_problem(parser, argv, defaults)
        if problems and not defer:
            raise ConfigError(*problems) from None
        try:
            # without problems: values that only the YAML reader rejects, such as `revision: 1234567` for a string
            return replace(_build(parser, parser.parse_args(rest)), problems=tuple(problems))
        except _parse_errors():
            raise ConfigError(*problems, first_line(error)) from None


def dump_config(run: RunConfig) -> str:
    """Returns `run` as YAML; `parse_config` reads it back to an equal configuration."""
    import yaml

    values = {name: value for name, value in asdict(run).items() if name not in NO_OPTIONS}
    return yaml.safe_dump(values, sort_keys=False)


def load_config(path: str | Path) -> RunConfig:
    """Returns the configuration in a YAML file written by `dump_config`."""
    return parse_config(RunConfig(), ["--config", str(path)])


def load_saved_config(path: str | Path) -> RunConfig:
    """Returns the configuration in a file that `dump_config` wrote, also in the names of an earlier version."""
    import yaml

    before = dict(_yaml_values(path))
    values = upgrade_settings(before)
    if values == before:
        return load_config(path)
    with tempfile.TemporaryDirectory() as folder:
        upgraded = Path(folder, "upgraded.yaml")
        upgraded.write_text(yaml.safe_dump(_nested(values)), encoding="utf-8")
        return load_config(upgraded)


def _yaml_values(path: str | Path) -> Iterator[tuple[str, Any]]:
    """Yields the entries of a YAML file by dotted name; nothing for a file that `load_config` will reject."""
    import yaml

    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return
    yield from _flatten(content) if isinstance(content, dict) else ()


def _nested(values: dict[str, Any]) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for name, value in values.items():
        *groups, last = name.split(".")
        inner = out
        for group in groups:
            inner = inner.setdefault(group, {})
        inner[last] = value
    return out


def _parser(defaults: RunConfig, description: str) -> Any:
    import jsonargparse

    jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = jsonargparse.ArgumentParser(
        description=description,
        exit_on_error=False,
        allow_abbrev=False,
        formatter_class=_help_formatter(),
    )
    parser.add_argument("--config", action="config", help="YAML file with any subset of the settings below")
    parser.add_class_arguments(type(defaults), skip=set(NO_OPTIONS))
    parser.set_defaults(leaves(defaults))
    return parser


def _help_formatter() -> Any:
    import argparse

    import jsonargparse

    class Formatter(jsonargparse.DefaultHelpFormatter, argparse.RawDescriptionHelpFormatter):
        """Help formatter that preserves the line breaks of the recipe's docstring."""

    return Formatter


def _parse_errors() -> tuple[type[Exception], ...]:
    import jsonargparse
    import yaml

    return (jsonargparse.ArgumentError, ValueError, TypeError, yaml.YAMLError)


def _build(parser: Any, namespace: Any) -> RunConfig:
    namespace.pop("config", None)
    return RunConfig(**vars(parser.instantiate(namespace)))


def _each_problem(parser: Any, argv: list[str], defaults: RunConfig) -> tuple[list[str], list[str]]:
    """Parses every setting separately; returns the problems and the flags of the valid settings."""
    known = leaves(defaults)
    groups = {name[:dot] for name in known for dot, letter in enumerate(name) if letter == "."}
    problems, valid = [], []
    for origin, key, value in _settings(argv, problems):
        if key in groups and value == "null":
            continue  # all settings of the group are commented out
        if key not in known and key not in groups:
            renamed = renamed_setting(key)
            hint = f"there is no setting '{key}'.{_nearest_setting(key, known)} --help lists all."
            problems.append(f"{origin}: {renamed}." if renamed else f"{origin}: {hint}")
            continue
        flags = [f"--{key}={value}"]
        try:
            parser.parse_args(flags)
            valid += flags
        except _parse_errors():
            if key in groups:
                members = ", ".join(name for name in known if name.startswith(f"{key}."))
                problems.append(f"{origin}: '{key}' is a group of settings, not {value!r}. Set one of {members}.")
            else:
                hint = f"{key}: {value!r} is invalid; allowed: {_expected(key)}."
                renamed = renamed_setting(key, value)
                problems.append(f"{origin}: {renamed}." if renamed else f"{origin}: {hint}")
    return problems, valid


def _settings(argv: list[str], problems: list[str]) -> Iterator[tuple[str, str, str]]:
    """Yields (origin, key, value as string) for every YAML entry and flag, in order of precedence."""
    arguments = iter(argv)
    for argument in arguments:
        if not argument.startswith("--"):
            problems.append(f"command line: {argument!r} follows no flag. Remove it.")
            continue
        key, equals, value = argument[2:].partition("=")
        if not equals:
            value = next(arguments, "")
        if key == "config" and not value:
            problems.append("--config: is empty. Pass a file, such as --config run.yaml.")
        elif key == "config":
            yield from _yaml_settings(value, problems)
        elif key != "print_config":
            yield "command line", key, value


def _yaml_settings(path: str, problems: list[str]) -> Iterator[tuple[str, str, str]]:
    import yaml

    try:
        content = yaml.safe_load(Path(path).read_text()) or {}
    except OSError as error:
        folder = Path(path).parent
        missing = folder.is_dir() and not Path(path).exists()
        guess = nearest(Path(path).name, [entry.name for entry in folder.iterdir()]) if missing else ""
        problems.append(f"--config: cannot read '{path}' ({error.strerror}).{guess}")
        return
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}, line {mark.line + 1}" if mark else path
        problems.append(f"{where}: not valid YAML ({getattr(error, 'problem', None) or first_line(error)}).")
        return
    if not isinstance(content, dict):
        problems.append(f"{path}: is a {type(content).__name__}; allowed: a mapping of settings.")
        return
    for key, value in _flatten(content):
        yield path, key, "null" if value is None else str(value)


def _flatten(values: dict[Any, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _nearest_setting(key: str, known: Collection[str]) -> str:
    """Returns a suggestion: the name in other libraries, the same name in another group, or a similar spelling."""
    group, _, last = key.rpartition(".")
    last = _ELSEWHERE.get(last, last)
    exact = [name for name in known if name.rpartition(".")[2] == last]
    if exact:
        return f" Did you mean {' or '.join(map(repr, exact))}?"
    siblings = [name for name in known if name.rpartition(".")[0] == group and nearest(last, [name.rpartition(".")[2]])]
    same_tail = [name for name in known if nearest(last, [name.rpartition(".")[2]])]
    close = nearest(key, siblings) or nearest(key, same_tail)
    return close or (f" Did you mean '{same_tail[0]}'?" if len(same_tail) == 1 else nearest(key, known))


def _expected(key: str) -> str:
    """Returns the allowed values of a setting: "one of full, frozen, lora", "number or null"."""
    annotation: Any = RunConfig
    for name in key.split("."):
        annotation = get_type_hints(annotation)[name]
    is_single = get_origin(annotation) in (Literal, list)
    allowed = []
    for option in [annotation] if is_single else get_args(annotation) or [annotation]:
        if get_origin(option) is Literal:
            allowed.append("one of " + ", ".join(get_args(option)))
        elif get_origin(option) is list:
            allowed.append("a list such as [a,b]")
        else:
            allowed.append(_TYPE_NAMES.get(option.__name__, option.__name__))
    return " or ".join(allowed)


def _spell_out_switches(argv: list[str], known: dict[str, Any]) -> list[str]:
    """Expands a Boolean flag without a value: `--overwrite` to `--overwrite=true`."""
    expanded = []
    for flag, following in zip(argv, [*argv[1:], "--"], strict=True):
        is_bare = isinstance(known.get(flag[2:]), bool) and flag.startswith("--") and following.startswith("--")
        expanded.append(f"{flag}=true" if is_bare else flag)
    return expanded


def _files_first(argv: list[str]) -> list[str]:
    """Moves --config before all flags, so that flags override files in any order."""
    files, flags, arguments = [], [], iter(argv)
    for argument in arguments:
        if argument == "--config":
            files.append(f"--config={next(arguments, '')}")
        else:
            (files if argument.startswith("--config=") else flags).append(argument)
    return files + flags
