"""Text to methods, their settings and schedules: ``--set name=value``, ``radial(decay=0.5)``, ``recipe.yaml``."""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Iterable, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

from falloff.cli.errors import USAGE, CommandError, told

if TYPE_CHECKING:
    from falloff.methods.base import Method
    from falloff.recipe import Recipe
    from falloff.schedule import Schedule


@dataclasses.dataclass(frozen=True)
class Chosen:
    """What to run, a recipe where one was given, and the schedule that goes with it."""

    method: Method | Recipe
    schedule: Schedule


def choose(text: str, given: Iterable[str]) -> Chosen:
    """One method with its settings, each ``"name=value"``. Raises ``CommandError`` with what is legal."""
    return choose_all([text], given)[0]


def choose_all(texts: Sequence[str], given: Iterable[str]) -> list[Chosen]:
    """Several methods, each a name, a name with settings of its own in parentheses, or a recipe's file.

    Of the ``given`` settings each takes those that it has, and every one must be one method's at least.
    """
    pairs = [_split(text) for text in given]
    asked = [_asked(text) for text in texts]
    _check_known([each.kind for each in asked], pairs)
    return [_chosen(each, pairs) for each in asked]


def parts(text: str) -> list[str]:
    """A list with commas between, of which those inside parentheses count for nothing."""
    depth, found = 0, [""]
    for letter in text:
        depth += {"(": 1, ")": -1}.get(letter, 0)
        if letter == "," and depth == 0:
            found.append("")
        else:
            found[-1] += letter
    return [part.strip() for part in found]


class _Asked(NamedTuple):
    """A kind of method, and settings of its own: those of a recipe, or in parentheses."""

    kind: type[Method]
    recipe: Recipe | None = None
    own: Sequence[tuple[str, str]] = ()


def _asked(text: str) -> _Asked:
    from falloff.methods import METHODS

    if text.endswith((".yaml", ".yml")):
        recipe = _recipe(text)
        return _Asked(type(recipe.method), recipe)
    name, opened, inside = text.partition("(")
    if name not in METHODS:
        known = ", ".join(sorted(METHODS))
        raise CommandError(f"unknown method {name!r}; choose one of {known}, or a recipe's .yaml file", USAGE)
    if not opened:
        return _Asked(METHODS[name])
    if not inside.endswith(")"):
        raise CommandError(f"{text!r} must end in ')', such as radial(decay=0.5)", USAGE)
    own = [_split(part) for part in _rejoined(inside[:-1])]
    _check_known([METHODS[name]], own)
    return _Asked(METHODS[name], own=own)


def _recipe(file: str) -> Recipe:
    from falloff.recipe import Recipe, RecipeError

    with told(RecipeError, code=USAGE), told(OSError, before="cannot read the recipe: ", code=USAGE):
        return Recipe.load(file)


def _rejoined(text: str) -> list[str]:
    """Settings with commas between, whose values may hold commas too: a part without = goes on with the value."""
    found: list[str] = []
    for part in text.split(","):
        if "=" in part or not found:
            found.append(part.strip())
        else:
            found[-1] += "," + part.strip()
    return found


def _check_known(kinds: Sequence[type[Method]], pairs: Iterable[tuple[str, str]]) -> None:
    from falloff.schedule import Schedule

    for setting, _ in pairs:
        known = [field for kind in (*kinds, Schedule) for field in _hints(kind)]
        if setting not in known:
            owners = " and ".join(dict.fromkeys(kind.name for kind in kinds))
            raise CommandError(f"{owners} has no setting {setting!r}; legal are {', '.join(known)}", USAGE)


def _chosen(asked: _Asked, pairs: list[tuple[str, str]]) -> Chosen:
    """What is set for all methods stands in for a recipe's, and what is set for one stands in for that."""
    from falloff.schedule import Schedule

    kind, recipe = asked.kind, asked.recipe
    settings = recipe.method.settings() if recipe else {}
    schedule = recipe.schedule if recipe else kind.schedule
    pairs = [*pairs, *asked.own]
    method = _made(kind, kind.name, settings, pairs)
    amended = _made(Schedule, kind.name, dataclasses.asdict(schedule), pairs)
    if recipe is not None:
        method = dataclasses.replace(recipe, method=method, schedule=amended)
    return Chosen(method, amended)


def _made(kind: Any, method: str, defaults: dict[str, Any], pairs: list[tuple[str, str]]) -> Any:
    hints = _hints(kind)
    values = {name: parsed(name, text, hints[name]) for name, text in pairs if name in hints}
    try:
        return kind(**{**defaults, **values})
    except (TypeError, ValueError) as error:
        raise CommandError(f"{error}; see 'falloff methods {method}'", USAGE) from error


def parsed(name: str, text: str, hint: Any) -> Any:
    """A setting's value from text, by its type. Raises ``CommandError`` that names the types it takes."""
    try:
        return _as(text, hint)
    except ValueError as error:
        raise CommandError(f"{name} = {text!r} must be {words(hint)}", USAGE) from error


def words(hint: Any) -> str:
    """A setting's type for people."""
    if get_origin(hint) in (Union, types.UnionType):
        return " or ".join(map(words, get_args(hint)))
    if get_origin(hint) is Literal:
        return " or ".join(map(str, get_args(hint)))
    if get_origin(hint) is tuple:
        many = {int: "whole numbers", float: "numbers"}.get(get_args(hint)[0], "names")
        return f"{many} with commas between"
    plain = {int: "a whole number", float: "a number", bool: "true or false", type(None): "none"}
    return plain.get(hint, "text")


def _as(text: str, hint: Any) -> Any:
    """Raises ``ValueError`` for text that is none of this type."""
    if get_origin(hint) in (Union, types.UnionType):
        for option in get_args(hint):
            with suppress(ValueError):
                return _as(text, option)
        _refuse(text)
    if get_origin(hint) is Literal:
        return get_args(hint)[get_args(hint).index(text)] if text in get_args(hint) else _refuse(text)
    if get_origin(hint) is tuple:
        return tuple(_as(part.strip(), get_args(hint)[0]) for part in text.split(",") if part.strip())
    if hint is type(None):
        return None if text.lower() == "none" else _refuse(text)
    if hint is bool:
        return {"true": True, "false": False}[text] if text in ("true", "false") else _refuse(text)
    return hint(text)


def _refuse(text: str) -> None:
    raise ValueError(text)


def _hints(kind: Any) -> dict[str, Any]:
    hints = get_type_hints(kind)
    return {field.name: hints[field.name] for field in dataclasses.fields(kind)}


def _split(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise CommandError(f"--set {text!r} must read NAME=VALUE, such as decay=0.5", USAGE)
    return name.strip(), value.strip()
