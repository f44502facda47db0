"""Access to the API server, in a cluster or by kubeconfig: its URL, its trust, our credentials.

What kubectl would ignore or pick silently (two identities at once, data beside a file) is refused, as are
impersonation and what we do not speak: a daemon must not act under another identity than its file says.
"""

import base64
import binascii
import ssl
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from urllib.parse import SplitResult, urlsplit

from k8s_consul_registrar.errors import AccessError
from k8s_consul_registrar.kube.credentials import (
    API_VERSIONS,
    ClientIdentity,
    Credentials,
    ExecCredentials,
    ExecPlugin,
    StoredCredentials,
    basic_credentials,
    rotating_token,
)
from k8s_consul_registrar.kube.kubeconfig import Cluster, Entry, Exec, User, choose_context
from k8s_consul_registrar.rotating import Rotating, clean_token, contained, fixed, read_file
from k8s_consul_registrar.tls import KeyPair, Trust, checked, trust_in
from k8s_consul_registrar.urls import check_host, check_url

SERVICE_ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")
EXEC_EXTENSION = "client.authentication.k8s.io/exec"
INTERACTIVE_MODES = ("", "Never", "IfAvailable", "Always")


@dataclass(slots=True)
class _Shown:
    """The last trust, and the same that shows our certificate: connections are shared while both stay."""

    of: Trust | None = None
    trust: Trust | None = None


@dataclass(frozen=True, slots=True)
class Access:
    """One API server as we reach it.

    `server` is its URL without a trailing slash; `trusted` is None for plain HTTP; `server_hostname` is the
    name its certificate must have where that is not the URL's host; `proxy` is the URL of an HTTP proxy
    before it; `origin` says for people where all this was read.
    """

    server: str
    credentials: Credentials = field(repr=False)
    trusted: Rotating[Trust] | None = field(default=None, repr=False)
    server_hostname: str | None = None
    proxy: str | None = field(default=None, repr=False)
    origin: str = ""
    _last: _Shown = field(default_factory=_Shown, init=False, repr=False, compare=False)

    @property
    def trust(self) -> Trust | None:
        """The TLS context for the API server at this moment; None for plain HTTP."""
        return self.trusted.current() if self.trusted else None

    async def token(self) -> str:
        """Return the current bearer token, empty where we have none; raises AccessError."""
        return (await self.credentials.identity()).token

    def ssl_context(self, identity: ClientIdentity) -> ssl.SSLContext | None:
        """Return the context that shows this identity's certificate, None for plain HTTP.

        It is the same object while trust and certificate stay; files are replaced, and an exec plugin may
        bring a new certificate. Raises AccessError where that cannot be used.
        """
        trust, last = self.trust, self._last
        if trust is None:
            return None
        if last.trust is None or last.of is not trust or last.trust.pair != identity.pair:
            last.of, last.trust = trust, replace(trust, pair=identity.pair)
        return last.trust.context


def load_access(
    env: Mapping[str, str], *, home: Path | None = None, service_account: Path = SERVICE_ACCOUNT
) -> Access:
    """Find the API server as kubectl does: KUBECONFIG, else the service account, else ~/.kube/config.

    `home` is the folder that holds `.kube` ($HOME by default). Raises AccessError, naming file and field,
    for whatever cannot be used; exec plugins are not run yet.
    """
    listed = [Path(part) for part in env.get("KUBECONFIG", "").split(":") if part]
    if listed:
        return _by_kubeconfig(listed, env)
    host, port = env.get("KUBERNETES_SERVICE_HOST", ""), env.get("KUBERNETES_SERVICE_PORT", "")
    token_file = service_account / "token"
    if host and port and _exists(token_file):
        return _in_cluster(host, port, service_account)
    default = (home or Path(env.get("HOME", "/"))) / ".kube" / "config"
    if _exists(default):
        return _by_kubeconfig([default], env)
    missing = f"there is no {token_file}" if host and port else "this is no Pod of a cluster"
    raise AccessError(
        f"no API server to talk to: KUBECONFIG is not set, {missing}, and there is no {default}"
    )


def _exists(path: Path) -> bool:
    """Return whether there is a file, or an obstacle that reading it will name."""
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    except (OSError, ValueError):
        return True
    return True


def _in_cluster(host: str, port: str, folder: Path) -> Access:
    """Use the service account of the Pod we run in (Kubernetes: "Accessing the API from a Pod")."""
    origin = "in-cluster service account"
    ca_file = folder / "ca.crt"
    setting = f"{origin}: {ca_file}"
    bracketed = f"[{host}]" if ":" in host else host
    server = f"https://{bracketed}:{port}"
    problem = check_url(server)
    if problem:
        raise AccessError(f"KUBERNETES_SERVICE_HOST with KUBERNETES_SERVICE_PORT {problem}")
    return Access(
        server=server,
        credentials=StoredCredentials(
            token=rotating_token(folder / "token", origin, of="service account token")
        ),
        trusted=Rotating(
            "service account ca.crt", [ca_file], lambda: trust_in(read_file(ca_file, origin), setting)
        ),
        origin=origin,
    )


def _by_kubeconfig(paths: Sequence[Path], env: Mapping[str, str]) -> Access:
    with contained(f"kubeconfig {':'.join(str(path) for path in paths)}"):
        chosen = choose_context(paths)
        user = f", user {chosen.user.name!r}" if chosen.user else ""
        return Access(
            server=_server_of(chosen.cluster),
            credentials=_credentials_of(chosen.user, chosen.cluster, env),
            trusted=_trust_of(chosen.cluster),
            server_hostname=_server_name_of(chosen.cluster),
            proxy=_proxy_of(chosen.cluster),
            origin=f"kubeconfig {chosen.cluster.file}: context {chosen.context!r}{user}",
        )


def _server_of(cluster: Entry[Cluster]) -> str:
    """Return the API server's URL without a trailing slash; raises AccessError."""
    server = cluster.value.server
    if not server:
        raise AccessError(f"{cluster.setting('server')} is missing")
    parts = _split(server, cluster, "server")
    if parts.scheme not in ("http", "https"):
        raise AccessError(f"{cluster.setting('server')} is not an http:// or https:// URL")
    if "@" in parts.netloc or parts.query or parts.fragment:
        raise AccessError(f"{cluster.setting('server')} may have no user, query or fragment")
    _require_usable(server, cluster, "server")
    return server.rstrip("/")


def _server_name_of(cluster: Entry[Cluster]) -> str | None:
    """Return the name that the server's certificate must have, None for its host; raises AccessError."""
    name = cluster.value.tls_server_name
    problem = check_host(name) if name else ""
    if problem:
        raise AccessError(f"{cluster.setting('tls-server-name')} {problem}")
    return name or None


def _proxy_of(cluster: Entry[Cluster]) -> str | None:
    """Return the URL of the proxy before the API server, None for none; raises AccessError."""
    proxy = cluster.value.proxy_url
    if not proxy:
        return None
    scheme = _split(proxy, cluster, "proxy-url").scheme
    if scheme.startswith("socks"):
        raise AccessError(
            f"{cluster.setting('proxy-url')}: {scheme} proxies are not supported, only http and https"
        )
    if scheme not in ("http", "https"):
        raise AccessError(f"{cluster.setting('proxy-url')} is not an http:// or https:// URL")
    _require_usable(proxy, cluster, "proxy-url")
    return proxy


def _split(url: str, cluster: Entry[Cluster], name: str) -> SplitResult:
    """Split a URL that must have a host and, if any, a real port; raises AccessError without quoting it."""
    try:
        parts = urlsplit(url)
        has_host = bool(parts.hostname) and (parts.port is None or parts.port > 0)
    except ValueError:
        has_host = False
    if not has_host:
        raise AccessError(f"{cluster.setting(name)} is not a URL with a host")
    return parts


def _require_usable(url: str, cluster: Entry[Cluster], name: str) -> None:
    problem = check_url(url)
    if problem:
        raise AccessError(f"{cluster.setting(name)} {problem}")


def _trust_of(cluster: Entry[Cluster]) -> Rotating[Trust] | None:
    """Return the TLS context, None for plain HTTP; raises AccessError."""
    if urlsplit(_server_of(cluster)).scheme == "http":
        return None
    setting = cluster.setting("certificate-authority")
    file = cluster.value.certificate_authority
    if not cluster.value.insecure_skip_tls_verify:
        paths = [cluster.path(file)] if file else []
        return Rotating("kubeconfig certificate-authority", paths, lambda: trust_in(_ca_of(cluster), setting))
    if file or cluster.value.certificate_authority_data:
        raise AccessError(
            f"{cluster.setting('insecure-skip-tls-verify')} contradicts certificate-authority; keep one"
        )
    return fixed(Trust(is_verified=False))


def _ca_of(cluster: Entry[Cluster]) -> bytes | None:
    value = cluster.value
    return _content(
        cluster, "certificate-authority", value.certificate_authority, value.certificate_authority_data
    )


def _credentials_of(user: Entry[User] | None, cluster: Entry[Cluster], env: Mapping[str, str]) -> Credentials:
    """Return who we are; raises AccessError."""
    if user is None:
        return StoredCredentials()
    value = user.value
    _refuse_unsupported(user)
    pair = _pair_of(user)
    if value.exec is not None:
        plugin = _plugin_of(user, value.exec, cluster, env)
        return ExecCredentials(plugin)
    if value.token_file:
        stored = rotating_token(user.path(value.token_file), user.setting("tokenFile"))
        return StoredCredentials(token=stored, pair=pair)
    token = clean_token(value.token, user.setting("token")) if value.token else ""
    basic = basic_credentials(value.username, value.password) if value.username else ""
    return StoredCredentials(ClientIdentity(token=token, basic=basic), pair=pair)


def _refuse_unsupported(user: Entry[User]) -> None:
    value = user.value
    if value.auth_provider is not None:
        raise AccessError(
            f"{user.setting('auth-provider')} was retired in Kubernetes 1.26; use an exec plugin "
            "(kubelogin, gke-gcloud-auth-plugin and the like)"
        )
    if value.impersonate:
        raise AccessError(f"{user.setting('as')}: impersonation is not supported")
    if value.password and not value.username:
        raise AccessError(f"{user.setting('username')} is missing beside password")
    held = {
        "token": bool(value.token or value.token_file),
        "username": bool(value.username),
        "exec": value.exec is not None,
    }
    names = [name for name, is_held in held.items() if is_held]
    if value.exec is not None and (value.client_certificate or value.client_certificate_data):
        names.append("client-certificate")
    if len(names) > 1:
        raise AccessError(user.setting(f"{' and '.join(names)} exclude each other; keep one"))


def _pair_of(user: Entry[User]) -> Rotating[KeyPair] | None:
    value = user.value
    has_certificate = bool(value.client_certificate or value.client_certificate_data)
    has_key = bool(value.client_key or value.client_key_data)
    if not has_certificate and not has_key:
        return None
    if not has_certificate or not has_key:
        missing = "client-key" if has_certificate else "client-certificate"
        raise AccessError(f"{user.setting(missing)} is missing: a certificate and its key go together")
    setting = user.setting("client-certificate")

    def make() -> KeyPair:
        certificate = _content(
            user, "client-certificate", value.client_certificate, value.client_certificate_data
        )
        key = _content(user, "client-key", value.client_key, value.client_key_data)
        return checked(KeyPair(certificate or b"", key or b"", setting))

    files = [user.path(file) for file in (value.client_certificate, value.client_key) if file]
    return Rotating("kubeconfig client-certificate", files, make)


def _plugin_of(
    user: Entry[User], config: Exec, cluster: Entry[Cluster], env: Mapping[str, str]
) -> ExecPlugin:
    if not config.command:
        raise AccessError(f"{user.setting('exec.command')} is missing")
    if config.api_version not in API_VERSIONS:
        raise AccessError(f"{user.setting('exec.apiVersion')} must be {' or '.join(API_VERSIONS)}")
    if config.interactive_mode not in INTERACTIVE_MODES:
        raise AccessError(f"{user.setting('exec.interactiveMode')} must be Never, IfAvailable or Always")
    if config.interactive_mode == "Always":
        raise AccessError(f"{user.setting('exec.interactiveMode')} is Always, and a daemon has no terminal")
    return ExecPlugin(
        api_version=config.api_version,
        command=str(user.path(config.command)) if "/" in config.command else config.command,
        origin=user.setting("exec"),
        args=tuple(config.args),
        env={**env, **{variable.name: variable.value for variable in config.env}},
        cluster=_cluster_info(cluster) if config.provide_cluster_info else None,
        install_hint=config.install_hint,
    )


def _cluster_info(cluster: Entry[Cluster]) -> Mapping[str, object]:
    """Return the cluster as a plugin receives it, with the extension made for plugins as its config."""
    value = cluster.value
    ca = _ca_of(cluster)
    info: dict[str, object] = {
        "server": value.server,
        "tls-server-name": value.tls_server_name,
        "insecure-skip-tls-verify": value.insecure_skip_tls_verify,
        "certificate-authority-data": base64.b64encode(ca).decode() if ca else "",
        "proxy-url": value.proxy_url,
        "config": next((e.extension for e in value.extensions if e.name == EXEC_EXTENSION), None),
    }
    return {name: part for name, part in info.items() if part}


def _content(entry: Entry[Cluster] | Entry[User], name: str, path: str, data: str) -> bytes | None:
    """Return what a pair of fields like client-key and client-key-data holds, None where neither is set."""
    if path and data:
        raise AccessError(f"{entry.setting(name)} and {name}-data exclude each other; keep one")
    if path:
        return read_file(entry.path(path), entry.setting(name))
    if not data:
        return None
    try:
        return base64.b64decode("".join(data.split()), validate=True)
    except (binascii.Error, ValueError):
        raise AccessError(f"{entry.setting(f'{name}-data')} is not base64") from None
