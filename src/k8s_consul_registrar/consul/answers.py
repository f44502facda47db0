"""What Consul answers, and what its refusals mean."""

from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass

from k8s_consul_registrar.errors import ConsulBusy, ConsulError, ConsulForbidden, ConsulRefused

# Of an error's text this much is shown: it is Consul's, and may quote what we sent.
LONGEST_PROBLEM = 200
# So many bytes of a refusal's body are enough for that.
LONGEST_HEAD = 4 * LONGEST_PROBLEM


@dataclass(frozen=True, slots=True)
class Answer:
    """An answer, whole."""

    body: bytes
    headers: Mapping[str, str]
    status: int = 200

    @property
    def index(self) -> int:
        """The index of the state that a read shows (`X-Consul-Index`), 0 where the answer names none."""
        return index_of(self.headers)


@dataclass(frozen=True, slots=True)
class StreamedAnswer:
    """A successful answer whose body is still coming; each raises `ConsulUnreachable` if it breaks off."""

    chunks: AsyncIterator[bytes]
    headers: Mapping[str, str]


def index_of(headers: Mapping[str, str]) -> int:
    """Return the index that a read's headers name, 0 where they name none."""
    text = headers.get("X-Consul-Index", "")
    return int(text) if text.isdecimal() else 0


def is_filtered(headers: Mapping[str, str]) -> bool:
    """Whether Consul says that it left out what the token may not see; versions before 1.13 do not say."""
    return headers.get("X-Consul-Results-Filtered-By-ACLs", "") == "true"


def refusal(status: int, path: str, answer: Answer) -> ConsulError:
    """Turn an answer that is no success into the error that says what to do about it."""
    text = answer.body[:LONGEST_HEAD].decode("utf-8", "replace").strip()
    text = "".join(char if char.isprintable() else " " for char in text)[:LONGEST_PROBLEM]
    problem = f"Consul answers {status} to {path.partition('?')[0]}: {text or 'without a reason'}"
    if status == 403:
        return ConsulForbidden(f"{problem} (the token lacks a right, or is not known)")
    if status == 429 or status >= 500:
        retry_after = answer.headers.get("Retry-After", "")
        return ConsulBusy(problem, float(retry_after) if retry_after.isdecimal() else None)
    return ConsulRefused(problem, status)
