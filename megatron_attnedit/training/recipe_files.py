"""A run is one recipe: YAML with Megatron's flag names, overridden by the command line.

Keys are the names with underscores, flags those with dashes.
"""

import argparse
import dataclasses
import difflib
import os
import typing
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml
from yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from megatron_attnedit.convert.json_files import shown
from megatron_attnedit.errors import UserError
from megatron_attnedit.files import read_input
from megatron_attnedit.training.options import flag_name
from megatron_attnedit.training.recipe import Recipe
from megatron_attnedit.training.renamed_options import add_old_flags, with_current_names

LARGEST_FILE = 256 * 1024  # bytes; YAML is read slowly, and a recipe is a page


def _field_types(cls: type[Recipe]) -> dict[str, Any]:
    kinds = typing.get_type_hints(cls)
    return {name: bool if kind == (bool | None) else kind for name, kind in kinds.items()}


def _checked(name: str, value: Any, kind: Any, where: str) -> Any:
    """A YAML value of the field's type; numbers such as ``1e-4`` come as text from YAML."""
    wanted = typing.get_origin(kind) or kind
    if wanted is float and isinstance(value, int | str) and not isinstance(value, bool):
        try:
            return float(value)
        except (ValueError, OverflowError):
            pass
    if wanted is list and isinstance(value, list | str):
        items = value if isinstance(value, list) else [value]
        if all(isinstance(item, str | int | float) for item in items) and True not in items:
            return [str(item) for item in items]
    if isinstance(value, wanted) and not (wanted is int and isinstance(value, bool)):
        return value
    raise UserError(
        f"{where}: {name} is {shown(value)}, expected {getattr(wanted, '__name__', wanted)}"
    )


class _FlatLoader(yaml.SafeLoader):
    """Reads no further where values are inside of values: PyYAML's time grows with their square."""

    _depth = 0

    def compose_node(self, parent: Node | None, index: int) -> Node | None:
        self._depth += 1
        if self._depth > 3:  # the keys, a value's list, its entries
            raise UserError("values inside of values, too deep for a recipe")
        try:
            return super().compose_node(parent, index)
        finally:
            self._depth -= 1


def _check_shape(root: Node | None) -> None:
    """Keys and plain values, each key once: PyYAML would keep the last value without a word.

    Values inside of values are refused before anything is made of them: a few lines of YAML can
    name each other, and stand for more than a memory holds.

    Raises:
        UserError: names the key.
    """
    if root is None:
        return
    if not isinstance(root, MappingNode):
        raise UserError("expected keys and values")
    seen = set()
    for key, value in root.value:
        if not isinstance(key, ScalarNode):
            raise UserError("expected keys that are words")
        name = shown(key.value)
        if key.value in seen:
            raise UserError(f"key {name} is there more than once")
        seen.add(key.value)
        parts = value.value if isinstance(value, SequenceNode) else [value]
        if not all(isinstance(part, ScalarNode) for part in parts):
            raise UserError(f"{name} holds keys or lists, expected a value or a list of values")


def _suggestion(key: Any, known: Iterable[str]) -> str:
    """The known key that was probably meant, else all of them."""
    names = sorted(known)
    close = difflib.get_close_matches(str(key).lower().replace("-", "_"), names, n=1)
    return f"did you mean {close[0]!r}?" if close else f"known keys: {', '.join(names)}"


def _read_yaml(path: Path) -> Any:
    """What a YAML file holds: keys, each once, and plain values.

    Raises:
        UserError: it holds something else.
    """
    try:
        if (size := path.stat().st_size) > LARGEST_FILE:
            raise UserError(f"{size:,} bytes; a recipe has at most {LARGEST_FILE:,}")
        loader = _FlatLoader(read_input(path))
        root = loader.get_single_node()
        _check_shape(root)
        return loader.construct_document(root) if root is not None else None
    except UserError as error:
        text = str(error)
        raise UserError(text if text.startswith(str(path)) else f"{path}: {text}") from None
    except (yaml.YAMLError, ValueError, TypeError) as error:  # of dates, numbers and sets, too
        text = " ".join(str(error).split())
        raise UserError(f"{path}: not valid YAML: {text[:300]}") from None


def read_recipe_file(cls: type[Recipe], file: str | Path) -> dict[str, Any]:
    """Keys and values of a YAML recipe.

    Raises:
        UserError: no such file, not YAML, a key unknown or repeated, or a value of another type.
    """
    path = Path(file)
    if not os.path.isfile(path):  # of a name that no file can have, too
        raise UserError(f"{path}: no such file")
    content = _read_yaml(path) or {}
    kinds = _field_types(cls)
    content = with_current_names(content, kinds, str(path))
    for key in content:
        if key not in kinds:
            raise UserError(f"{path}: unknown key {shown(key)}; {_suggestion(key, kinds)}")
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
        epilog="With --dry-run nothing is trained: layout, schedule and memory are checked and "
        "shown on any machine; --dry-run --help lists its flags.",
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
        parser.add_argument(flag_name(item.name), **kwargs)
    add_old_flags(parser, kinds)
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
