"""Intervals, timeouts and numbered sets of annotations."""

from collections.abc import Iterable, Mapping
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from k8s_consul_registrar.errors import Reason
from k8s_consul_registrar.model import (
    Kind,
    ObjectKey,
    Pod,
    Rejection,
    ServiceWithSlices,
    SliceEndpoint,
    Target,
)
from k8s_consul_registrar.proxy.nodes import NodeTable
from k8s_consul_registrar.proxy.routes import UNKNOWN_POD, Pods, Route, find_pod, proxied_pod
from k8s_consul_registrar.targets.annotations import IntervalRules, parse_duration
from k8s_consul_registrar.targets.endpoints import resolve_item
from k8s_consul_registrar.targets.meta import parse_target_label
from k8s_consul_registrar.targets.resolve import TargetRules, resolve
from support.builders import annotated, make_kube_service, make_pod, make_slice, tcp

P = "prometheus.io/"


def targets(
    annotations: Mapping[str, str], rules: TargetRules | None = None, **pod: Any
) -> tuple[Target, ...]:
    """Return the targets of a Pod with these annotations."""
    resolved = resolve(make_pod(annotations=annotations, host_ip="192.0.2.10", **pod), rules or TargetRules())
    assert isinstance(resolved, tuple), resolved
    return resolved


def rejection(annotations: Mapping[str, str], rules: TargetRules | None = None) -> Rejection:
    """Return why a Pod with these annotations is rejected."""
    resolved = resolve(make_pod(annotations=annotations), rules or TargetRules())
    assert isinstance(resolved, Rejection), resolved
    return resolved


def times(target: Target) -> tuple[str, str]:
    """Return the interval and timeout in a target's meta, empty where there are none."""
    meta = dict(target.meta)
    return meta.get("scrape_interval", ""), meta.get("scrape_timeout", "")


def given_times(**texts: str) -> dict[str, str]:
    """Return annotations with a port; `interval` stands for `scrape-interval`, and so on."""
    return annotated(port="80") | {f"{P}scrape-{name}": text for name, text in texts.items()}


# Interval and timeout


@pytest.mark.parametrize(
    ("annotations", "expected"),
    [
        ({}, ("", "")),
        ({"interval": "1m30s"}, ("1m30s", "")),
        ({"interval": " 60s ", "timeout": "60s"}, ("60s", "60s")),
        ({"interval": "", "timeout": ""}, ("", "")),
        ({"slow": "true"}, ("5m", "30s")),
        ({"slow": "false"}, ("", "")),
        ({"slow": "true", "interval": "20s"}, ("20s", "20s")),
        ({"slow": "true", "timeout": "2m"}, ("5m", "2m")),
    ],
)
def test_annotated_durations_become_meta(annotations: dict[str, str], expected: tuple[str, str]) -> None:
    """As they are written; a slow target gets the operator's."""
    (target,) = targets(given_times(**annotations))
    assert times(target) == expected
    assert target.notes == ()


def test_names_with_an_underscore_mean_the_same() -> None:
    """Both spellings are in use; where both are given the dash counts."""
    spelled = annotated(port="80") | {f"{P}scrape_interval": "1m", f"{P}scrape_timeout": "20s"}
    assert times(targets(spelled)[0]) == ("1m", "20s")
    assert times(targets(spelled | {f"{P}scrape-interval": "2m"})[0]) == ("2m", "20s")


@pytest.mark.parametrize(
    ("annotations", "detail"),
    [
        ({"interval": "15"}, "scrape-interval '15' is not a duration"),
        ({"interval": "0"}, "scrape-interval must be more than 0"),
        ({"interval": "0ms"}, "scrape-interval must be more than 0"),
        ({"interval": "30s1m"}, "is not a duration"),
        ({"interval": "300y"}, "longer than Prometheus can count"),
        ({"interval": "1m", "timeout": "0s"}, "scrape-timeout must be more than 0"),
        ({"interval": "1m", "timeout": "61s"}, "scrape-timeout 61s is longer than scrape-interval, 1m"),
        ({"timeout": "5s"}, "needs scrape-interval beside it, because SCRAPE_INTERVAL_DEFAULT is not set"),
        ({"slow": "true", "timeout": "6m"}, "scrape-timeout 6m is longer than scrape-interval, 5m"),
        ({"interval2": "bad", "path2": "/x"}, "scrape-interval2 'bad' is not a duration"),
    ],
)
def test_durations_that_prometheus_would_not_take_are_rejected(
    annotations: dict[str, str], detail: str
) -> None:
    """A target with a timeout over its interval would be dropped by the collector, unseen."""
    given = given_times(**{name: text for name, text in annotations.items() if name != "path2"})
    if "path2" in annotations:
        given[f"{P}path2"] = annotations["path2"]
    rejected = rejection(given)
    assert rejected.reason == Reason.INVALID_INTERVAL
    assert detail in rejected.detail
    assert rejected.id == "pod--shop--web-1"


def test_timeout_without_an_interval_is_compared_with_the_operator_s_default() -> None:
    """The interval itself stays the collector's."""
    rules = TargetRules(intervals=IntervalRules(default=parse_duration("30s")))
    assert times(targets(given_times(timeout="30s"), rules)[0]) == ("", "30s")
    rejected = rejection(given_times(timeout="31s"), rules)
    assert "is longer than SCRAPE_INTERVAL_DEFAULT, 30s" in rejected.detail


def test_interval_below_the_least_is_raised_and_noted() -> None:
    """The timeout stays, since it fits the annotated interval and so the longer one."""
    (target,) = targets(given_times(interval="1s", timeout="500ms"))
    assert times(target) == ("10s", "500ms")
    assert target.notes == ("interval_raised",)
    anything = TargetRules(intervals=IntervalRules(least=parse_duration("0")))
    assert times(targets(given_times(interval="1s"), anything)[0]) == ("1s", "")


def test_intervals_are_registered_through_the_proxy_too() -> None:
    """They are the collector's, whatever it reaches."""
    (target,) = targets(given_times(interval="1m", timeout="9s"), TargetRules(pods_through_proxy=True))
    assert times(target) == ("1m", "9s")
    assert target.port == 31112


def test_slow_pod_without_scrape_is_a_target() -> None:
    """As in the Prometheus chart, whose jobs for slow Pods look at nothing else; `scrape` decides where it is given."""
    slow = {f"{P}scrape-slow": "true", f"{P}port": "80"}
    assert times(targets(slow)[0]) == ("5m", "30s")
    assert targets(slow | {f"{P}scrape": "false"}) == ()
    assert targets({f"{P}scrape-slow": "yes", f"{P}port": "80"}) == ()


def test_proxy_ignores_intervals() -> None:
    """It does not know the operator's default, and a slip there is no reason to refuse a scrape."""
    assert proxied_pod(make_pod(annotations=given_times(timeout="5s")), P) is not None


# Numbered sets


def shape(target: Target) -> tuple[str, int, str, str]:
    """Return the ID, port, path and scheme of a target."""
    meta = dict(target.meta)
    return target.id.removeprefix("pod--shop--web-1"), target.port, meta["metrics_path"], meta["scheme"]


def test_numbered_set_inherits_what_it_leaves_out() -> None:
    """Path, scheme, parameters and interval come from the first set."""
    given = annotated(port="80", path="/a?q=1", scheme="https", param__x="1", port2="81", port3="82")
    given |= {f"{P}path3": "/c", f"{P}scheme3": "http", f"{P}param3-y": "2", f"{P}scrape-interval": "1m"}
    given |= {f"{P}scrape-interval3": "2m"}
    first, second, third = targets(given)
    assert [shape(one) for one in (first, second, third)] == [
        ("", 80, "/a", "https"),
        ("--81", 81, "/a", "https"),
        ("--82", 82, "/c", "http"),
    ]
    assert [times(one)[0] for one in (first, second, third)] == ["1m", "1m", "2m"]
    params = [
        {key: text for key, text in one.meta if key.startswith("param_")} for one in (first, second, third)
    ]
    assert params == [
        {"param_q": "1", "param_x": "1"},
        {"param_q": "1", "param_x": "1"},
        {"param_x": "1", "param_y": "2"},
    ]


def test_parameter_of_a_numbered_set_replaces_the_inherited_one() -> None:
    """By annotation or by its own query; within one set a repeated name stays a mistake."""
    base = annotated(port="80", param__x="1")
    for own in ({f"{P}port2": "81", f"{P}param2-x": "2"}, {f"{P}path2": "/b?x=2"}):
        assert dict(targets(base | own)[1].meta)["param_x"] == "2"
    rejected = rejection(base | {f"{P}path2": "/b?x=2", f"{P}param2-x": "3"})
    assert rejected.reason == Reason.INVALID_PARAM


def test_slow_numbered_set_takes_no_interval_from_the_first() -> None:
    """Otherwise `scrape-slow2` would mean nothing."""
    given = given_times(interval="15s", timeout="15s") | {f"{P}port2": "81", f"{P}scrape-slow2": "true"}
    assert [times(one) for one in targets(given)] == [("15s", "15s"), ("5m", "30s")]


def test_path_of_a_numbered_set_without_a_port_is_a_second_scrape_of_the_first_port() -> None:
    """Its ID has the port and its number among the scrapes of that port."""
    given = annotated(port="80", path="/a", path2="/b", path3="/c", port4="81")
    assert [shape(one) for one in targets(given)] == [
        ("", 80, "/a", "http"),
        ("--80--2", 80, "/b", "http"),
        ("--80--3", 80, "/c", "http"),
        ("--81", 81, "/a", "http"),
    ]


def test_numbered_set_that_repeats_a_scrape_adds_nothing() -> None:
    """Two services of one URL would be scraped twice under the same labels."""
    assert len(targets(annotated(port="80,81", port2="81", port3="80"))) == 1 + 1


@pytest.mark.parametrize("name", ["port1", "port0", "port17", "port02", "port2x", "scheme2", "xport2"])
def test_other_numbers_and_sets_without_port_and_path_are_no_annotations(name: str) -> None:
    """They were ignored before there were numbered sets, and are still."""
    assert len(targets(annotated(port="80") | {f"{P}{name}": "81"})) == 1


def test_more_than_16_ports_in_all_sets_are_rejected() -> None:
    """Each is a service."""
    sixteen = ",".join(map(str, range(80, 96)))
    assert len(targets(annotated(port=sixteen))) == 16
    assert rejection(annotated(port=sixteen, port2="99")).reason == Reason.TOO_MANY_PORTS


def test_first_port_is_implied_beside_numbered_ones() -> None:
    """A named port of a container counts for the first set."""
    given = annotated(port2="9000", path2="/x")
    assert [shape(one)[:3] for one in targets(given, ports=(tcp(80, "metrics"), tcp(81, "web")))] == [
        ("", 80, "/metrics"),
        ("--9000", 9000, "/x"),
    ]


def test_proxy_serves_each_scrape_of_one_port_at_its_registered_path() -> None:
    """The path that the registrar writes leads to the annotated path, and further numbers lead nowhere."""
    given = annotated(port="80", path="/a", path2="/b?x=1", scheme2="https", port3="81")
    pod = make_pod(annotations=given, host_ip="192.0.2.10")
    pods = Pods()
    pods.put("shop", "web-1", proxied_pod(pod, P))
    pods.known = True
    asked = []
    for target in targets(given, TargetRules(pods_through_proxy=True)):
        route = find_pod(dict(target.meta)["metrics_path"].encode(), pods, NodeTable())
        assert isinstance(route, Route)
        asked.append((route.endpoint.port, route.path, route.endpoint.peer))
    assert asked == [
        (80, "/a", "pod over http"),
        (80, "/b?x=1", "pod over https"),
        (81, "/a", "pod over http"),
    ]
    for path in (":80/metrics/3", ":81/metrics/2", "/metrics/3"):
        assert (
            find_pod(f"/api/v1/namespaces/shop/pods/web-1{path}".encode(), pods, NodeTable()) is UNKNOWN_POD
        )


# Anything

NAMES = [
    *(
        "scrape",
        "scrape-slow",
        "port",
        "path",
        "scheme",
        "scrape-interval",
        "scrape_timeout",
        "param-x",
        "param-y",
    ),
    *("port2", "path2", "scheme2", "param2-x", "scrape-interval2", "scrape_interval2", "scrape-slow2"),
    *("port16", "path16", "param16-z", "scrape-timeout16", "port17", "path1"),
]
TEXTS = st.sampled_from(
    [
        "true",
        "80",
        "81",
        "80,81",
        "web",
        "metrics",
        "/m",
        "/m?x=1",
        "?x=1&y=2",
        "http://h/",
        "https",
        "HTTP",
        "",
    ]
) | st.sampled_from(["15s", "1m", "0", "5m30s", "1h", "ftp", "x y", "\x00", "1" * 600, "false"])
PORTS = st.lists(
    st.builds(tcp, st.sampled_from([80, 81, 9102]), st.sampled_from(["web", "metrics", ""])), max_size=3
).map(tuple)


@st.composite
def pods(draw: st.DrawFn) -> Pod:
    """Draw a Pod with any annotations that are read, most of them asking to be scraped."""
    annotations = draw(st.dictionaries(st.sampled_from(NAMES), TEXTS, max_size=8))
    if draw(st.integers(0, 9)):
        annotations["scrape"] = "true"
    return make_pod(
        annotations={f"{P}{name}": text for name, text in annotations.items()},
        ports=draw(PORTS),
        host_ip=draw(st.sampled_from(["192.0.2.10", ""])),
        host_network=draw(st.booleans()),
    )


@given(pods(), st.booleans())
def test_any_pod_ends_as_targets_of_different_ids_or_as_one_rejection(pod: Pod, is_proxied: bool) -> None:
    """One of them, for whatever its author wrote; and every duration that is registered fits its interval."""
    resolved = resolve(pod, TargetRules(pods_through_proxy=is_proxied))
    if isinstance(resolved, Rejection):
        assert resolved.reason in set(Reason)
        assert resolved.detail
        return
    assert resolved is not None
    assert len({target.id for target in resolved}) == len(resolved)
    places = {(target.address, target.port, target.meta) for target in resolved}
    assert is_proxied or len(places) >= len({target.meta for target in resolved})
    paths = {dict(target.meta)["metrics_path"] for target in resolved}
    assert not is_proxied or len(paths) == len(resolved)
    for target in resolved:
        interval, timeout = times(target)
        if interval and timeout:
            assert parse_duration(timeout).milliseconds <= parse_duration(interval).milliseconds


IDENTITY = {"kind", "namespace", "pod", "node", "service"}


@given(pods())
def test_service_reads_the_same_annotations_as_a_pod(pod: Pod) -> None:
    """Same ports, paths, parameters, schemes, intervals, notes and labels, or the same reason."""
    rules = TargetRules(target_labels=(parse_target_label("team"),))
    pod = replace(pod, annotations={f"{P}label-team": "blue", **pod.annotations})
    service = make_kube_service(annotations=pod.annotations)
    part = make_slice("web-a", SliceEndpoint(pod.ip, pod=pod.name), ports=pod.ports)
    whole = ServiceWithSlices(ObjectKey(Kind.ENDPOINT, "shop", "web"), service, (part,))
    of_pod, of_service = resolve_item(pod, rules), resolve_item(whole, rules)
    if isinstance(of_pod, Rejection):
        assert isinstance(of_service, Rejection)
        assert of_service.reason == of_pod.reason
        return
    assert isinstance(of_pod, tuple)
    assert of_service is None or isinstance(of_service, tuple)
    assert readings(of_service or ()) == readings(of_pod)


def readings(targets: Iterable[Target]) -> list[tuple[Any, ...]]:
    """Return what targets say of their scrapes, without what tells whose they are."""
    return [
        (one.address, one.port, one.notes, tuple(pair for pair in one.meta if pair[0] not in IDENTITY))
        for one in targets
    ]
