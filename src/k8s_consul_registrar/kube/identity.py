"""Which cluster answers: the UID of the namespace kube-system."""

import asyncio
import time
from collections.abc import Callable
from typing import Protocol

from k8s_consul_registrar.errors import ClusterError
from k8s_consul_registrar.kube.mirror import Mirror

# The UID of this namespace stands for the cluster's identity, by a convention many tools share.
IDENTITY_NAMESPACE = "kube-system"


class NamespaceReader(Protocol):
    """Reads a namespace's UID."""

    async def namespace_uid(self, name: str) -> str | None:
        """Return the UID, None where it is hidden or not there; raises a `ClusterError`."""
        ...


class AnyCluster:
    """Asks nobody, for those who own nothing that outlives a change of clusters."""

    async def confirm(self) -> str:
        """Return an empty text: it is not known which cluster answers."""
        return ""


class ClusterIdentity:
    """Asks which cluster answers, whenever there is reason to doubt it, and tells the mirror.

    Sources that doubt it together, having lost their connections together, share a question.
    """

    def __init__(
        self, client: NamespaceReader, mirror: Mirror, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._client = client
        self._mirror = mirror
        self._clock = clock
        self._lock = asyncio.Lock()
        self._asked_at = float("-inf")
        self._answer: str | ClusterError = ""

    async def confirm(self) -> str:
        """Return the UID as it is now, empty where we may not see it; raises a `ClusterError`."""
        called_at = self._clock()
        async with self._lock:
            if self._asked_at < called_at:
                self._asked_at = self._clock()
                self._answer = await self._ask()
        if isinstance(self._answer, str):
            return self._answer
        raise self._answer

    async def _ask(self) -> str | ClusterError:
        try:
            uid = await self._client.namespace_uid(IDENTITY_NAMESPACE) or ""
        except ClusterError as error:
            return error
        self._mirror.learn_cluster_uid(uid)
        return uid
