"""A run is one recipe: YAML with Megatron's flag names, overridden by the command line."""

import argparse
import dataclasses
import typing
from pathlib import Path
from typing import Any

import yaml

from megatron_attnedit.errors import UserError
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


def read_recipe_file(cls: type[Recipe], file: str | Path) -> dict[str, Any]:
    """Keys and values of a YAML recipe.

    Raises:
        UserError: no such file, not YAML, an unknown key or a value of another type.
    """
    path = Path(file)
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    try:
        content = yaml.safe_load(path.read_text()) or {}
    except yaml.YAMLError as error:
        raise UserError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected keys and values")
    kinds = _field_types(cls)
    for key in content:
        if key not in kinds:
            raise UserError(f"{path}: unknown key {key!r}; known keys: {', '.join(sorted(kinds))}")
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
