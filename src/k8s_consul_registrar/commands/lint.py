"""The command lint: says which Pods and Services the registrar would reject, before they are applied."""

import argparse
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import msgspec

from k8s_consul_registrar.commands import settings_offline
from k8s_consul_registrar.commands.manifests import BadManifest, Manifest, Values, read_manifests
from k8s_consul_registrar.errors import Reason
from k8s_consul_registrar.kube.objects import Item, decode_object
from k8s_consul_registrar.model import (
    ContainerPort,
    EndpointSlice,
    Kind,
    KubeService,
    Rejection,
    ServiceWithSlices,
    SliceEndpoint,
)
from k8s_consul_registrar.runner import EXIT_CHANGES, EXIT_FAILURE, EXIT_OK
from k8s_consul_registrar.targets.annotations import asks_for_scrapes
from k8s_consul_registrar.targets.endpoints import (
    NOT_PROXIED,
    ServiceScrape,
    endpoints_key,
    resolve_item,
    resolve_service,
)
from k8s_consul_registrar.targets.resolve import TargetRules
from k8s_consul_registrar.wiring.registrar import Wiring

ERROR, WARNING = "error", "warning"
LARGEST = 16 * 2**20  # bytes of one file
SUFFIXES = (".yaml", ".yml", ".json")
STDIN = "-"
DEFAULT_NAMESPACE = "default"

# Where each kind keeps the template of its Pods, and how Kubernetes goes on from its name to theirs.
_TEMPLATE = ("spec", "template")
WORKLOADS: Mapping[str, tuple[tuple[str, ...], str]] = {
    "CronJob": (("spec", "jobTemplate", "spec", "template"), "-29000000-abcde"),
    "DaemonSet": (_TEMPLATE, "-abcde"),
    "Deployment": (_TEMPLATE, "-7d9f8c6b5-abcde"),
    "Job": (_TEMPLATE, "-abcde"),
    "PodTemplate": (("template",), ""),
    "ReplicaSet": (_TEMPLATE, "-abcde"),
    "ReplicationController": (_TEMPLATE, "-abcde"),
    "StatefulSet": (_TEMPLATE, "-0"),
}
_ADDRESSES = {"IPv4": "192.0.2.1", "IPv6": "2001:db8::1"}
# A Pod that runs, as far as a manifest cannot say it. Nor can it say which address families the cluster has, so that the
# Pod has both; the addresses are documentation's (RFC 5737, RFC 3849).
_IPS, _HOST_IPS = [{"ip": one} for one in _ADDRESSES.values()], [{"ip": "192.0.2.2"}, {"ip": "2001:db8::2"}]
_RUNNING: Values = {
    "phase": "Running",
    "podIP": "192.0.2.1",
    "podIPs": _IPS,
    "hostIP": "192.0.2.2",
    "hostIPs": _HOST_IPS,
}
_SLICE = "of-the-manifest"


@dataclass(frozen=True, slots=True)
class LintFinding:
    """Something wrong in a file; `line` counts from 1."""

    level: str
    file: str
    line: int
    object: str
    reason: str
    detail: str


@dataclass(frozen=True, slots=True)
class LintReport:
    """The findings of a run, and the counts of targets and of objects that are not annotated.

    A Service counts as many targets as each of its endpoints has.
    """

    findings: tuple[LintFinding, ...]
    targets: int
    unannotated: int

    @property
    def exit_code(self) -> int:
        """3 if an object would be rejected, 1 if a file cannot be read."""
        errors = [one for one in self.findings if one.level == ERROR]
        if any(not one.object for one in errors):
            return EXIT_FAILURE
        return EXIT_CHANGES if errors else EXIT_OK


def run(parsed: argparse.Namespace, environment: Mapping[str, str]) -> int:
    """Lint the files: exit 0 nothing rejected, 3 something is, 1 a file cannot be read."""
    settings = settings_offline(environment, without=("CLUSTER_NAME",))
    report = lint(
        parsed.files,
        Wiring(settings).targets,
        reads_services=Kind.ENDPOINT in settings.selection.kinds,
        stdin=sys.stdin.buffer.read,
    )
    if parsed.output == "json":
        sys.stdout.buffer.write(msgspec.json.format(msgspec.json.encode(report.findings)) + b"\n")
    else:
        for finding in report.findings:
            print(_github(finding) if parsed.output == "github" else _text(finding))
        rejected = sum(one.level == ERROR for one in report.findings)
        print(
            f"{report.targets} targets, {rejected} errors, {report.unannotated} not annotated",
            file=sys.stderr,
        )
    return report.exit_code


def lint(
    names: Iterable[str], rules: TargetRules, *, reads_services: bool = False, stdin: Any = None
) -> LintReport:
    """Decide every Pod, Pod template and, with `reads_services`, Service in files, folders and standard input."""
    findings: list[LintFinding] = []
    targets = unannotated = 0
    for file, text in _texts(names, stdin):
        if isinstance(text, LintFinding):
            findings.append(text)
            continue
        for document in read_manifests(file, text, rules.annotation_prefix):
            if isinstance(document, BadManifest):
                findings.append(_unreadable(file, document.detail, document.line))
                continue
            for outcome in _decided(document, rules, reads_services=reads_services):
                if isinstance(outcome, LintFinding):
                    findings.append(outcome)
                else:
                    targets += outcome
                    unannotated += not outcome
    return LintReport(tuple(findings), targets, unannotated)


def _texts(names: Iterable[str], stdin: Any) -> Iterator[tuple[str, bytes | LintFinding]]:
    for name in names:
        if name == STDIN:
            yield "<stdin>", stdin()
            continue
        path = Path(name)
        files = sorted(one for one in path.rglob("*") if one.suffix in SUFFIXES) if path.is_dir() else [path]
        for file in files:
            try:
                if file.stat().st_size > LARGEST:
                    yield str(file), _unreadable(str(file), f"larger than {LARGEST >> 20} MiB")
                else:
                    yield str(file), file.read_bytes()
            except OSError as error:
                yield str(file), _unreadable(str(file), error.strerror or type(error).__name__)


def _unreadable(file: str, detail: str, line: int = 1) -> LintFinding:
    return LintFinding(ERROR, file, line, "", "unreadable", detail)


def _decided(document: Manifest, rules: TargetRules, *, reads_services: bool) -> Iterator[LintFinding | int]:
    """Yield the number of targets of each object that a document stands for, or what is wrong with it."""
    values, kind = document.values, str(document.values["kind"])
    meta = _mapping(values.get("metadata"))
    shown = _shown(kind, meta)
    workload = WORKLOADS.get(kind)
    if kind == "Service" and values.get("apiVersion", "v1") == "v1":  # not Knative's
        yield from _decided_service(document, shown, meta, rules, reads=reads_services)
    if workload is None:
        if kind in ("Pod", "Node"):
            is_node = kind == "Node"
            if not is_node or values.get("status"):
                pod = values if is_node else _pod(values, meta, meta)
                decode = partial(_decoded, pod, Kind.NODE if is_node else Kind.POD)
                yield from _judged(document, shown, pod, decode, rules)
        return
    path, suffix = workload
    template: Any = values
    for key in path:
        template = _mapping(template).get(key)
    own = _mapping(meta.get("annotations"))
    if f"{rules.annotation_prefix}scrape" in own:
        where = ".".join((*path, "metadata.annotations"))
        yield _warning(
            document,
            shown,
            "misplaced",
            f"{rules.annotation_prefix}… belongs in {where}: the {kind} is not scraped",
        )
    if not isinstance(template, dict):
        return
    inner = _mapping(template.get("metadata"))
    name = f"{meta.get('name') or meta.get('generateName') or 'unnamed'}{suffix}"
    pod = _pod(template, inner, {"name": name, "namespace": meta.get("namespace")})
    yield from _judged(document, shown, pod, partial(_decoded, pod, Kind.POD), rules)


def _decided_service(
    document: Manifest, shown: str, meta: Values, rules: TargetRules, *, reads: bool
) -> Iterator[LintFinding | int]:
    """Decide a Service as if it had one endpoint."""
    if reads:
        named = {**meta, "name": meta.get("name") or "unnamed"}
        named["namespace"] = meta.get("namespace") or DEFAULT_NAMESPACE
        service = {"metadata": named, "spec": _mapping(document.values.get("spec"))}
        yield from _judged(document, shown, service, partial(_with_endpoint, service, rules), rules)
    elif asks_for_scrapes(_mapping(meta.get("annotations")), rules.annotation_prefix):
        yield _warning(document, shown, "not_watched", "annotated, but DISCOVER does not have services")


def _judged(
    document: Manifest, shown: str, values: Values, decode: Callable[[], Item], rules: TargetRules
) -> Iterator[LintFinding | int]:
    meta = _mapping(values.get("metadata"))
    scrape = _mapping(meta.get("annotations")).get(f"{rules.annotation_prefix}scrape")
    if isinstance(scrape, str) and scrape not in ("true", "false", ""):
        yield _warning(
            document,
            shown,
            "not_a_target",
            f'{rules.annotation_prefix}scrape is {scrape[:40]!r}; only "true" counts',
        )
    try:
        resolved = resolve_item(decode(), rules)
    except (TypeError, ValueError, RecursionError) as error:
        yield LintFinding(ERROR, document.file, document.line, shown, "undecodable", str(error))
        return
    if isinstance(resolved, Rejection):
        detail = resolved.detail.removeprefix(f"EndpointSlice {_SLICE!r}: ")
        yield LintFinding(ERROR, document.file, document.line, shown, resolved.reason, detail)
    elif isinstance(resolved, tuple) and resolved and not resolved[0].address:
        yield _warning(document, shown, Reason.NOT_PROXIED, NOT_PROXIED)
    else:
        yield len(resolved) if isinstance(resolved, tuple) else 0


def _decoded(values: Values, kind: Kind) -> Item:
    return decode_object(msgspec.json.encode(values), kind)


def _with_endpoint(values: Values, rules: TargetRules) -> Item:
    """Return a Service with an EndpointSlice of one endpoint."""
    service = _decoded(values, Kind.SERVICE)
    if not isinstance(service, KubeService):
        return service
    spec = values["spec"]
    pod = f"{service.name}-abcde" if spec.get("selector") else ""
    scrape = resolve_service(service, rules)
    family = scrape.family_of(pod) if isinstance(scrape, ServiceScrape) else ""
    family = family or "IPv4"
    endpoint = SliceEndpoint(_ADDRESSES.get(family, ""), pod=pod, node="node")
    part = EndpointSlice(
        service.namespace, _SLICE, service.name, family, tuple(_slice_ports(spec)), (endpoint,)
    )
    return ServiceWithSlices(endpoints_key(service.namespace, service.name), service, (part,))


def _slice_ports(spec: Values) -> Iterator[ContainerPort]:
    """Yield the ports at a Service's endpoints; one that has a name there keeps the Service's number."""
    ports = spec.get("ports")
    for port in [_mapping(one) for one in ports] if isinstance(ports, list) else ():
        target = port.get("targetPort")
        number = target if isinstance(target, int) and target else port.get("port")
        if isinstance(number, int) and 1 <= number <= 65535:
            yield ContainerPort(str(port.get("name") or ""), number, str(port.get("protocol") or "TCP"))


def _pod(values: Values, meta: Values, named: Values) -> Values:
    """Return the Pod that Kubernetes would make of a manifest or template; one with a status stays as it is."""
    name = named.get("name") or f"{named.get('generateName') or 'unnamed-'}abcde"
    namespace = named.get("namespace") or DEFAULT_NAMESPACE
    spec = {"nodeName": "node"} | _mapping(values.get("spec"))
    status = values.get("status") or _RUNNING
    return {"metadata": {**meta, "name": name, "namespace": namespace}, "spec": spec, "status": status}


def _mapping(value: object) -> Values:
    return value if isinstance(value, dict) else {}


def _shown(kind: str, meta: Values) -> str:
    name = meta.get("name") or meta.get("generateName") or "unnamed"
    namespace = meta.get("namespace")
    full = f"{kind} {namespace}/{name}" if namespace else f"{kind} {name}"
    return " ".join(full.split())[:200]


def _warning(document: Manifest, shown: str, reason: str, detail: str) -> LintFinding:
    return LintFinding(WARNING, document.file, document.line, shown, reason, detail)


def _text(finding: LintFinding) -> str:
    what = f"{finding.object}: " if finding.object else ""
    return f"{finding.file}:{finding.line}: {finding.level}: {what}{finding.reason}: {finding.detail}"


def _github(finding: LintFinding) -> str:
    """Format a finding as a workflow command, which GitHub shows beside the line."""
    message = _escaped(f"{finding.object}: {finding.detail}" if finding.object else finding.detail)
    place = f"file={_property(finding.file)},line={finding.line},title={_property(finding.reason)}"
    return f"::{finding.level} {place}::{message}"


def _escaped(text: str) -> str:
    return text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")


def _property(text: str) -> str:
    return _escaped(text).replace(":", "%3A").replace(",", "%2C")
