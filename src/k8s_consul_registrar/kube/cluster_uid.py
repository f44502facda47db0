"""The identity of the cluster behind the API server: the UID of the namespace kube-system."""

import asyncio
import time
from collections.abc import Callable
from typing import Protocol

from k8s_consul_registrar.errors import ClusterError

# The UID of this namespace stands for the cluster's identity, by a convention many tools share.
IDENTITY_NAMESPACE = "kube-system"


class NamespaceReader(Protocol):
    """Reads a namespace's UID."""

    async def namespace_uid(self, name: str) -> str | None:
        """Return the UID, None where it is hidden or missing; raises a ClusterError."""


class ClusterUid:
    """The cluster's UID, asked for whenever a source has reason to doubt it.

    Sources that doubt it together, having lost their connections together, share a question. `uid` is the
    last one seen, empty while none was; `on_change` hears each new one.
    """

    def __init__(
        self,
        client: NamespaceReader,
        on_change: Callable[[str], None] | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._client = client
        self._on_change = on_change
        self._clock = clock
        self._lock = asyncio.Lock()
        self._asked_at = float("-inf")
        self._answer: str | ClusterError = ""
        self._uid = ""

    @property
    def uid(self) -> str:
        """The last UID seen, empty while it is not known."""
        return self._uid

    @property
    def was_asked(self) -> bool:
        """True if the API server answered once, or could not be asked."""
        return self._asked_at > float("-inf")

    async def confirm(self) -> str:
        """Return the UID as it is now, empty where we may not see it; raises a ClusterError.

        A question that was asked before this call does not count.
        """
        called_at = self._clock()
        async with self._lock:
            if self._asked_at < called_at:
                asked_at = self._clock()
                self._answer = await self._ask()
                self._asked_at = asked_at
        if isinstance(self._answer, str):
            return self._answer
        raise self._answer

    async def _ask(self) -> str | ClusterError:
        try:
            uid = await self._client.namespace_uid(IDENTITY_NAMESPACE) or ""
        except ClusterError as error:
            return error
        if uid and uid != self._uid:
            self._uid = uid
            if self._on_change is not None:
                self._on_change(uid)
        return uid
