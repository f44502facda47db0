"""Pods and Nodes become targets, or rejections by reason."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from k8s_consul_registrar.errors import Reason
from k8s_consul_registrar.model import (
    ContainerPort,
    Kind,
    Node,
    ObjectKey,
    Pod,
    Rejection,
    Target,
    Undecodable,
)
from k8s_consul_registrar.targets.resolve import TargetRules, resolve
from k8s_consul_registrar.targets.scrape_config import PORT_NAMES
from support.builders import annotated, make_node, make_pod, tcp

RULES = TargetRules()


def only(item: Pod | Node) -> Target:
    """Return the one target of an item."""
    resolved = resolve(item, RULES)
    assert isinstance(resolved, tuple), resolved
    (target,) = resolved
    return target


def rejection_of(item: Pod | Node) -> Rejection:
    """Return the rejection of an item."""
    resolved = resolve(item, RULES)
    assert isinstance(resolved, Rejection), resolved
    return resolved


def test_annotated_pod_is_a_target() -> None:
    """An annotated, running Pod is scraped at its IP and annotated port."""
    target = only(make_pod())
    assert (target.id, target.name) == ("pod--shop--web-1", "pod--shop--web-1")
    assert (target.address, target.port) == ("198.51.100.10", 9102)
    assert dict(target.meta) == {
        "kind": "pod",
        "metrics_path": "/metrics",
        "namespace": "shop",
        "node": "node-a",
        "pod": "web-1",
        "scheme": "http",
    }


@pytest.mark.parametrize("value", ["false", "True", "", "yes", " true"])
def test_only_the_word_true_asks_to_be_scraped(value: str) -> None:
    """Any other value of the annotation asks for nothing, and is no rejection either."""
    assert resolve(make_pod(annotations={"prometheus.io/scrape": value}), RULES) == ()


@pytest.mark.parametrize(
    ("phase", "is_scraped"),
    [("Running", True), ("Unknown", True), ("Pending", False), ("Succeeded", False), ("Failed", False)],
)
def test_phase_decides(phase: str, is_scraped: bool) -> None:
    """Only Running and Unknown Pods are scraped: the IP of a finished one may be another's."""
    assert bool(resolve(make_pod(phase=phase), RULES)) is is_scraped


@pytest.mark.parametrize(
    ("annotation", "path"),
    [
        ("/metrics", "/metrics"),
        ("actuator/prometheus", "/actuator/prometheus"),
        ("", "/metrics"),
        ("  /m ", "/m"),
        ("?a=1", "/metrics"),
        ("/m?a=1&b=x%20y", "/m"),
    ],
)
def test_path(annotation: str, path: str) -> None:
    """The path has a leading slash, a default, and no query string."""
    assert dict(only(make_pod(annotations=annotated(path=annotation, port="1"))).meta)["metrics_path"] == path


@pytest.mark.parametrize(
    "annotation",
    [
        "http://198.51.100.7:9102/metrics",
        "https://example.com/metrics?a=1",
        " HTTPS://example.com",
        "Http://[2001:db8::1]:9102/",
        "http:/metrics",
        "http:\\\\example.com\\metrics",
        "http:9102/metrics",
        "ftp://example.com/metrics",
        "file:///metrics",
        "unix+http://run/metrics",
        "//example.com/metrics",
        "//web/metrics",
        "//user@web:9102",
        "//[2001:db8::1]:9102",
        "http://example.com/" + "x" * 5000,
    ],
)
def test_url_as_path_is_rejected(annotation: str) -> None:
    """A URL would be scraped as the path `/http://…` of the Pod, which never answers."""
    rejection = rejection_of(make_pod(annotations=annotated(path=annotation, port="1")))
    assert rejection.reason == Reason.INVALID_PATH
    assert "is a URL: give the path only, such as /metrics" in rejection.detail
    assert len(rejection.detail) < 300


@pytest.mark.parametrize(
    ("annotation", "path"),
    [
        ("//metrics", "//metrics"),
        ("//metrics/", "//metrics/"),
        ("///a/metrics", "///a/metrics"),
        ("/a//metrics", "/a//metrics"),
        ("/http://example.com/metrics", "/http://example.com/metrics"),
        ("probe?target=http://example.com/", "/probe"),
        ("metrics:all", "/metrics:all"),
        ("/m#part", "/m#part"),
        ("#part", "/#part"),
        ("/a b", "/a b"),
        ("/a\\b", "/a\\b"),
        ("/a%zz%", "/a%zz%"),
        ("/a%20b", "/a%20b"),
        ("/métriques", "/métriques"),
        ("../metrics", "/../metrics"),
    ],
)
def test_odd_path_is_kept_for_prometheus_to_escape(annotation: str, path: str) -> None:
    """Prometheus escapes whatever the path holds, so nothing in it needs a rejection."""
    assert dict(only(make_pod(annotations=annotated(path=annotation, port="1"))).meta)["metrics_path"] == path


def test_query_and_annotations_become_params() -> None:
    """The query string and param annotations are param_<name>, decoded, since Prometheus encodes again."""
    pod = make_pod(annotations=annotated(path="/m?format=a%20b&empty=", param__module="x/y", port="1"))
    params = {key: value for key, value in only(pod).meta if key.startswith("param_")}
    # An empty value says no more than none at all, and Consul's meta has no room for it.
    assert params == {"param_format": "a b", "param_module": "x/y"}


@pytest.mark.parametrize(
    ("annotations", "reason"),
    [
        (annotated(path="/m?a=1&a=2", port="1"), Reason.INVALID_PARAM),
        (annotated(path="/m?a=1", param__a="2", port="1"), Reason.INVALID_PARAM),
        (annotated(path="/m?a[]=1", port="1"), Reason.INVALID_PARAM),
        (annotated(path="/m?=1", port="1"), Reason.INVALID_PARAM),
        (annotated(path="/m?a=%00", port="1"), Reason.INVALID_PARAM),
        (annotated(path="/m?a=%ff", port="1"), Reason.INVALID_PATH),
        (annotated(path="/m?" + "&".join(f"a{n}=1" for n in range(60)), port="1"), Reason.INVALID_PATH),
        (annotated(path="/m\x00", port="1"), Reason.INVALID_PATH),
        (annotated(path="/m\u2028x", port="1"), Reason.INVALID_PATH),
        (annotated(path="/" + "m" * 512, port="1"), Reason.META_TOO_LONG),
        (annotated(path="/" + "é" * 256, port="1"), Reason.META_TOO_LONG),
        (annotated(scheme="ftp", port="1"), Reason.INVALID_SCHEME),
        (annotated(port="0"), Reason.INVALID_PORT),
        (annotated(port="65536"), Reason.INVALID_PORT),
        (annotated(port="-1"), Reason.UNKNOWN_PORT_NAME),
        (annotated(port="nope"), Reason.UNKNOWN_PORT_NAME),
        (annotated(port="٣"), Reason.UNKNOWN_PORT_NAME),
        (annotated(port="1" * 5000), Reason.UNKNOWN_PORT_NAME),
        (annotated(), Reason.NO_PORT),
    ],
)
def test_garbage_is_rejected_by_reason(annotations: dict[str, str], reason: Reason) -> None:
    """An annotation that cannot be honoured is a rejection that names its cause and the ID it leaves alone."""
    rejection = rejection_of(make_pod(annotations=annotations))
    assert (rejection.reason, rejection.id) == (reason, "pod--shop--web-1")
    assert rejection.detail.isprintable()
    assert len(rejection.detail) < 300


def test_many_params_are_too_much_meta() -> None:
    """More meta than Consul takes is a rejection, not a refused write."""
    annotations = annotated(port="1", **{f"param__p{n}": "1" for n in range(60)})
    assert rejection_of(make_pod(annotations=annotations)).reason == Reason.META_TOO_MANY


def test_scheme_is_taken_over() -> None:
    """Https is passed on, in lower case."""
    assert dict(only(make_pod(annotations=annotated(scheme="HTTPS", port="1"))).meta)["scheme"] == "https"


@pytest.mark.parametrize(
    ("annotation", "ports", "port"),
    [
        ("web", (tcp(80, "web"), tcp(81)), 80),
        (" 8080 ", (), 8080),
        (None, (tcp(1, "prom"), tcp(2, "http-metrics"), tcp(3, "web")), 2),
        (None, (tcp(1, "web"), tcp(2, "metrics")), 2),
        (None, (tcp(53, "dns", "UDP"), tcp(8080)), 8080),
        (None, (tcp(8080), tcp(8080)), 8080),
        ("", (tcp(7),), 7),
    ],
)
def test_port(annotation: str | None, ports: tuple[object, ...], port: int) -> None:
    """A number, a name, the usual names, or the only TCP port."""
    annotations = annotated() if annotation is None else annotated(port=annotation)
    assert only(make_pod(annotations=annotations, ports=ports)).port == port


def test_two_unnamed_ports_are_ambiguous() -> None:
    """With several TCP ports and no usual name it is unclear which is meant."""
    assert (
        rejection_of(make_pod(annotations=annotated(), ports=(tcp(1), tcp(2)))).reason
        == Reason.AMBIGUOUS_PORT
    )


@pytest.mark.parametrize("name", PORT_NAMES)
@pytest.mark.parametrize("annotation", [None, "", "{name}", "7, {name}", "{name},{name}"])
def test_port_name_of_two_numbers_is_ambiguous(name: str, annotation: str | None) -> None:
    """Containers that give one name to two numbers leave open which is meant, annotated or not."""
    annotations = annotated() if annotation is None else annotated(port=annotation.format(name=name))
    rejection = rejection_of(
        make_pod(annotations=annotations, ports=(tcp(8080, name), tcp(80), tcp(9090, name)))
    )
    assert rejection.reason == Reason.AMBIGUOUS_PORT
    assert f"'{name}' (8080, 9090)" in rejection.detail


def test_ambiguous_port_name_of_many_containers_has_a_short_detail() -> None:
    """The detail names a few numbers, however many containers a Pod has."""
    ports = tuple(tcp(number, "metrics") for number in range(10_000, 12_000))
    detail = rejection_of(make_pod(annotations=annotated(), ports=ports)).detail
    assert len(detail) < 300
    assert detail.startswith("2000 TCP ports are named 'metrics' (10000, 10001, 10002, 10003)")


@pytest.mark.parametrize(
    ("annotation", "ports", "numbers"),
    [
        (None, (tcp(8080, "metrics"), tcp(8080, "metrics")), (8080,)),
        ("web", (tcp(8080, "web"), tcp(8080, "web")), (8080,)),
        (None, (tcp(53, "metrics", "UDP"), tcp(8080, "metrics")), (8080,)),
        ("dns", (tcp(53, "dns", "UDP"), tcp(53, "dns", "SCTP"), tcp(5353, "dns")), (5353,)),
        (None, (tcp(53, "metrics", "UDP"), tcp(9090, "prom")), (9090,)),
        (None, (tcp(1, "metrics"), tcp(2, "prom"), tcp(3, "prom")), (1,)),
        ("web", (tcp(80, "web"), tcp(1, "metrics"), tcp(2, "metrics")), (80,)),
        ("2,1,metrics", (tcp(1, "metrics"), tcp(1, "metrics")), (2, 1)),
        ("53", (tcp(53, "dns", "UDP"),), (53,)),
    ],
)
def test_port_name_of_one_tcp_number_is_found(
    annotation: str | None, ports: tuple[ContainerPort, ...], numbers: tuple[int, ...]
) -> None:
    """One number is one port, and only TCP counts; an ambiguous name that is not asked for does not matter."""
    annotations = annotated() if annotation is None else annotated(port=annotation)
    targets = resolve(make_pod(annotations=annotations, ports=ports), RULES)
    assert isinstance(targets, tuple), targets
    assert tuple(target.port for target in targets) == numbers


@pytest.mark.parametrize("annotation", ["dns", "80,dns"])
@pytest.mark.parametrize("protocols", [("UDP",), ("SCTP",), ("SCTP", "UDP")])
def test_port_name_without_tcp_is_rejected(annotation: str, protocols: tuple[str, ...]) -> None:
    """Prometheus scrapes over TCP; the detail names the protocol."""
    ports = (tcp(80, "web"), *(tcp(53, "dns", protocol) for protocol in protocols))
    rejection = rejection_of(make_pod(annotations=annotated(port=annotation), ports=ports))
    assert rejection.reason == Reason.UNKNOWN_PORT_NAME
    assert rejection.detail == f"the port 'dns' is '{'/'.join(protocols)}', not TCP"


@pytest.mark.parametrize(
    ("ip", "reason"),
    [
        ("", Reason.NO_IP),
        ("nope", Reason.INVALID_IP),
        ("0.0.0.0", Reason.INVALID_IP),
        ("::", Reason.INVALID_IP),
    ],
)
def test_pod_without_a_usable_ip(ip: str, reason: Reason) -> None:
    """A Pod that cannot be reached is rejected."""
    assert rejection_of(make_pod(ip=ip)).reason == reason


def test_ipv6_pod() -> None:
    """An IPv6 address is written in its canonical form, without brackets."""
    assert only(make_pod(ip="2001:DB8:0::5")).address == "2001:db8::5"


@pytest.mark.parametrize("host_network", [False, True])
def test_pod_on_its_own_network_has_its_own_address(host_network: bool) -> None:
    """Each port of a Pod says whether another Pod may be at its address."""
    pod = make_pod(annotations=annotated(port="1,2"), ports=(tcp(1), tcp(2)), host_network=host_network)
    targets = resolve(pod, RULES)
    assert isinstance(targets, tuple)
    assert [target.has_own_address for target in targets] == [not host_network] * 2


def test_node_has_no_address_of_its_own() -> None:
    """A Node's target is the proxy's NodePort, which other targets share."""
    assert not only(make_node()).has_own_address


@pytest.mark.parametrize("deleted", [False, True])
@pytest.mark.parametrize("phase", ["Running", "Unknown"])
def test_pod_being_deleted_is_a_terminating_target(phase: str, deleted: bool) -> None:
    """A Pod is scraped until it has finished, and its target says that it is going."""
    assert only(make_pod(phase=phase, deleted=deleted)).is_terminating is deleted


def test_node_is_the_proxy_at_its_address() -> None:
    """A Node is registered at its IP and the proxy's NodePort, with the path that leads to its kubelet."""
    target = only(make_node())
    assert (target.id, target.address, target.port) == ("node--192.0.2.10", "192.0.2.10", 31112)
    assert dict(target.meta) == {
        "kind": "node",
        "metrics_path": "/api/v1/nodes/192.0.2.10:10250/metrics/cadvisor",
        "node": "node-a",
        "scheme": "http",
    }


def test_node_keeps_its_own_kubelet_port_and_brackets() -> None:
    """The kubelet's own port is used, and an IPv6 literal stands in brackets in the path."""
    target = only(make_node("six", ("InternalIP", "2001:db8:1::5"), kubelet_port=10260))
    assert target.id == "node--2001:db8:1::5"
    assert dict(target.meta)["metrics_path"] == "/api/v1/nodes/[2001:db8:1::5]:10260/metrics/cadvisor"


@pytest.mark.parametrize(
    ("addresses", "address"),
    [
        ((("ExternalIP", "203.0.113.9"), ("InternalIP", "192.0.2.1")), "192.0.2.1"),
        ((("Hostname", "n"), ("ExternalIP", "203.0.113.9")), "203.0.113.9"),
        ((("InternalIP", "bad"), ("InternalIP", "192.0.2.2")), "192.0.2.2"),
        ((("InternalIP", "0.0.0.0"), ("ExternalIP", "203.0.113.9")), "203.0.113.9"),
        ((("InternalIP", "::ffff:192.0.2.7"),), "192.0.2.7"),
    ],
)
def test_node_address(addresses: tuple[tuple[str, str], ...], address: str) -> None:
    """InternalIP before ExternalIP, and only IP literals."""
    assert only(make_node("n", *addresses)).address == address


@pytest.mark.parametrize(
    "entry", [("Hostname", "node-a"), ("InternalIP", "fe80::1%eth0"), ("InternalIP", "x")]
)
def test_node_without_address(entry: tuple[str, str]) -> None:
    """A Node without an IP literal is rejected."""
    assert rejection_of(make_node("n", entry)).reason == Reason.NO_ADDRESS


def test_undecodable_item_is_a_rejection_that_names_its_id() -> None:
    """An item that could not be read is rejected under its own ID; without a name nothing is said."""
    key = ObjectKey(Kind.POD, "shop", "odd")
    assert resolve(Undecodable(Kind.POD, key, "x"), RULES) == Rejection(
        key, Reason.UNDECODABLE, "x", "pod--shop--odd"
    )
    node = ObjectKey(Kind.NODE, "", "odd")
    assert resolve(Undecodable(Kind.NODE, node, "x"), RULES) == Rejection(node, Reason.UNDECODABLE, "x", "")
    assert resolve(Undecodable(Kind.POD, None, "x"), RULES) is None


_TEXT = st.text(max_size=60) | st.sampled_from(["true", "/metrics", "9102", "https", "metrics", "a=1&a=2"])


@given(
    st.builds(
        make_pod,
        ip=_TEXT | st.ip_addresses().map(str),
        phase=st.sampled_from(["Running", "Unknown", "Failed", ""]),
        annotations=st.dictionaries(
            st.sampled_from(["path", "port", "scheme", "param-a", "param-b[]"]).map("prometheus.io/".__add__),
            _TEXT,
        ).map(lambda given: {**given, "prometheus.io/scrape": "true"}),
        ports=st.lists(st.builds(tcp, st.integers(1, 65535), _TEXT)).map(tuple),
    )
)
def test_odd_pods_are_targets_that_consul_takes_or_rejections(pod: Pod) -> None:
    """Whatever a Pod holds, it is a target within Consul's limits or a rejection with a printable reason."""
    resolved = resolve(pod, RULES)
    if isinstance(resolved, Rejection):
        assert resolved.reason in set(Reason)
        assert resolved.detail.isprintable()
        return
    for target in resolved or ():
        assert 1 <= target.port <= 65535
        assert len(target.meta) <= 56
        assert all(len(value.encode()) <= 512 and "\x00" not in value for _, value in target.meta)
        assert dict(target.meta)["metrics_path"].startswith("/")
