"""Reasons for rejecting an object that asks to be scraped."""

import re
from enum import StrEnum

_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")


class Reason(StrEnum):
    """Causes of rejections: a fixed set, so that they can be label values of a metric."""

    NO_IP = "no_ip"
    INVALID_IP = "invalid_ip"
    NO_PORT = "no_port"
    AMBIGUOUS_PORT = "ambiguous_port"
    INVALID_PORT = "invalid_port"
    UNKNOWN_PORT_NAME = "unknown_port_name"
    TOO_MANY_PORTS = "too_many_ports"
    UNDECLARED_PORT = "undeclared_port"
    NO_HOST_IP = "no_host_ip"
    NOT_PROXIED = "not_proxied"
    INVALID_PATH = "invalid_path"
    INVALID_SCHEME = "invalid_scheme"
    INVALID_PARAM = "invalid_param"
    INVALID_INTERVAL = "invalid_interval"
    META_TOO_LONG = "meta_too_long"
    META_TOO_MANY = "meta_too_many"
    INVALID_META = "invalid_meta"
    EMPTY_NAME = "empty_name"
    INVALID_NAME = "invalid_name"
    NAME_TOO_LONG = "name_too_long"
    NAME_TAKEN = "name_taken"
    INVALID_TAG = "invalid_tag"
    NO_ADDRESS = "no_address"
    ADDRESS_TAKEN = "address_taken"
    ID_TAKEN = "id_taken"
    UNDECODABLE = "undecodable"


class Note(StrEnum):
    """Ways in which a target differs from what its object asks for: label values of a metric."""

    INTERVAL_RAISED = "interval_raised"


class Rejected(Exception):
    """An object asks for a target that cannot be made; `targets.resolve` turns it into a `Rejection`."""

    def __init__(self, reason: Reason, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason
        self.detail = detail


def has_control(text: str) -> bool:
    """Return whether a text has control characters, line separators or lone surrogates."""
    return _CONTROL.search(text) is not None


def quoted(text: str, most: int = 60) -> str:
    """Return untrusted text in quotes: one line, ASCII, at most `most` characters of it."""
    shown = ascii(text[:most])
    return f"{shown}…" if len(text) > most else shown
