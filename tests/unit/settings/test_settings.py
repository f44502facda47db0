"""Settings: accepted and refused values, and every mistake reported at once."""

import pytest

from k8s_consul_registrar.errors import SettingsError
from k8s_consul_registrar.settings.proxy import ProxySettings
from k8s_consul_registrar.settings.reading import SETTINGS, modes_of, read_proxy, read_registrar
from k8s_consul_registrar.settings.registrar import RegistrarSettings


def registrar(**environment: str) -> RegistrarSettings:
    """Read the registrar's settings, with a cluster name unless one is given."""
    return read_registrar({"CLUSTER_NAME": "lab", **environment})


def proxy(**environment: str) -> ProxySettings:
    """Read the proxy's settings."""
    return read_proxy(environment)


def problems(mode: object, **environment: str) -> tuple[str, ...]:
    """Return the mistakes of an environment."""
    with pytest.raises(SettingsError) as raised:
        (read_proxy if mode is proxy else read_registrar)(environment)
    return raised.value.problems


def test_registrar_defaults() -> None:
    """Without anything set the registrar has the original's defaults, and warns about the name."""
    settings = read_registrar({})
    assert (settings.cluster_name, settings.has_default_name) == ("default-cluster", True)
    assert (settings.sync_period, settings.proxy_node_port) == (600, 31112)
    assert settings.consul.url == "http://127.0.0.1:8500"
    assert settings.common.admin_port == 8081
    assert "CLUSTER_NAME" in settings.common.warnings[0]


def test_proxy_defaults() -> None:
    """Without anything set the proxy listens on 8080 and verifies kubelets."""
    settings = proxy()
    assert (settings.port, settings.paths) == (8080, ("/metrics/cadvisor",))
    assert (settings.kubelets.skip_verify, settings.allow_loopback) == (False, False)


def test_name_that_is_set_to_the_default_is_a_name() -> None:
    """Only a name that was not given is the default one; set to nothing counts as not given."""
    assert not read_registrar({"CLUSTER_NAME": "default-cluster"}).has_default_name
    assert read_registrar({"CLUSTER_NAME": " "}).has_default_name


@pytest.mark.parametrize("value", ["", "0", "-1", "abc", "nan", "inf", "1e999"])
def test_invalid_sync_period_becomes_the_default(value: str) -> None:
    """As in the original an invalid period is 600 s; here it is said, unless it was simply not set."""
    settings = registrar(SYNC_PERIOD=value)
    assert settings.sync_period == 600
    assert bool(settings.common.warnings) is bool(value)


def test_valid_sync_period() -> None:
    """Whole and broken seconds are taken."""
    assert registrar(SYNC_PERIOD="60").sync_period == 60
    assert registrar(SYNC_PERIOD="1.5").sync_period == 1.5


@pytest.mark.parametrize(
    ("value", "period"), [("1e-9", 1.0), ("0.3", 1.0), ("1e300", 366 * 86400.0), ("99999999", 366 * 86400.0)]
)
def test_sync_period_out_of_bounds_becomes_the_bound_with_a_warning(value: str, period: float) -> None:
    """A tiny one would compare without pause, and no timer holds an absurd one."""
    settings = registrar(CLUSTER_NAME="lab", SYNC_PERIOD=value)
    assert settings.sync_period == period
    (warning,) = settings.common.warnings
    assert warning.startswith(f"SYNC_PERIOD {value!r}: {period:.0f} second")


SECONDS = (
    "BRAKE_CONFIRM",
    "BRAKE_CONFIRM_START",
    "ORPHAN_AFTER",
    "LEASE_RENEW_DEADLINE",
    "LEASE_RETRY_PERIOD",
)
PROXY_SECONDS = ("STALE_NODES_MAX", "SCRAPE_TIMEOUT_MAX", "DRAIN_DELAY", "SHUTDOWN_GRACE")


@pytest.mark.parametrize("value", ["1e300", "inf", "nan", "-1", "1e9", "\u0661", "ten"])
def test_seconds_that_no_timer_holds_are_refused_by_name(value: str) -> None:
    """Every setting in seconds has bounds on both sides, and ASCII digits."""
    found = problems(registrar, CLUSTER_NAME="lab", **dict.fromkeys(SECONDS, value))
    assert {problem.partition(":")[0] for problem in found} >= set(SECONDS)
    found = problems(proxy, **dict.fromkeys(PROXY_SECONDS, value))
    assert {problem.partition(":")[0] for problem in found} == set(PROXY_SECONDS)


@pytest.mark.parametrize(
    "name", ["ORPHAN_AFTER", "LEASE_RETRY_PERIOD", "LEASE_RENEW_DEADLINE", "SCRAPE_TIMEOUT_MAX"]
)
def test_seconds_that_would_make_a_busy_loop_are_refused(name: str) -> None:
    """A tiny period has a floor."""
    read = proxy if name == "SCRAPE_TIMEOUT_MAX" else registrar
    (problem, *_) = problems(read, CLUSTER_NAME="lab", **{name: "1e-9"})
    assert name in problem.partition(": ")[0]


@pytest.mark.parametrize(
    ("environment", "url", "socket"),
    [
        ({"CONSUL_ADDRESS": "consul:8501"}, "http://consul:8501", ""),
        ({"CONSUL_ADDRESS": "consul"}, "http://consul:8500", ""),
        ({"CONSUL_ADDRESS": "[::1]:8500"}, "http://[::1]:8500", ""),
        ({"CONSUL_ADDRESS": "https://consul.example/prefix/"}, "https://consul.example/prefix", ""),
        ({"CONSUL_ADDRESS": "unix:///run/consul.sock"}, "http://consul", "/run/consul.sock"),
        ({"CONSUL_HTTP_ADDR": "other:1"}, "http://other:1", ""),
        ({"CONSUL_HTTP_ADDR": "other:1", "CONSUL_ADDRESS": "mine:2"}, "http://mine:2", ""),
        ({"CONSUL_ADDRESS": "mine:2", "CONSUL_HTTP_SSL": "true"}, "https://mine:2", ""),
    ],
)
def test_consul_address(environment: dict[str, str], url: str, socket: str) -> None:
    """Every form of Consul's address, ours before Consul's own variable."""
    consul = registrar(**environment).consul
    assert (consul.url, consul.socket) == (url, socket)


@pytest.mark.parametrize(
    "address",
    [
        "ftp://x",
        "unix://relative",
        "http://",
        "host:port",
        "host:99999",
        "a b:1",
        "http://h/?x=1",
        "::1:8500:x",
        "a..b:8500",
        "http://[fe80::1%25eth0]:8500",
        "http://x/%zz",
        "http://\u2028x",
        "https://" + "a" * 64 + ":8501",
    ],
)
def test_bad_consul_address(address: str) -> None:
    """A value that is no address is a problem by name."""
    (problem,) = problems(registrar, CLUSTER_NAME="lab", CONSUL_ADDRESS=address)
    assert problem.startswith("CONSUL_ADDRESS: ")


def test_server_name_that_openssl_cannot_encode_is_refused() -> None:
    """It was an exception at each connection."""
    (problem,) = problems(registrar, CLUSTER_NAME="lab", CONSUL_TLS_SERVER_NAME="a..b")
    assert problem.startswith("CONSUL_TLS_SERVER_NAME: ")


@pytest.mark.parametrize("token", ["a b", "a\x7f", "t\u00f6k", "a\nb"])
def test_token_that_is_none_is_refused_and_not_shown(token: str) -> None:
    """It would be an exception, or another header, at each request."""
    (problem,) = problems(registrar, CLUSTER_NAME="lab", CONSUL_HTTP_TOKEN=token)
    assert problem.startswith("CONSUL_HTTP_TOKEN: ")
    assert token not in problem


def test_password_in_an_address_is_refused_and_not_shown() -> None:
    """A secret in a URL does not reach the message that refuses it."""
    (problem,) = problems(registrar, CONSUL_ADDRESS="http://user:hunter2@consul:8500", CLUSTER_NAME="lab")
    assert "CONSUL_HTTP_TOKEN" in problem
    assert "hunter2" not in problem


def test_token_is_in_no_repr() -> None:
    """A settings value can be shown without giving the token away."""
    assert "t0p-secret" not in repr(registrar(CONSUL_HTTP_TOKEN="t0p-secret").consul)


def test_previous_instances_may_name_the_empty_one() -> None:
    """Two quotes stand for the empty instance; a stray comma does not."""
    assert registrar(PREVIOUS_INSTANCES='a, "",b,').previous_instances == {"a", "", "b"}
    assert registrar(PREVIOUS_INSTANCES=",").previous_instances == frozenset()


def test_default_nodes_of_earlier_names_are_previous_ones() -> None:
    """Of each earlier cluster and instance, so that none has to be named."""
    settings = registrar(
        CLUSTER_NAME="c", PREVIOUS_CLUSTER_NAMES="b", INSTANCE="green", PREVIOUS_INSTANCES='blue,""'
    )
    nodes = {"k8s-c-green", "k8s-c-blue", "k8s-c", "k8s-b-green", "k8s-b-blue", "k8s-b"}
    assert settings.backend.previous_node_names == nodes


def test_quota_that_removes_without_a_limit_is_a_warning() -> None:
    """It removes nothing."""
    (warning,) = registrar(QUOTA_REMOVE="true").common.warnings
    assert "QUOTA_REMOVE has no effect" in warning
    assert registrar(QUOTA_REMOVE="true", MAX_TARGETS_PER_NAMESPACE="5").common.warnings == ()


def test_shard_paths() -> None:
    """Spaces, empties and repeats are dropped."""
    assert registrar(SHARD_PATHS=" a ,,b,a").naming.shard_paths == ("a", "b")


def test_every_mistake_at_once() -> None:
    """All problems are reported together, each by the name of its variable."""
    found = problems(
        registrar,
        CLUSTER_NAME="a b",
        INSTANCE="x" * 51,
        CONSUL_ADDRESS="nope://",
        CONSUL_HTTP_SSL_VERIFY="maybe",
        CONSUL_CLIENT_KEY="/k",
        BRAKE_CONFIRM="-1",
        PROXY_NODE_PORT="70000",
        ADMIN_PORT="x",
        LOG_LEVEL="loud",
        LOG_FORMAT="xml",
        ALLOW_MASS_DEREGISTER="perhaps",
        SHARD_PATHS="x" * 600,
    )
    names = {problem.partition(":")[0] for problem in found}
    assert names == {
        "CLUSTER_NAME",
        "INSTANCE",
        "CONSUL_ADDRESS",
        "CONSUL_HTTP_SSL_VERIFY",
        "CONSUL_CLIENT_KEY",
        "BRAKE_CONFIRM",
        "PROXY_NODE_PORT",
        "ADMIN_PORT",
        "LOG_LEVEL",
        "LOG_FORMAT",
        "ALLOW_MASS_DEREGISTER",
        "SHARD_PATHS",
    }


def test_every_mistake_of_the_proxy_at_once() -> None:
    """The proxy's problems are reported together as well."""
    found = problems(
        proxy,
        PORT="-1",
        PROXY_PATHS="/metrics,/pods",
        KUBELET_TLS_SERVER_NAME="cat",
        SCRAPE_CONCURRENCY="0",
        SCRAPE_TIMEOUT_MAX="0",
        PROXY_ALLOW_LOOPBACK="?",
    )
    assert {problem.partition(":")[0] for problem in found} == {
        "PORT",
        "PROXY_PATHS",
        "KUBELET_TLS_SERVER_NAME",
        "SCRAPE_CONCURRENCY",
        "SCRAPE_TIMEOUT_MAX",
        "PROXY_ALLOW_LOOPBACK",
    }


def test_health_stays_apart_from_the_nodeport() -> None:
    """One port for both would put health and metrics on every Node."""
    (problem,) = problems(proxy, PORT="8080", ADMIN_PORT="8080")
    assert "ADMIN_PORT" in problem


def test_options_are_told_apart() -> None:
    """No variable is listed twice, and every flag is its own."""
    assert len({option.env for option in SETTINGS}) == len(SETTINGS)
    assert len({option.flag for option in SETTINGS}) == len(SETTINGS)
    assert all(option.help and modes_of(option) for option in SETTINGS)
