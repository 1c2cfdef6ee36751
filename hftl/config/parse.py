"""Defaults < --config YAML < flags. The only module that knows the parsing library (jsonargparse)."""

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

# What `transformers.TrainingArguments` and others call them.
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


def parse_config(
    defaults: RunConfig,
    argv: Sequence[str] | None = None,
    description: str = "",
    *,
    defer: bool = False,
) -> RunConfig:
    """Returns the configuration of a run.

    Args:
        defaults: The recipe's own values; the lowest precedence.
        argv: Flags, `sys.argv[1:]` by default. `--config FILE` may name any subset of the fields.
        description: Text for `--help`.
        defer: Do not raise: return what could be read, with the problems in `run.problems`, so that
            `prepare` can report them together with those of data and model.

    Raises:
        ConfigError: Unknown keys, values of the wrong type and unreadable files, all of them.
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
            # without problems: values that only the YAML reader minds, such as `revision: 1234567` for text
            return replace(_build(parser, parser.parse_args(rest)), problems=tuple(problems))
        except _parse_errors():
            raise ConfigError(*problems, first_line(error)) from None


def dump_config(run: RunConfig) -> str:
    """Returns `run` as YAML that `parse_config` reads back to an equal configuration."""
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
    parser.add_argument("--config", action="config", help="YAML file with any subset of the fields below")
    parser.add_class_arguments(type(defaults), skip=set(NO_OPTIONS))
    parser.set_defaults(leaves(defaults))
    return parser


def _help_formatter() -> Any:
    import argparse

    import jsonargparse

    class Formatter(jsonargparse.DefaultHelpFormatter, argparse.RawDescriptionHelpFormatter):
        """Keeps the recipe's header as it was written."""

    return Formatter


def _parse_errors() -> tuple[type[Exception], ...]:
    import jsonargparse
    import yaml

    return (jsonargparse.ArgumentError, ValueError, TypeError, yaml.YAMLError)


def _build(parser: Any, namespace: Any) -> RunConfig:
    namespace.pop("config", None)
    return RunConfig(**vars(parser.instantiate(namespace)))


def _each_problem(parser: Any, argv: list[str], defaults: RunConfig) -> tuple[list[str], list[str]]:
    """Tries every setting alone. Returns the problems, and the flags of the settings that were fine."""
    known = leaves(defaults)
    groups = {name[:dot] for name in known for dot, letter in enumerate(name) if letter == "."}
    problems, fine = [], []
    for origin, key, value in _settings(argv, problems):
        if key in groups and value == "null":
            continue  # a group whose lines are all commented out
        if key not in known and key not in groups:
            renamed = renamed_setting(key)
            hint = f"there is no setting '{key}'.{_nearest_setting(key, known)} --help lists all."
            problems.append(f"{origin}: {renamed}." if renamed else f"{origin}: {hint}")
            continue
        flags = [f"--{key}={value}"]
        try:
            parser.parse_args(flags)
            fine += flags
        except _parse_errors():
            if key in groups:
                inside = ", ".join(name for name in known if name.startswith(f"{key}."))
                problems.append(f"{origin}: '{key}' is a group of settings and cannot be {value!r}; it holds {inside}.")
            else:
                hint = f"{key}: {value!r} is not allowed; expected {_expected(key)}."
                renamed = renamed_setting(key, value)
                problems.append(f"{origin}: {renamed}." if renamed else f"{origin}: {hint}")
    return problems, fine


def _settings(argv: list[str], problems: list[str]) -> Iterator[tuple[str, str, str]]:
    """Yields (where it stands, key, value as text) for every YAML entry and flag, in order of precedence."""
    words = iter(argv)
    for word in words:
        if not word.startswith("--"):
            problems.append(f"command line: {word!r} does not belong to a flag.")
            continue
        key, equals, value = word[2:].partition("=")
        if not equals:
            value = next(words, "")
        if key == "config" and not value:
            problems.append("--config: say which file, e.g. --config run.yaml")
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
        problems.append(f"{path}: expected settings by name, found a {type(content).__name__}.")
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
    """Looks for the same thing under another library's name or in another group, then for a like spelling."""
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
    """Returns the type of a setting as a reader would write it: "one of full, frozen, lora", "float or null"."""
    kind: Any = RunConfig
    for name in key.split("."):
        kind = get_type_hints(kind)[name]
    options = [option for option in (get_args(kind) if get_origin(kind) is not Literal else [kind])] or [kind]
    words = []
    for option in options if get_origin(kind) is not list else [kind]:
        if get_origin(option) is Literal:
            words.append("one of " + ", ".join(get_args(option)))
        elif get_origin(option) is list:
            words.append("a list like [a,b]")
        else:
            words.append(
                {
                    "NoneType": "null",
                    "int": "a whole number",
                    "float": "a number",
                    "bool": "true or false",
                    "str": "text",
                }.get(option.__name__, option.__name__)
            )
    return " or ".join(words)


def _spell_out_switches(argv: list[str], known: dict[str, Any]) -> list[str]:
    """Lets `--overwrite` stand for `--overwrite=true`."""
    out = []
    for word, after in zip(argv, [*argv[1:], "--"], strict=True):
        is_bare_switch = isinstance(known.get(word[2:]), bool) and word.startswith("--") and after.startswith("--")
        out.append(f"{word}=true" if is_bare_switch else word)
    return out


def _files_first(argv: list[str]) -> list[str]:
    """Puts --config before the flags: flags win over files wherever they stand on the line."""
    files, flags, words = [], [], iter(argv)
    for word in words:
        if word == "--config":
            files.append(f"--config={next(words, '')}")
        else:
            (files if word.startswith("--config=") else flags).append(word)
    return files + flags
