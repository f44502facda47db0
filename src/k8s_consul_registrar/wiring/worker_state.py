"""The current credentials that the proxy sends its workers."""

import sys
from pathlib import Path
from typing import NamedTuple, Self

from k8s_consul_registrar.proxy.worker_protocol import WorkerCredentials
from k8s_consul_registrar.rotating import BearerTokens, Derived, Rotating, bearer_tokens
from k8s_consul_registrar.settings.proxy import InboundSettings
from k8s_consul_registrar.tls import ServerTls, Trust, server_tls
from k8s_consul_registrar.wiring.upstream_trust import KubeletIdentity

WORKER = (sys.executable, "-m", "k8s_consul_registrar.proxy.worker")


class Inbound(NamedTuple):
    """What callers are checked by, None for what is not asked of them."""

    bearer: Rotating[BearerTokens] | None
    tls: ServerTls | None

    @classmethod
    def of(cls, settings: InboundSettings) -> Self:
        """Read the files; raises AccessError, naming the setting, if one cannot be used."""
        bearer, tls = settings.bearer_token_file, settings.cert_file
        return cls(
            bearer_tokens(Path(bearer), "PROXY_BEARER_TOKEN_FILE") if bearer else None,
            server_tls(tls, settings.key_file, settings.client_ca_file, setting="TLS") if tls else None,
        )


def credentials(
    kubelets: KubeletIdentity, pods: Derived[Trust] | None, inbound: Inbound
) -> WorkerCredentials:
    """Return everything secret that a worker needs, as it could last be used: nothing unusable reaches a worker."""
    problem, (bearer, tls) = kubelets.problem, inbound
    if tls is not None:
        tls.refresh()
    return WorkerCredentials(
        token="" if problem else kubelets.token(),
        problem=problem,
        kubelets=kubelets.trust,
        pods=None if pods is None else pods.current(),
        bearer=None if bearer is None else bearer.current(),
        tls=None if tls is None else tls.value,
    )
