"""Answers of Consul: whole or streamed, what their headers say, and the errors that refusals stand for."""

from collections.abc import AsyncIterator, Mapping

import msgspec

from k8s_consul_registrar.consul.health import TOO_MANY_REQUESTS
from k8s_consul_registrar.errors import (
    ConsulBusy,
    ConsulError,
    ConsulForbidden,
    ConsulRefused,
    ConsulTokenUnknown,
)

# An error's text is Consul's and may quote what we sent, so it is shown shortened.
LONGEST_PROBLEM = 200
LONGEST_HEAD = 4 * LONGEST_PROBLEM
MOST_INDEX = 2**63 - 1
# What Consul says of a token that it does not know; the second is of later versions.
_TOKEN_UNKNOWN = ("acl not found", "token not found", "token does not exist")


class ConsulAnswer(msgspec.Struct, frozen=True):
    """A whole answer."""

    body: bytes
    headers: Mapping[str, str]
    status: int = 200

    @property
    def index(self) -> int:
        """The index of the state that a read shows (`X-Consul-Index`), 0 where the answer names none."""
        return index_of(self.headers)

    @property
    def text(self) -> str:
        """The beginning of the body, fit for a log line."""
        text = self.body[:LONGEST_HEAD].decode("utf-8", "replace").strip()
        return "".join(char if char.isprintable() else " " for char in text)


class StreamedAnswer(msgspec.Struct, frozen=True):
    """A successful answer whose body is still coming; `chunks` raises `ConsulUnreachable` if it breaks off."""

    chunks: AsyncIterator[bytes]
    headers: Mapping[str, str]


def number_of(text: str) -> int | None:
    """Read a number of a header; None for what is none, or is absurd."""
    is_number = text.isascii() and text.isdigit() and len(text) <= len(str(MOST_INDEX))
    return int(text) if is_number and int(text) <= MOST_INDEX else None


def index_of(headers: Mapping[str, str]) -> int:
    """Return the index that a read's headers name, 0 where they name none."""
    return number_of(headers.get("X-Consul-Index", "")) or 0


def is_filtered(headers: Mapping[str, str]) -> bool:
    """Return whether Consul says that it left out what the token may not see; versions before 1.13 do not."""
    return headers.get("X-Consul-Results-Filtered-By-ACLs", "") == "true"


def refusal(status: int, path: str, answer: ConsulAnswer) -> ConsulError:
    """Turn an answer that is no success into the error that says what to do about it."""
    text = answer.text[:LONGEST_PROBLEM]
    problem = f"Consul answers {status} to {path.partition('?')[0]}: {text or 'without a reason'}"
    if status == 403 and any(known in text.lower() for known in _TOKEN_UNKNOWN):
        return ConsulTokenUnknown(f"{problem} (Consul does not know the token)")
    if status == 403:
        return ConsulForbidden(f"{problem} (the token lacks a right, or is not known)")
    if status == TOO_MANY_REQUESTS or status >= 500:
        retry_after = number_of(answer.headers.get("Retry-After", ""))
        return ConsulBusy(problem, None if retry_after is None else float(retry_after), status)
    return ConsulRefused(problem, status)
