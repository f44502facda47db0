"""Settings of Consul: its address and credentials, and how services are kept there."""

from dataclasses import dataclass
from urllib.parse import urlsplit

from k8s_consul_registrar.settings import parsers as parse
from k8s_consul_registrar.settings.field import Reader, Section, Setting, section
from k8s_consul_registrar.settings.parsers import TEXT, Parser
from k8s_consul_registrar.settings.selection import DISCOVERY
from k8s_consul_registrar.urls import check_host, check_url

CONSUL = "Consul"
AGENT = "agent"
CATALOG = "catalog"
NONE = "none"
AUTO = "auto"
BACKENDS = (AGENT, CATALOG, AUTO, NONE)
# Consul compares node names without case and warns of those that DNS cannot look up. A space is a mistake.
_NODE_NAME = r"[A-Za-z0-9._-]{1,128}"
_UNIX = "unix://"
_FORMS = "host:port, http(s)://host:port or unix:///path"


def _token(given: str) -> str:
    if any(not 33 <= ord(char) <= 126 for char in given):
        raise ValueError("has characters that no token has")
    return given


def _host(given: str) -> str:
    if given and (problem := check_host(given)):
        raise ValueError(problem)
    return given


def _address(given: str, reader: Reader) -> str:
    """Return the base URL, or `unix://` and a path, of the variable that takes precedence."""
    name = "CONSUL_ADDRESS"
    if not reader.is_set(name) and reader.is_set("CONSUL_HTTP_ADDR"):
        name = "CONSUL_HTTP_ADDR"
        given = reader.value(name)
    if given.startswith(_UNIX):
        if not given.startswith(f"{_UNIX}/"):
            reader.problem(name, f"{given!r} must be unix:// and an absolute path")
        return given
    has_scheme = "://" in given
    url = given if has_scheme else f"{'https' if reader.value('CONSUL_HTTP_SSL') else 'http'}://{given}"
    if problem := _problem_of(url):
        reader.problem(name, f"{_without_userinfo(given)!r} {problem}")
        return "http://127.0.0.1:8500"
    if not has_scheme and urlsplit(url).port is None:
        url = f"{url.rstrip('/')}:8500"
    return url.rstrip("/")


def _problem_of(url: str) -> str:
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        return f"is not {_FORMS} (an IPv6 address goes in brackets)"
    if (parts.hostname or "").isdigit():
        return "is a number: a host comes before the port, as in 127.0.0.1:8500"
    if parts.scheme not in ("http", "https") or not parts.hostname or port == 0:
        return f"is not {_FORMS}"
    if parts.username is not None or parts.password is not None:
        return "holds a user name: give a token in CONSUL_HTTP_TOKEN"
    if parts.query or parts.fragment or any(char.isspace() for char in url):
        return "has parts that an address does not have"
    return check_url(url)


def _without_userinfo(given: str) -> str:
    """Remove what may be a password from a text that is to be shown."""
    scheme, separator, rest = given.rpartition("://")
    return f"{scheme}{separator}{rest.rpartition('@')[2]}"


def _pair(entry: str) -> tuple[str, str]:
    key, separator, value = entry.partition("=")
    if not (key and separator):
        raise ValueError(f"{entry!r} must be a name, '=' and a value")
    return key, value


@dataclass(frozen=True, slots=True)
class LoginSettings(Section, group=CONSUL):
    """The auth method of Consul at which the registrar logs in for its token."""

    auth_method: str = Setting("CONSUL_LOGIN_AUTH_METHOD", parse.text).means(
        "Auth method of Consul. The registrar logs in there at its start, again before its token expires or when "
        "Consul no longer knows it, and logs out at its end. Takes precedence over `CONSUL_HTTP_TOKEN` and its file. "
        "Needs `CONSUL_BACKEND=catalog`"
    )
    bearer_token_file: str = Setting(
        "CONSUL_LOGIN_BEARER_TOKEN_FILE",
        parse.secret_file,
        "/var/run/secrets/kubernetes.io/serviceaccount/token",
    ).means("File with the token that is shown to the auth method, read again when it changes")
    meta: tuple[tuple[str, str], ...] = Setting("CONSUL_LOGIN_META", parse.entries(_pair)).means(
        "Comma-separated `name=value`, by which Consul describes the tokens of these logins, such as `pod=ns/name`"
    )
    datacenter: str = Setting("CONSUL_LOGIN_DATACENTER", parse.text).means(
        "Datacenter of the auth method, for tokens that are valid in all of them. Unset: that of the server"
    )
    namespace: str = Setting("CONSUL_LOGIN_NAMESPACE", parse.text).means(
        "Consul Enterprise namespace of the auth method. Unset: `CONSUL_NAMESPACE`"
    )


@dataclass(frozen=True, slots=True)
class ConsulSettings(Section, group=CONSUL):
    """The address of Consul and the credentials for it; files are read when a connection needs them."""

    address: str = Setting("CONSUL_ADDRESS", parse.text, "127.0.0.1:8500", complete=_address).means(
        "Address of Consul: `host:port`, `http://…`, `https://…` or `unix:///path`"
    )
    http_addr: str = Setting("CONSUL_HTTP_ADDR", parse.text).means(
        "Consul's own variable for its address, used if `CONSUL_ADDRESS` is not set"
    )
    token: str = Setting("CONSUL_HTTP_TOKEN", Parser(_token, TEXT), is_secret=True).means(
        "ACL token for Consul. Only as a variable: it has no flag, and a configuration file with it is refused"
    )
    token_file: str = Setting("CONSUL_HTTP_TOKEN_FILE", parse.secret_file).means(
        "File with the ACL token, read again when it changes. Takes precedence over `CONSUL_HTTP_TOKEN`"
    )
    wants_tls: bool = Setting("CONSUL_HTTP_SSL", parse.boolean, "false").means(
        "`true`: use https if the address has no scheme"
    )
    verify: bool = Setting("CONSUL_HTTP_SSL_VERIFY", parse.boolean, "true").means(
        "`false`: accept any certificate of Consul"
    )
    ca_file: str = Setting("CONSUL_CACERT", parse.file).means(
        "File with the CA of Consul's certificate, read again when it changes. Unset: the system's CAs"
    )
    cert_file: str = Setting("CONSUL_CLIENT_CERT", parse.file).means(
        "File with the client certificate for Consul, read again when it changes"
    )
    key_file: str = Setting("CONSUL_CLIENT_KEY", parse.secret_file).means(
        "File with the key of `CONSUL_CLIENT_CERT`, read again when it changes. Unset: the same file"
    )
    tls_server_name: str = Setting("CONSUL_TLS_SERVER_NAME", Parser(_host, TEXT)).means(
        "Name expected in Consul's certificate. Unset: the host of its address"
    )
    namespace: str = Setting("CONSUL_NAMESPACE", parse.text).means("Consul Enterprise namespace")
    partition: str = Setting("CONSUL_PARTITION", parse.text).means("Consul Enterprise admin partition")
    login: LoginSettings | None = section(LoginSettings, when="CONSUL_LOGIN_AUTH_METHOD")

    @property
    def socket(self) -> str:
        """The path of Consul's Unix socket, empty if it is reached over TCP."""
        return self.address.removeprefix(_UNIX) if self.address.startswith(_UNIX) else ""

    @property
    def url(self) -> str:
        """The base URL of requests."""
        return "http://consul" if self.socket else self.address

    def check(self, reader: Reader) -> None:
        """Report a key without a certificate."""
        if self.key_file and not self.cert_file:
            reader.problem("CONSUL_CLIENT_KEY", "needs CONSUL_CLIENT_CERT beside it")


def default_node(cluster_name: str, instance: str) -> str:
    """Return the name of the catalog node for the services, if none is given."""
    return "-".join(part for part in ("k8s", cluster_name, instance) if part)


def _with_default_nodes(given: frozenset[str], reader: Reader) -> frozenset[str]:
    clusters = (reader.value("CLUSTER_NAME"), *(reader.value("PREVIOUS_CLUSTER_NAMES") - {""}))
    instances = (reader.value("INSTANCE"), *reader.value("PREVIOUS_INSTANCES"))
    return (given - {""}) | {default_node(cluster, one) for cluster in clusters for one in instances}


@dataclass(frozen=True, slots=True)
class BackendSettings(Section, group=CONSUL):
    """Where in Consul services are kept, and at which nodes they may have been kept before.

    `concurrency` is 0 for the default of the backend. `reason` tells why `auto` chose the backend, and is empty
    for one that was set.
    """

    backend: str = Setting("CONSUL_BACKEND", parse.choice(*BACKENDS), AGENT).means(
        "`agent`: services belong to the agent at `CONSUL_ADDRESS`. `catalog`: services belong to a node of "
        "their own in the catalog and are written in transactions. `auto`: chosen once at the start, `catalog` "
        "where Consul's servers, or agents of several nodes, answer, with `LEADER_ELECTION`, and where services of "
        "this registrar are in the catalog already, else `agent`. `none`: no Consul, targets are served at "
        "`HTTP_SD_PORT` only"
    )
    node_name: str = Setting(
        "CONSUL_NODE_NAME",
        parse.matching(_NODE_NAME, "must be letters, digits, '.', '_' or '-'"),
        complete=lambda given, reader: (
            given or default_node(reader.value("CLUSTER_NAME"), reader.value("INSTANCE"))
        ),
    ).means(
        "Name of the node for the services in the catalog. Unset: `k8s-<cluster>`, or "
        "`k8s-<cluster>-<instance>`"
    )
    previous_node_names: frozenset[str] = Setting(
        "PREVIOUS_CONSUL_NODE_NAMES", parse.names, complete=_with_default_nodes
    ).means(
        "Comma-separated catalog nodes that held the services before. This registrar's services are removed "
        "from there once all are at the new place. The other backend, and the default nodes of this cluster and "
        "instance and of their previous names, are cleared without being named"
    )
    concurrency: int = Setting("CONSUL_CONCURRENCY", parse.integer(1, 200, unset=0)).means(
        "Concurrent requests to Consul, 1 to 200. Unset: 32 for an agent, 8 transactions for the catalog"
    )
    accepts_server: bool = Setting("CONSUL_AGENT_IS_SERVER", parse.boolean, "false").means(
        "`true`: the agent at `CONSUL_ADDRESS` is a single Consul server on purpose, so that is not reported. With "
        "`CONSUL_BACKEND=agent` only"
    )
    has_readiness: bool = Setting("REGISTER_READINESS", parse.boolean, "false").means(
        "`true`: write whether a Pod or Node is ready as a health check of its service. Needs "
        "`CONSUL_BACKEND=catalog`"
    )
    follows: bool = Setting("WATCH", parse.boolean, "true", group=DISCOVERY).means(
        "`false`: list the cluster every `SYNC_PERIOD` instead of watching it"
    )
    reason: str = ""
