"""Annotations that say how a Pod or Service is scraped, in one set or several numbered ones. Ports stay texts."""

import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from types import MappingProxyType
from typing import NamedTuple
from urllib.parse import parse_qsl

import msgspec

from k8s_consul_registrar.errors import Note, Reason, Rejected, has_control, quoted
from k8s_consul_registrar.targets.meta import PARAM_PREFIX

DEFAULT_PATH = "/metrics"
MOST_PARAMS = 40
# Pods of one template have annotations of equal names, so those that count are found once for each template. The
# limits keep a user who may create Pods from filling the memory.
TEMPLATES, MOST_KEYS_KEPT = 256, 24

# The further sets of annotations are numbered 2 to 16: `port2`, `path2`, `param2-<name>`.
_NUMBER = r"(?:[2-9]|1[0-6])?"
_OF_SCRAPE = re.compile(
    rf"(?:port|path|scheme|scrape[-_]interval|scrape[-_]timeout|scrape-slow){_NUMBER}|param{_NUMBER}-.*",
    re.DOTALL,
)
# The annotations that begin another set: the rest of it comes from the first one.
_BEGINS_SET = re.compile(r"(?:port|path)([0-9]+)")
# Prometheus reads a parameter from the label `__param_<name>`, so the name must be valid in a label name.
_PARAM_NAME = re.compile(r"[A-Za-z0-9_]{1,100}")
# The start of a URL that names a host: a scheme, `//host/path` or `//host:80` (RFC 3986, 4.2). `//metrics` is
# only a doubled slash, and in `/http://host` the slash says that all of it is a path.
_URL_START = re.compile(r"https?:|[a-z][a-z0-9+.-]*:[/\\]{2}|//[^/]+/.|//[^/]*:[0-9]", re.IGNORECASE)

Pairs = tuple[tuple[str, str], ...]
_RAISED = (Note.INTERVAL_RAISED.value,)


# Each unit once at most, in this order (prometheus/common, model/time.go); a year has 365 days.
_UNITS = {
    "y": 31_536_000_000,
    "w": 604_800_000,
    "d": 86_400_000,
    "h": 3_600_000,
    "m": 60_000,
    "s": 1000,
    "ms": 1,
}  # milliseconds
_DURATION = re.compile("".join(f"(?:([0-9]+){unit})?" for unit in _UNITS))
# Prometheus counts in 64-bit nanoseconds.
_LONGEST_DURATION = (2**63 - 1) // 1_000_000  # milliseconds
_LONGEST_TEXT = 100


class Duration(NamedTuple):
    """A duration and the text that it was given as."""

    text: str
    milliseconds: int


def parse_duration(text: str) -> Duration:
    """Parse a duration; raises ValueError for what Prometheus does not take. `0` needs no unit."""
    if text == "0":
        return Duration(text, 0)
    match = _DURATION.fullmatch(text) if 0 < len(text) <= _LONGEST_TEXT else None
    if match is None:
        raise ValueError("is not a duration such as 30s or 1m30s")
    counts = zip(match.groups(default="0"), _UNITS.values(), strict=True)
    milliseconds = sum(int(count) * unit for count, unit in counts)
    if milliseconds > _LONGEST_DURATION:
        raise ValueError("is longer than Prometheus can count, 292 years")
    return Duration(text, milliseconds)


class IntervalRules(msgspec.Struct, frozen=True):
    """The operator's settings for intervals; without a `default` a timeout needs an interval beside it."""

    least: Duration = Duration("10s", 10_000)
    default: Duration | None = None
    slow: Duration = Duration("5m", 300_000)
    slow_timeout: Duration = Duration("30s", 30_000)


class ScrapeTiming(NamedTuple):
    """The interval and timeout of a scrape, empty where the collector decides."""

    interval: str = ""
    timeout: str = ""
    is_raised: bool = False  # the annotated interval was below the operator's least

    @property
    def meta(self) -> dict[str, str]:
        """The text that a service carries about it, if any."""
        named = {"scrape_interval": self.interval, "scrape_timeout": self.timeout}
        return {key: text for key, text in named.items() if text}


class ScrapeSet(msgspec.Struct, frozen=True, gc=False):
    """One set of annotations; `port` is the annotated text, None without one, and the values of `params` are decoded.

    `meta` is what a service says of it; values can be empty.
    """

    port: str | None
    path: str
    params: Mapping[str, str]
    scheme: str
    timing: ScrapeTiming
    meta: Mapping[str, str]

    @property
    def notes(self) -> tuple[str, ...]:
        """In what its target differs from the annotations."""
        return _RAISED if self.timing.is_raised else ()


class _Keys(NamedTuple):
    scrape: str
    slow: str


@lru_cache(maxsize=4)
def _keys(prefix: str) -> _Keys:
    return _Keys(f"{prefix}scrape", f"{prefix}scrape-slow")


def asks_for_scrapes(annotations: Mapping[str, str], prefix: str) -> bool:
    """Return True for `scrape: "true"`, and for `scrape-slow: "true"` without `scrape`, as in the Prometheus chart."""
    keys = _keys(prefix)
    given = annotations.get(keys.scrape)
    return given == "true" or (given is None and annotations.get(keys.slow) == "true")


def scrape_annotations(annotations: Mapping[str, str], prefix: str) -> Pairs:
    """Return the annotations that `parse_scrapes` reads, without the prefix of their names."""
    find = _names if len(annotations) <= MOST_KEYS_KEPT else _names.__wrapped__
    return tuple([(name, annotations[key]) for key, name in find(tuple(annotations), prefix)])


@lru_cache(maxsize=TEMPLATES)
def _names(keys: tuple[str, ...], prefix: str) -> Pairs:
    """Return the keys that say how to scrape, each with its name without the prefix."""
    start = len(prefix)
    return tuple(
        [(key, key[start:]) for key in keys if key.startswith(prefix) and _OF_SCRAPE.fullmatch(key, start)]
    )


def parse_scrapes(pairs: Pairs, intervals: IntervalRules | None) -> tuple[ScrapeSet, ...]:
    """Parse the first set of annotations and each numbered one; raises `Rejected` for the first mistake.

    `intervals` is None where another program decides on intervals, so that mistakes in them do not count.
    """
    texts = dict(pairs)
    first = _set_of(texts, "")
    numbers = {match[1] for name in texts if (match := _BEGINS_SET.fullmatch(name))}
    further = [_inherit(first, _set_of(texts, number)) for number in sorted(numbers, key=int)]
    return tuple([_parse(one, intervals) for one in (first, *further)])


class _Set(msgspec.Struct, frozen=True, gc=False):
    """The texts of one set, None where there is none; `inherited` are parameters that a query replaces."""

    number: str
    port: str | None
    path: str | None
    scheme: str | None
    interval: str | None
    timeout: str | None
    slow: str | None
    named: Mapping[str, str]
    inherited: Mapping[str, str] = {}


def _set_of(texts: Mapping[str, str], number: str) -> _Set:
    start = f"param{number}-"
    return _Set(
        number=number,
        port=texts.get(f"port{number}"),
        path=texts.get(f"path{number}"),
        scheme=texts.get(f"scheme{number}"),
        interval=texts.get(f"scrape-interval{number}", texts.get(f"scrape_interval{number}")),
        timeout=texts.get(f"scrape-timeout{number}", texts.get(f"scrape_timeout{number}")),
        slow=texts.get(f"scrape-slow{number}"),
        named={name[len(start) :]: texts[name] for name in sorted(texts) if name.startswith(start)},
    )


def _inherit(first: _Set, own: _Set) -> _Set:
    """Return a numbered set with what the first one says where it says nothing itself.

    A set that is slow on its own takes no interval or timeout from the first.
    """
    base = _Set("", *(None,) * 6, {}) if own.slow == "true" else first
    return _Set(
        number=own.number,
        port=_either(own.port, first.port),
        path=_either(own.path, first.path),
        scheme=_either(own.scheme, first.scheme),
        interval=_either(own.interval, base.interval),
        timeout=_either(own.timeout, base.timeout),
        slow=_either(own.slow, first.slow),
        named=own.named,
        inherited={name: value for name, value in first.named.items() if name not in own.named},
    )


def _either(own: str | None, first: str | None) -> str | None:
    return first if own is None else own


def _parse(given: _Set, intervals: IntervalRules | None) -> ScrapeSet:
    path, query = scrape_path(DEFAULT_PATH if given.path is None else given.path)
    in_query = {name for name, _ in query}
    inherited = {name: value for name, value in given.inherited.items() if name not in in_query}
    params = scrape_params(query, sorted({**inherited, **given.named}.items()))
    scheme = scrape_scheme(given.scheme or "")
    timing = ScrapeTiming() if intervals is None else _timing(given, intervals)
    meta = {f"{PARAM_PREFIX}{name}": value for name, value in params.items()}
    meta |= {"metrics_path": path, "scheme": scheme} | timing.meta
    return ScrapeSet(given.port, path, MappingProxyType(params), scheme, timing, meta)


def scrape_path(text: str) -> tuple[str, list[tuple[str, str]]]:
    """Split a path annotation into the path, with a leading slash, and the parameters of its query.

    Raises `Rejected` for control characters, for a URL in place of a path, and for a query that is too long
    or not UTF-8 in percent encoding. Everything else in the path is kept: Prometheus escapes it.
    """
    text = text.strip()
    if has_control(text):
        raise Rejected(Reason.INVALID_PATH, f"the path {quoted(text)} has control characters")
    path, _, query = text.partition("?")
    if _URL_START.match(path):
        raise Rejected(
            Reason.INVALID_PATH, f"{quoted(text)} is a URL: give the path only, such as {DEFAULT_PATH}"
        )
    path = path or DEFAULT_PATH
    if not path.startswith("/"):
        path = f"/{path}"
    if not query:
        return path, []
    try:
        pairs = parse_qsl(query, keep_blank_values=True, errors="strict", max_num_fields=MOST_PARAMS)
    except (ValueError, UnicodeError):
        raise Rejected(Reason.INVALID_PATH, f"the query of {quoted(text)} is too long or not UTF-8") from None
    return path, pairs


def scrape_params(query: Sequence[tuple[str, str]], named: Sequence[tuple[str, str]]) -> dict[str, str]:
    """Merge the parameters of the query and of the annotations.

    Raises `Rejected` for a name that is not valid in Prometheus, a repeated name and control characters.
    """
    params: dict[str, str] = {}
    for name, value in (*query, *named):
        if not _PARAM_NAME.fullmatch(name):
            raise Rejected(
                Reason.INVALID_PARAM, f"the parameter name {quoted(name)} is not made of A-Z a-z 0-9 _"
            )
        if name in params:
            raise Rejected(Reason.INVALID_PARAM, f"the parameter {name} is given twice")
        if has_control(value):
            raise Rejected(Reason.INVALID_PARAM, f"the parameter {name} has control characters")
        params[name] = value
    return params


def scrape_scheme(text: str) -> str:
    """Return `http` (the default) or `https`; raises `Rejected` for anything else."""
    scheme = text.strip().lower() or "http"
    if scheme not in ("http", "https"):
        raise Rejected(Reason.INVALID_SCHEME, f"the scheme {quoted(text)} is neither http nor https")
    return scheme


def _timing(given: _Set, rules: IntervalRules) -> ScrapeTiming:
    """Return the interval and timeout of a set; raises `Rejected` for a pair that Prometheus would not take."""
    interval = _duration("scrape-interval", given.number, given.interval)
    timeout = _duration("scrape-timeout", given.number, given.timeout)
    if given.slow == "true":
        interval = interval or rules.slow
        timeout = timeout or min(rules.slow_timeout, interval, key=lambda one: one.milliseconds)
    if timeout is not None:
        _check_timeout(timeout, interval, given.number, rules)
    is_raised = interval is not None and interval.milliseconds < rules.least.milliseconds
    if is_raised:
        interval = rules.least
    return ScrapeTiming(interval.text if interval else "", timeout.text if timeout else "", is_raised)


def _duration(name: str, number: str, text: str | None) -> Duration | None:
    """Return an annotated duration above zero, None without one."""
    text = (text or "").strip()
    if not text:
        return None
    try:
        duration = parse_duration(text)
    except ValueError as error:
        raise Rejected(Reason.INVALID_INTERVAL, f"{name}{number} {quoted(text)} {error}") from None
    if not duration.milliseconds:
        raise Rejected(Reason.INVALID_INTERVAL, f"{name}{number} must be more than 0")
    return duration


def _check_timeout(timeout: Duration, interval: Duration | None, number: str, rules: IntervalRules) -> None:
    """Raise `Rejected` for a timeout over its interval: Prometheus drops such a target."""
    name, longest = f"scrape-timeout{number}", interval or rules.default
    if longest is None:
        raise Rejected(
            Reason.INVALID_INTERVAL,
            f"{name} needs scrape-interval{number} beside it, because SCRAPE_INTERVAL_DEFAULT is not set",
        )
    if timeout.milliseconds > longest.milliseconds:
        what = f"scrape-interval{number}" if interval else "SCRAPE_INTERVAL_DEFAULT"
        raise Rejected(
            Reason.INVALID_INTERVAL, f"{name} {timeout.text} is longer than {what}, {longest.text}"
        )
