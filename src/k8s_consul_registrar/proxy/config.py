"""Configuration of a proxy: fixed while it runs, and the same value for each of its workers."""

import resource
from dataclasses import dataclass, field, replace

from k8s_consul_registrar.errors import SettingsError
from k8s_consul_registrar.proxy.limits import Concurrency

# Standard streams, the loop's own, the listening sockets, the API server, the admin endpoints.
OTHER_FILES = 64


@dataclass(frozen=True, slots=True)
class ProxyTiming:
    """Every delay of the relay, in seconds; tests use shorter ones.

    `keep_alive` outlasts the five minutes for which Go's client keeps an idle connection, so that the client
    closes first and no request meets a connection just closed. A client without a successful scrape
    has `denied_keep_alive` after a denied request, and each has `unread` to read what is queued for it. `upstream_idle` stays under a kubelet's 90 s.
    """

    connect: float = 5.0
    longest_scrape: float = 120.0
    request_head: float = 10.0
    keep_alive: float = 330.0
    denied_keep_alive: float = 10.0
    unread: float = 10.0
    linger: float = 1.0
    upstream_idle: float = 75.0
    tick: float = 1.0


@dataclass(frozen=True, slots=True)
class ProxyConfig:
    """Paths, limits and delays of a proxy.

    `max_clients` bounds the open connections of clients. `concurrency` and `kept_connections` hold for
    kubelets and, where Pods are relayed, for Pods apart. `pod_content_type` is passed on for Pods that state
    none.
    """

    paths: frozenset[str]
    has_pods: bool = False
    concurrency: Concurrency = field(default_factory=Concurrency)
    max_clients: int = 4096
    kept_connections: int = 8192
    pod_content_type: str = ""
    timing: ProxyTiming = field(default_factory=ProxyTiming)

    def share(self, workers: int) -> "ProxyConfig":
        """Return the configuration of one of several workers: its share of every limit, at least one."""

        def share(whole: int) -> int:
            return max(1, whole // workers)

        limits = self.concurrency
        return replace(
            self,
            concurrency=replace(limits, per_node=share(limits.per_node), overall=share(limits.overall)),
            max_clients=share(self.max_clients),
            kept_connections=share(self.kept_connections),
        )

    def fit_open_files(self) -> "ProxyConfig":
        """Raise the soft limit of open files to what these limits need, and return a configuration that fits.

        Where the hard limit is too low, there are fewer connections of clients and fewer kept ones. Raises
        SettingsError where not even the scrapes fit, each with the connection of its client.
        """
        kinds = 2 if self.has_pods else 1
        scrapes = self.concurrency.overall * kinds
        least = 2 * scrapes + OTHER_FILES
        kept = self.kept_connections * kinds
        needed = max(least, scrapes + self.max_clients + kept + OTHER_FILES)
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        if soft == resource.RLIM_INFINITY or soft >= needed:
            return self
        if hard == resource.RLIM_INFINITY or hard >= needed:
            resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))
            return self
        if hard < least:
            overall = self.concurrency.overall
            problem = (
                f"SCRAPE_CONCURRENCY: {overall} scrapes at once need {least} open files and the system "
                f"allows {hard}: at most {max(0, hard - OTHER_FILES) // (2 * kinds)} fit in, or raise the limit"
            )
            raise SettingsError([problem])
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        spare, wanted = hard - least, self.max_clients + kept
        return replace(
            self,
            max_clients=min(self.max_clients, scrapes + spare * self.max_clients // wanted),
            kept_connections=max(1, spare * self.kept_connections // wanted),
        )
