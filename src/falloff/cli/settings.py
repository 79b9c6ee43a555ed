"""``--set name=value``: text to the settings of methods and their schedules."""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Iterable
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Literal, Union, get_args, get_origin, get_type_hints

from falloff.cli.errors import USAGE, CommandError

if TYPE_CHECKING:
    from falloff.methods.base import Method
    from falloff.schedule import Schedule


@dataclasses.dataclass(frozen=True)
class Chosen:
    """A method and the schedule that goes with it."""

    method: Method
    schedule: Schedule


def choose(name: str, given: Iterable[str]) -> Chosen:
    """The named method with its settings, each ``"name=value"``. Raises ``CommandError`` with what is legal."""
    return choose_all([name], given)[0]


def choose_all(names: Iterable[str], given: Iterable[str]) -> list[Chosen]:
    """Several methods; each takes those settings that it has, and every setting must be one method's at least."""
    from falloff.methods import METHODS
    from falloff.schedule import Schedule

    kinds: list[type[Method]] = []
    for name in names:
        if name not in METHODS:
            raise CommandError(f"unknown method {name!r}; choose one of {', '.join(sorted(METHODS))}", USAGE)
        kinds.append(METHODS[name])
    pairs = [_split(text) for text in given]
    for setting, _ in pairs:
        known = [field for kind in (*kinds, Schedule) for field in _hints(kind)]
        if setting not in known:
            owners = " and ".join(kind.name for kind in kinds)
            raise CommandError(f"{owners} has no setting {setting!r}; legal are {', '.join(known)}", USAGE)
    return [Chosen(_made(kind, kind.name, {}, pairs), _schedule(kind, pairs)) for kind in kinds]


def _schedule(kind: type[Method], pairs: list[tuple[str, str]]) -> Schedule:
    from falloff.schedule import Schedule

    made: Schedule = _made(Schedule, kind.name, dataclasses.asdict(kind.schedule), pairs)
    return made


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
    return {int: "a whole number", float: "a number", bool: "true or false"}.get(hint, "text")


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
