"""Consul's address and credentials, from our variables and Consul's own."""

from dataclasses import dataclass, field
from urllib.parse import urlsplit

from k8s_consul_registrar.settings.reader import Reader
from k8s_consul_registrar.urls import check_host, check_url


@dataclass(frozen=True, slots=True)
class ConsulSettings:
    """Consul's address and what is needed to be let in; files are read by whoever connects."""

    url: str
    socket: str
    token: str = field(repr=False)
    token_file: str
    verify: bool
    ca_file: str
    cert_file: str
    key_file: str
    tls_server_name: str
    namespace: str
    partition: str


def read_consul(reader: Reader) -> ConsulSettings:
    """Read every variable about Consul."""
    url, socket = _address(reader)
    settings = ConsulSettings(
        url=url,
        socket=socket,
        token=reader.secret("CONSUL_HTTP_TOKEN"),
        token_file=reader.text("CONSUL_HTTP_TOKEN_FILE"),
        verify=reader.boolean("CONSUL_HTTP_SSL_VERIFY"),
        ca_file=reader.text("CONSUL_CACERT"),
        cert_file=reader.text("CONSUL_CLIENT_CERT"),
        key_file=reader.text("CONSUL_CLIENT_KEY"),
        tls_server_name=reader.text("CONSUL_TLS_SERVER_NAME"),
        namespace=reader.text("CONSUL_NAMESPACE"),
        partition=reader.text("CONSUL_PARTITION"),
    )
    if settings.key_file and not settings.cert_file:
        reader.problem("CONSUL_CLIENT_KEY", "needs CONSUL_CLIENT_CERT beside it")
    if settings.tls_server_name and check_host(settings.tls_server_name):
        reader.problem("CONSUL_TLS_SERVER_NAME", check_host(settings.tls_server_name))
    if any(not 33 <= ord(char) <= 126 for char in settings.token):
        reader.problem("CONSUL_HTTP_TOKEN", "has characters that no token has")
    return settings


def _address(reader: Reader) -> tuple[str, str]:
    """Return the base URL, and the path of the Unix socket if it is one."""
    name = "CONSUL_ADDRESS"
    if not reader.is_set(name) and reader.is_set("CONSUL_HTTP_ADDR"):
        name = "CONSUL_HTTP_ADDR"
    text = reader.text(name)
    if text.startswith("unix://"):
        path = text.removeprefix("unix://")
        if not path.startswith("/"):
            reader.problem(name, f"{text!r} must be unix:// and an absolute path")
        return "http://consul", path
    wants_tls = reader.boolean("CONSUL_HTTP_SSL")
    has_scheme = "://" in text
    url = text if has_scheme else f"{'https' if wants_tls else 'http'}://{text}"
    problem = _problem_of(url)
    if problem:
        reader.problem(name, f"{_without_userinfo(text)!r} {problem}")
        return "http://127.0.0.1:8500", ""
    if not has_scheme and urlsplit(url).port is None:
        url = f"{url.rstrip('/')}:8500"
    return url.rstrip("/"), ""


def _problem_of(url: str) -> str:
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        return "is not host:port, http(s)://host:port or unix:///path (an IPv6 address goes in brackets)"
    if (parts.hostname or "").isdigit():
        return "is a number: a host comes before the port, as in 127.0.0.1:8500"
    if parts.scheme not in ("http", "https") or not parts.hostname or port == 0:
        return "is not host:port, http(s)://host:port or unix:///path"
    if parts.username is not None or parts.password is not None:
        return "holds a user name: give a token in CONSUL_HTTP_TOKEN"
    if parts.query or parts.fragment or any(char.isspace() for char in url):
        return "has parts that an address does not have"
    return check_url(url)


def _without_userinfo(text: str) -> str:
    """Leave out what may be a password before the text is shown."""
    scheme, separator, rest = text.rpartition("://")
    return f"{scheme}{separator}{rest.rpartition('@')[2]}"
