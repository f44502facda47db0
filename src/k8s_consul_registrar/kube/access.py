"""Where the API server is and who we are to it: in a cluster, or by kubeconfig."""

import ssl
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from k8s_consul_registrar.errors import AccessError
from k8s_consul_registrar.files import Followed
from k8s_consul_registrar.kube.credentials import Credentials, Identity, TokenFile, read_bytes
from k8s_consul_registrar.kube.entries import credentials_of, proxy_of, server_of, trust_of
from k8s_consul_registrar.kube.kubeconfig import choose_context
from k8s_consul_registrar.kube.tls import KeyPair, Trust, trust_in

SERVICE_ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")


@dataclass(slots=True)
class _LastContext:
    """The last ssl context built: connections are shared while trust and certificate stay."""

    trust: Trust | None = None
    pair: KeyPair | None = None
    context: ssl.SSLContext | None = None


@dataclass(frozen=True, slots=True)
class Access:
    """One API server as we reach it.

    `server` is its URL without a trailing slash; `trusted` is None for plain HTTP; `server_hostname` is the
    name its certificate must have where that is not the URL's host; `proxy` is the URL of an HTTP proxy
    before it; `origin` says for people where all this was read.
    """

    server: str
    credentials: Credentials = field(repr=False)
    trusted: Followed[Trust] | None = field(default=None, repr=False)
    server_hostname: str | None = None
    proxy: str | None = field(default=None, repr=False)
    origin: str = ""
    _last: _LastContext = field(default_factory=_LastContext, init=False, repr=False, compare=False)

    @property
    def trust(self) -> Trust | None:
        """Whom we believe to be the API server at this moment; None for plain HTTP."""
        return self.trusted.current() if self.trusted else None

    @property
    def cluster_ca(self) -> str | None:
        """The cluster's CA certificates (PEM); None where the system's are used, or none."""
        trust = self.trust
        return (trust.ca or None) if trust else None

    async def token(self) -> str:
        """Return the current bearer token, empty where we have none; raises AccessError."""
        return (await self.credentials.identity()).token

    def ssl_context(self, identity: Identity) -> ssl.SSLContext | None:
        """Return the context that shows this identity's certificate, None for plain HTTP.

        It is the same object while trust and certificate stay; files are replaced, and an exec plugin may
        bring a new certificate. Raises AccessError where that cannot be used.
        """
        trust, last = self.trust, self._last
        if trust is None:
            return None
        if last.context is None or last.trust is not trust or last.pair != identity.pair:
            last.context = trust.ssl_context(identity.pair)
            last.trust, last.pair = trust, identity.pair
        return last.context


def load_access(
    env: Mapping[str, str], *, home: Path | None = None, service_account: Path = SERVICE_ACCOUNT
) -> Access:
    """Find the API server as kubectl does: KUBECONFIG, else the service account, else ~/.kube/config.

    `home` is the folder that holds `.kube` ($HOME by default). Raises AccessError, naming file and field,
    for whatever cannot be used; token files are not read and exec plugins not run yet.
    """
    listed = [Path(part) for part in env.get("KUBECONFIG", "").split(":") if part]
    if listed:
        return _by_kubeconfig(listed, env)
    host, port = env.get("KUBERNETES_SERVICE_HOST", ""), env.get("KUBERNETES_SERVICE_PORT", "")
    token_file = service_account / "token"
    if host and port and token_file.exists():
        return _in_cluster(host, port, service_account)
    default = (home or Path(env.get("HOME", "/"))) / ".kube" / "config"
    if default.exists():
        return _by_kubeconfig([default], env)
    missing = f"there is no {token_file}" if host and port else "this is no Pod of a cluster"
    raise AccessError(
        f"no API server to talk to: KUBECONFIG is not set, {missing}, and there is no {default}"
    )


def _in_cluster(host: str, port: str, folder: Path) -> Access:
    """Use the service account of the Pod we run in (Kubernetes: "Accessing the API from a Pod")."""
    origin = "in-cluster service account"
    ca_file = folder / "ca.crt"
    setting = f"{origin}: {ca_file}"
    bracketed = f"[{host}]" if ":" in host else host
    return Access(
        server=f"https://{bracketed}:{port}",
        credentials=TokenFile(folder / "token", origin),
        trusted=Followed(setting, [ca_file], lambda: trust_in(read_bytes(ca_file, origin), setting)),
        origin=origin,
    )


def _by_kubeconfig(paths: Sequence[Path], env: Mapping[str, str]) -> Access:
    chosen = choose_context(paths)
    user = f", user {chosen.user.name!r}" if chosen.user else ""
    return Access(
        server=server_of(chosen.cluster),
        credentials=credentials_of(chosen.user, chosen.cluster, env),
        trusted=trust_of(chosen.cluster),
        server_hostname=chosen.cluster.value.tls_server_name or None,
        proxy=proxy_of(chosen.cluster),
        origin=f"kubeconfig {chosen.cluster.file}: context {chosen.context!r}{user}",
    )
