"""A run is one recipe: YAML with Megatron's flag names, overridden by the command line.

Keys are the names with underscores, flags those with dashes.
"""

import argparse
import dataclasses
import difflib
import typing
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

from megatron_attnedit.errors import UserError
from megatron_attnedit.files import read_input
from megatron_attnedit.training.recipe import Recipe


def _field_types(cls: type[Recipe]) -> dict[str, Any]:
    kinds = typing.get_type_hints(cls)
    return {name: bool if kind == (bool | None) else kind for name, kind in kinds.items()}


def _checked(name: str, value: Any, kind: Any, where: str) -> Any:
    """A YAML value of the field's type; numbers such as ``1e-4`` come as text from YAML."""
    wanted = typing.get_origin(kind) or kind
    if wanted is float and isinstance(value, int | str) and not isinstance(value, bool):
        try:
            return float(value)
        except ValueError:
            pass
    if wanted is list and isinstance(value, list | str):
        items = value if isinstance(value, list) else [value]
        return [str(item) for item in items]
    if isinstance(value, wanted) and not (wanted is int and isinstance(value, bool)):
        return value
    raise UserError(
        f"{where}: {name} is {value!r}, expected {getattr(wanted, '__name__', wanted)}"
    )


def _repeated_key(text: str) -> str | None:
    """The first key that is there twice; PyYAML would keep the last value without a word."""
    root = yaml.compose(text, Loader=yaml.SafeLoader)
    keys = [key.value for key, _ in root.value] if isinstance(root, yaml.MappingNode) else []
    return next((key for key in keys if keys.count(key) > 1), None)


def _suggestion(key: Any, known: Iterable[str]) -> str:
    """The known key that was probably meant, else all of them."""
    names = sorted(known)
    close = difflib.get_close_matches(str(key).lower().replace("-", "_"), names, n=1)
    return f"did you mean {close[0]!r}?" if close else f"known keys: {', '.join(names)}"


def _read_yaml(path: Path) -> Any:
    """What a YAML file holds; every key once.

    Raises:
        UserError: it holds something else.
    """
    text = read_input(path)
    try:
        repeated = _repeated_key(text)
        content = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError) as error:  # the latter of dates and numbers
        raise UserError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if repeated is not None:
        raise UserError(f"{path}: key {repeated!r} is there more than once")
    return content


def read_recipe_file(cls: type[Recipe], file: str | Path) -> dict[str, Any]:
    """Keys and values of a YAML recipe.

    Raises:
        UserError: no such file, not YAML, a key unknown or repeated, or a value of another type.
    """
    path = Path(file)
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    content = _read_yaml(path) or {}
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected keys and values")
    kinds = _field_types(cls)
    for key in content:
        if key not in kinds:
            raise UserError(f"{path}: unknown key {key!r}; {_suggestion(key, kinds)}")
    defaults = {item.name: item.default for item in dataclasses.fields(cls)}
    return {
        key: _checked(key, value, kinds[key], str(path))
        for key, value in content.items()
        if value is not None or defaults[key] is not None
    }


def parser_for(cls: type[Recipe], description: str) -> argparse.ArgumentParser:
    """One flag per field, with unit and default."""
    parser = argparse.ArgumentParser(
        description=description,
        epilog="With --dry-run nothing is trained: grid, schedule and memory are checked and shown "
        "on any machine; --dry-run --help lists its flags.",
    )
    parser.add_argument("--recipe", help="YAML file; flags given here override it")
    kinds = _field_types(cls)
    for item in dataclasses.fields(cls):
        is_list = item.default_factory is not dataclasses.MISSING
        default = "none" if is_list or item.default in ("", None) else item.default
        kwargs: dict[str, Any] = {
            "help": f"{item.metadata['help']} (default: {default})",
            "default": argparse.SUPPRESS,
        }
        if kinds[item.name] is bool:
            kwargs["action"] = argparse.BooleanOptionalAction
        elif is_list:
            kwargs.update(nargs="+", metavar="ARG")
        else:
            kwargs.update(type=kinds[item.name], metavar=kinds[item.name].__name__.upper())
        parser.add_argument(f"--{item.name.replace('_', '-')}", **kwargs)
    return parser


def parse_recipe(cls: type[Recipe], description: str, argv: list[str] | None = None) -> Any:
    """The run's recipe from ``--recipe`` and flags.

    Raises:
        UserError: see ``read_recipe_file`` and the recipe's own checks.
    """
    given = vars(parser_for(cls, description).parse_args(argv))
    file = given.pop("recipe", None)
    values = read_recipe_file(cls, file) if file else {}
    return cls(**{**values, **given})


def to_yaml(recipe: Recipe) -> str:
    """The final values, as written beside every checkpoint."""
    return yaml.safe_dump(dataclasses.asdict(recipe), sort_keys=False)
