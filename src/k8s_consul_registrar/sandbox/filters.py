"""A subset of Consul's filter expressions (go-bexpr), over a record's JSON.

It has `and`, `or`, `not`, parentheses; `Selector == "v"`, `!=`, `"v" in Selector`, `not in`,
`Selector contains "v"`, `not contains`, `is empty`, `is not empty`, `matches` and `not matches`. A selector
walks the JSON by dots or `["key"]`. As in go-bexpr, a comparison with a key that a map lacks is false, and its
negation is true.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any

Predicate = Callable[[Mapping[str, Any]], bool]

_TOKEN = re.compile(
    r'\s*(?:(==|!=|\(|\))|"((?:[^"\\]|\\.)*)"|`([^`]*)`|([A-Za-z0-9_][\w.\-/]*(?:\["[^"]*"\])*))'
)
_MISSING = object()


class FilterError(ValueError):
    """An expression that cannot be parsed, or names a field that does not exist."""


def parse(expression: str, fields: frozenset[str]) -> Predicate:
    """Return the predicate of an expression; `fields` are the names that a selector may begin with."""
    parser = _Parser(_tokens(expression), fields)
    predicate = parser.either()
    if parser.peek() is not None:
        raise FilterError(f"no match found, expected: end of expression, not {parser.peek()}")
    return predicate


def _tokens(expression: str) -> list[tuple[str, str]]:
    tokens, position = [], 0
    while expression[position:].strip():
        match = _TOKEN.match(expression, position)
        if match is None:
            raise FilterError(f"no match found at {position + 1}")
        symbol, quoted, raw, word = match.groups()
        if symbol:
            tokens.append(("symbol", symbol))
        elif word:
            tokens.append(("word", word))
        else:
            tokens.append(("value", raw if quoted is None else re.sub(r"\\(.)", r"\1", quoted)))
        position = match.end()
    return tokens


class _Parser:
    """A recursive descent over the tokens; each method consumes the part that its predicate is of."""

    def __init__(self, tokens: list[tuple[str, str]], fields: frozenset[str]) -> None:
        self._tokens = tokens
        self._fields = fields
        self._position = 0

    def peek(self, offset: int = 0) -> tuple[str, str] | None:
        position = self._position + offset
        return self._tokens[position] if position < len(self._tokens) else None

    def either(self) -> Predicate:
        left = self._both()
        while self._take("word", "or"):
            left = _or(left, self._both())
        return left

    def _both(self) -> Predicate:
        left = self._negation()
        while self._take("word", "and"):
            left = _and(left, self._negation())
        return left

    def _negation(self) -> Predicate:
        if self._take("word", "not"):
            return _not(self._negation())
        if self._take("symbol", "("):
            inner = self.either()
            self._expect("symbol", ")")
            return inner
        return self._match()

    def _match(self) -> Predicate:
        following = self.peek(1)
        is_membership = following == ("word", "in") or (
            following == ("word", "not") and self.peek(2) == ("word", "in")
        )
        if is_membership:
            value = self._value()
            is_negated = self._take("word", "not")
            self._expect("word", "in")
            return _maybe_not(_contains(self._selector(), value), is_negated=is_negated)
        selector = self._selector()
        if self._take("symbol", "=="):
            return _equals(selector, self._value())
        if self._take("symbol", "!="):
            return _not(_equals(selector, self._value()))
        if self._take("word", "is"):
            is_negated = self._take("word", "not")
            self._expect("word", "empty")
            return _maybe_not(lambda record: not _found(record, selector, ()), is_negated=is_negated)
        is_negated = self._take("word", "not")
        if self._take("word", "contains"):
            return _maybe_not(_contains(selector, self._value()), is_negated=is_negated)
        self._expect("word", "matches")
        return _maybe_not(_matches(selector, re.compile(self._value())), is_negated=is_negated)

    def _selector(self) -> tuple[str, ...]:
        kind, text = self._next()
        if kind != "word":
            raise FilterError(f"expected a selector, not {text!r}")
        names = tuple(quoted or plain for quoted, plain in re.findall(r'\["([^"]*)"\]|([^.\[\]]+)', text))
        if names[0] not in self._fields:
            raise FilterError(f'Selector "{text}" is not valid')
        return names

    def _value(self) -> str:
        kind, text = self._next()
        if kind == "symbol":
            raise FilterError(f"expected a value, not {text!r}")
        return text

    def _take(self, kind: str, text: str) -> bool:
        if self.peek() != (kind, text):
            return False
        self._position += 1
        return True

    def _expect(self, kind: str, text: str) -> None:
        if not self._take(kind, text):
            raise FilterError(f"expected {text!r}")

    def _next(self) -> tuple[str, str]:
        if (token := self.peek()) is None:
            raise FilterError("the expression ends too soon")
        self._position += 1
        return token


def _found(record: Mapping[str, Any], selector: tuple[str, ...], default: Any = _MISSING) -> Any:
    value: Any = record
    for name in selector:
        if not isinstance(value, Mapping) or name not in value:
            return default
        value = value[name]
    return value


def _equals(selector: tuple[str, ...], wanted: str) -> Predicate:
    def holds(record: Mapping[str, Any]) -> bool:
        value = _found(record, selector)
        if isinstance(value, bool):
            return wanted.lower() == str(value).lower()
        return value is not _MISSING and str(value) == wanted

    return holds


def _contains(selector: tuple[str, ...], wanted: str) -> Predicate:
    return lambda record: wanted in (_found(record, selector, ()) or ())


def _matches(selector: tuple[str, ...], pattern: re.Pattern[str]) -> Predicate:
    return lambda record: pattern.search(str(_found(record, selector, ""))) is not None


def _and(left: Predicate, right: Predicate) -> Predicate:
    return lambda record: left(record) and right(record)


def _or(left: Predicate, right: Predicate) -> Predicate:
    return lambda record: left(record) or right(record)


def _not(inner: Predicate) -> Predicate:
    return lambda record: not inner(record)


def _maybe_not(inner: Predicate, *, is_negated: bool) -> Predicate:
    return _not(inner) if is_negated else inner
