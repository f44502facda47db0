"""Reads `prometheus.io/*`: path, query, scheme and ports, or the reason why not."""

import re
from collections.abc import Mapping, Sequence
from urllib.parse import parse_qsl

from k8s_consul_registrar.model import ContainerPort
from k8s_consul_registrar.targets.reasons import Reason, Refused
from k8s_consul_registrar.targets.text import has_control, quoted

DEFAULT_PATH = "/metrics"
PORT_NAMES = ("metrics", "http-metrics", "prometheus", "prom")
MOST_PARAMS = 40
# Each port of a Pod is a service; without a bound one annotation could ask for thousands.
MOST_PORTS = 16

# Prometheus takes a parameter's name from a label `__param_<name>`, so it must be part of a label's name.
_PARAM_NAME = re.compile(r"[A-Za-z0-9_]{1,100}")
_NUMBER = re.compile(r"[0-9]{1,9}")


def scrape_path(text: str) -> tuple[str, list[tuple[str, str]]]:
    """Split a path annotation into the path, with its leading slash, and its query's parameters.

    Raises `Refused` for control characters and for a query that is not UTF-8 in percent encoding.
    """
    text = text.strip()
    if has_control(text):
        raise Refused(Reason.INVALID_PATH, f"the path {quoted(text)} has control characters")
    path, _, query = text.partition("?")
    path = path or DEFAULT_PATH
    if not path.startswith("/"):
        path = f"/{path}"
    if not query:
        return path, []
    try:
        pairs = parse_qsl(query, keep_blank_values=True, errors="strict", max_num_fields=MOST_PARAMS)
    except (ValueError, UnicodeError):
        raise Refused(Reason.INVALID_PATH, f"the query of {quoted(text)} is too long or not UTF-8") from None
    return path, pairs


def named_params(annotations: Mapping[str, str], prefix: str) -> tuple[tuple[str, str], ...]:
    """Return the names and values of the annotations `<prefix>param-<name>`, sorted."""
    start = f"{prefix}param-"
    keys = [key for key in annotations if key.startswith(start)]
    return tuple([(key[len(start) :], annotations[key]) for key in sorted(keys)]) if keys else ()


def scrape_params(query: Sequence[tuple[str, str]], named: Sequence[tuple[str, str]]) -> dict[str, str]:
    """Gather the parameters of the query and of `named_params`.

    Raises `Refused` for a name Prometheus cannot take or one that is given twice.
    """
    params: dict[str, str] = {}
    for name, value in (*query, *named):
        if not _PARAM_NAME.fullmatch(name):
            raise Refused(
                Reason.INVALID_PARAM, f"the parameter name {quoted(name)} is not made of A-Z a-z 0-9 _"
            )
        if name in params:
            raise Refused(Reason.INVALID_PARAM, f"the parameter {name} is given twice")
        if has_control(value):
            raise Refused(Reason.INVALID_PARAM, f"the parameter {name} has control characters")
        params[name] = value
    return params


def scrape_scheme(text: str) -> str:
    """Return `http` (the default) or `https`; raises `Refused` for anything else."""
    scheme = text.strip().lower() or "http"
    if scheme not in ("http", "https"):
        raise Refused(Reason.INVALID_SCHEME, f"the scheme {quoted(text)} is neither http nor https")
    return scheme


def scrape_ports(text: str | None, ports: Sequence[ContainerPort]) -> tuple[int, ...]:
    """Find the ports: the annotation's numbers or port names, commas between, else the one that can be meant.

    Repeats are dropped, the order is kept. Without an annotation it is the port named metrics,
    http-metrics, prometheus or prom, else the only TCP port. Raises `Refused` where none or more than one
    is left, and for an annotation any entry of which cannot be honoured.
    """
    if text is not None and text.strip():
        entries = [entry.strip() for entry in text.split(",")]
        numbers = dict.fromkeys(_annotated_port(entry, ports) for entry in entries)
        if len(numbers) > MOST_PORTS:
            raise Refused(Reason.TOO_MANY_PORTS, f"{len(numbers)} ports are more than {MOST_PORTS}")
        return tuple(numbers)
    return (_implied_port(ports),)


def _implied_port(ports: Sequence[ContainerPort]) -> int:
    for name in PORT_NAMES:
        for port in ports:
            if port.name == name and port.protocol == "TCP":
                return port.number
    numbers = {port.number for port in ports if port.protocol == "TCP"}
    if len(numbers) == 1:
        return numbers.pop()
    if numbers:
        raise Refused(
            Reason.AMBIGUOUS_PORT,
            f"there are {len(numbers)} TCP ports and none is named {', '.join(PORT_NAMES)}: annotate the port",
        )
    raise Refused(Reason.NO_PORT, "no port is annotated and no container declares a TCP port")


def _annotated_port(text: str, ports: Sequence[ContainerPort]) -> int:
    if _NUMBER.fullmatch(text):
        number = int(text)
        if 1 <= number <= 65535:
            return number
        raise Refused(Reason.INVALID_PORT, f"the port {text} is not between 1 and 65535")
    for port in ports:
        if text and port.name == text:
            return port.number
    raise Refused(
        Reason.UNKNOWN_PORT_NAME,
        f"the port {quoted(text)} is neither a number from 1 to 65535 nor the name of a container's port",
    )
