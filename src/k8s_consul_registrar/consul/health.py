"""Consul's answers, and its health as they show it: reads and writes apart, one gate, one backoff.

Nothing else decides whether Consul is up. A caller that sends no request changes nothing here.
"""

import random
import time
from collections.abc import AsyncIterator, Callable, Mapping
from enum import Enum

import msgspec

from k8s_consul_registrar.backoff import Timing, delays
from k8s_consul_registrar.errors import (
    ConsulBusy,
    ConsulError,
    ConsulFenced,
    ConsulForbidden,
    ConsulRefused,
    ConsulTokenUnknown,
    ConsulUnreachable,
)

TOO_MANY_REQUESTS = 429
# A window this wide limits none of our clients (`client.CONNECTIONS`).
MOST_IN_FLIGHT = 50
# An error's text is Consul's and may quote what we sent, so it is shown shortened.
LONGEST_PROBLEM = 200
LONGEST_HEAD = 4 * LONGEST_PROBLEM
MOST_INDEX = 2**63 - 1
# Consul's words for a token that it does not know; the second is of later versions.
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
    """Read the number in a header; None if it is no number, or an absurd one."""
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


class RequestKind(Enum):
    """Reads and writes; a transaction that only reads is a read."""

    READ = "read"
    WRITE = "write"


class RequestOutcome(Enum):
    """The latest outcome of a kind of request."""

    NONE = "none"
    SUCCESS = "success"
    FAILURE = "failure"


class Attempt(msgspec.Struct, frozen=True):
    """One request that was sent; `in_flight` counts it and those beside it."""

    access: RequestKind
    began: float
    is_blocking: bool
    in_flight: int


def is_outage(error: ConsulError) -> bool:
    """Return whether an error is Consul's trouble: no answer, a 5xx, an exhausted 429, an unknown token.

    A refusal of one request (another 4xx, a missing right) is not, nor is our own fence.
    """
    return isinstance(error, (ConsulUnreachable, ConsulBusy, ConsulTokenUnknown))


class ConsulHealth:
    """The outcomes of one client's requests.

    `reads` and `writes` are the latest outcomes. A failed write is cleared by a successful write, or by
    `clear_writes_by_read`. `open_at` is the moment, on the monotonic clock, before which no new work should
    start: each failure of a request sent after the gate last opened doubles the delay, and the gate opens
    as soon as neither reads nor writes fail.
    """

    def __init__(
        self,
        timing: Timing,
        *,
        clock: Callable[[], float] = time.monotonic,
        pick: random.Random | None = None,
    ) -> None:
        self._timing = timing
        self._clock = clock
        self._pick = pick
        self._outcomes = dict.fromkeys(RequestKind, RequestOutcome.NONE)
        self._problems = dict.fromkeys(RequestKind, "")
        self._latest = RequestKind.READ  # of the latest failure
        self._has_succeeded = False
        self._in_flight = 0
        self.open_at = float("-inf")
        self._delays = delays(timing.retry_first, timing.retry_cap, pick=pick)
        # The congestion window, as in TCP: None for no limit. It doubles with each success below the
        # threshold and grows by one in each round above it.
        self._window: float | None = None
        self._threshold = float("inf")
        self._narrowed_at = float("-inf")

    @property
    def reads(self) -> RequestOutcome:
        """The latest outcome of a read."""
        return self._outcomes[RequestKind.READ]

    @property
    def writes(self) -> RequestOutcome:
        """The latest outcome of a write."""
        return self._outcomes[RequestKind.WRITE]

    @property
    def is_up(self) -> bool:
        """True if a request has succeeded and neither the latest read nor the latest write failed."""
        return self._has_succeeded and not self._is_failing

    @property
    def problem(self) -> str:
        """The text of the latest failure that still stands, empty where there is none."""
        if not self._is_failing:
            return ""
        other = RequestKind.WRITE if self._latest is RequestKind.READ else RequestKind.READ
        standing = (one for one in (self._latest, other) if self._outcomes[one] is RequestOutcome.FAILURE)
        return next((self._problems[one] for one in standing), "")

    def concurrency(self, limit: int) -> int:
        """Return how many requests may be in flight: `limit`, fewer after an outage or a 429, at least 1."""
        return limit if self._window is None else max(1, min(limit, int(self._window)))

    def begin(self, access: RequestKind, *, is_blocking: bool = False) -> Attempt:
        """Record that a request is sent; it must be followed by `end`."""
        if not is_blocking:
            self._in_flight += 1
        return Attempt(access, self._clock(), is_blocking, self._in_flight)

    def end(self, attempt: Attempt) -> None:
        """Record that a request is no longer in flight, with whatever outcome."""
        if not attempt.is_blocking:
            self._in_flight -= 1

    def succeeded(self, attempt: Attempt) -> None:
        """Record an answer that was read to its end."""
        self._has_succeeded = True
        self._outcomes[attempt.access] = RequestOutcome.SUCCESS
        if not self._is_failing:
            self._reset_gate()
        if not attempt.is_blocking:
            self._widen()

    def raised(self, attempt: Attempt, error: ConsulError, *, is_last: bool = True) -> None:
        """Record an error; with `is_last` false the request is sent again, and only a 429 narrows the window."""
        if isinstance(error, ConsulBusy) and error.status == TOO_MANY_REQUESTS:
            self._narrow(attempt)
        # A balancer ends blocking queries that are silent for long: that is no outage, and the next look tells.
        if not is_last or attempt.is_blocking or isinstance(error, ConsulFenced):
            return
        if is_outage(error):
            self._failed(attempt, error)
        elif attempt.access is RequestKind.READ and self.reads is RequestOutcome.FAILURE:
            # Consul answers again. A refused write proves nothing of the kind: Raft may not have seen it.
            self._outcomes[RequestKind.READ] = (
                RequestOutcome.SUCCESS if self._has_succeeded else RequestOutcome.NONE
            )
            if not self._is_failing:
                self._reset_gate()

    def clear_writes_by_read(self) -> None:
        """Forget a failed write after a consistent read, for a caller that has nothing left to write."""
        if self.writes is RequestOutcome.FAILURE and self.reads is RequestOutcome.SUCCESS:
            self._forget_write_failure()

    def excuse_write(self, error: ConsulBusy) -> None:
        """Forget a failed write that one service caused while others are written."""
        if self.writes is RequestOutcome.FAILURE and self._problems[RequestKind.WRITE] == str(error):
            self._forget_write_failure()

    @property
    def _is_failing(self) -> bool:
        return RequestOutcome.FAILURE in self._outcomes.values()

    def _failed(self, attempt: Attempt, error: ConsulError) -> None:
        self._outcomes[attempt.access] = RequestOutcome.FAILURE
        self._problems[attempt.access] = str(error)
        self._latest = attempt.access
        if attempt.began >= self.open_at:
            now = self._clock()
            delay = next(self._delays)
            if isinstance(error, ConsulBusy):
                delay = max(delay, min(error.retry_after or 0.0, self._timing.retry_after_cap))
            self.open_at = now + delay
            self._window, self._threshold = 1.0, float("inf")

    def _forget_write_failure(self) -> None:
        self._outcomes[RequestKind.WRITE] = RequestOutcome.SUCCESS
        if not self._is_failing:
            self._reset_gate()

    def _reset_gate(self) -> None:
        if self.open_at == float("-inf"):
            return
        self.open_at = float("-inf")
        self._delays = delays(self._timing.retry_first, self._timing.retry_cap, pick=self._pick)

    def _narrow(self, attempt: Attempt) -> None:
        """Halve the concurrency, once for all requests that were in flight together."""
        if attempt.began < self._narrowed_at:
            return
        self._narrowed_at = self._clock()
        in_use = attempt.in_flight if self._window is None else min(self._window, attempt.in_flight)
        self._window = self._threshold = max(1.0, in_use / 2)

    def _widen(self) -> None:
        if self._window is None:
            return
        is_below = self._window < self._threshold
        self._window = min(2 * self._window, self._threshold) if is_below else self._window + 1 / self._window
        if self._window >= MOST_IN_FLIGHT:
            self._window = None
