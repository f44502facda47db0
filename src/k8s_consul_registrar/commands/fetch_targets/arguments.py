"""The arguments of fetch-targets: URLs with their files, tokens and TLS."""

import argparse
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from yarl import URL

from k8s_consul_registrar.admin.http_sd import SD_PATH
from k8s_consul_registrar.admin.replacement import check_folder, remove_leftovers
from k8s_consul_registrar.admin.target_groups import LONGEST_WAIT
from k8s_consul_registrar.errors import SettingsError
from k8s_consul_registrar.rotating import Derived, Rotating, fixed, token_file
from k8s_consul_registrar.telemetry import get_logger
from k8s_consul_registrar.tls import Cause, Peer, Trust, client_tls
from k8s_consul_registrar.urls import check_url

OUTPUT, TOKEN, CA, CERT, KEY = "--output", "--bearer-token-file", "--ca-file", "--cert-file", "--key-file"
REGISTRAR = Peer(
    {
        Cause.UNKNOWN_CA: f"{CA} must name a file with the CA that signed it",
        Cause.OTHER_NAME: "use a name in the URL that the certificate has",
        Cause.OUT_OF_DATE: "have it renewed, unless the clock here is wrong",
        Cause.NO_TLS: "the URL must begin with http://, or name the https port",
        Cause.OUR_CERTIFICATE: f"{CERT} and {KEY} must name one of HTTP_SD_TLS_CLIENT_CA_FILE",
    },
    CA,
    CERT,
    KEY,
)
_NAMED = re.compile(r"(?:([A-Za-z0-9][A-Za-z0-9._-]{0,99})=)?(https?://.+)", re.IGNORECASE | re.DOTALL)
_NOT_IN_A_NAME = re.compile(r"[^A-Za-z0-9._-]+")

log = get_logger("fetch")


@dataclass(frozen=True, slots=True)
class TargetSource:
    """A registrar's URL, and the file that is to hold its targets."""

    name: str
    url: URL
    path: Path


Read = tuple[TargetSource, Derived[Trust], Rotating[str]]


def read_arguments(parsed: argparse.Namespace) -> list[Read]:
    """Return each source with its TLS and its token; raises a SettingsError with every mistake, or an AccessError."""
    if not 0 <= parsed.wait <= LONGEST_WAIT:
        raise SettingsError([f"--wait is a number of seconds, at most {LONGEST_WAIT:g}"])
    sources = target_sources(parsed.urls, Path(parsed.output))
    count = len(sources)
    cas, certificates = _each(parsed.ca_file, count, CA), _each(parsed.cert_file, count, CERT)
    keys, tokens = _each(parsed.key_file, count, KEY), _each(parsed.bearer_token_file, count, TOKEN)
    for source in sources:
        check_folder(source.path, OUTPUT)
        remove_leftovers(source.path)
    read = []
    for source, ca, certificate, key, token in zip(sources, cas, certificates, keys, tokens, strict=True):
        if key and not certificate:
            raise SettingsError([f"{CERT} is missing: {KEY} needs it"])
        if token and source.url.scheme == "http":
            log.warning("the token is sent without TLS", of=source.name)
        kept = token_file(Path(token), TOKEN, of=f"{TOKEN} of {source.name}") if token else fixed("")
        read.append((source, client_tls(REGISTRAR, ca, certificate, key), kept))
    return read


def target_sources(urls: Sequence[str], output: Path) -> list[TargetSource]:
    """Return the sources in order; raises a SettingsError with every mistake."""
    problems: list[str] = []
    is_file = output.suffix == ".json" and not output.is_dir()
    if is_file and len(urls) > 1:
        problems.append(f"{OUTPUT} {output} is one file: several URLs need a folder")
    if not is_file and not output.is_dir():
        problems.append(f"{OUTPUT} {output} is neither a folder nor a file that ends in .json")
    sources: dict[Path, TargetSource] = {}
    for place, given in enumerate(urls, 1):
        match = _NAMED.fullmatch(given)
        if match is None:
            problems.append(f"URL {place} does not begin with http:// or https://, or NAME= before that")
            continue
        name, text = match.groups()
        if problem := check_url(text) or _credentials(text):
            problems.append(f"URL {place} {problem}")
            continue
        url = URL(text)
        url = url.with_path(SD_PATH, keep_query=True) if url.path in ("", "/") else url
        name = name or _NOT_IN_A_NAME.sub("-", f"{url.host}-{url.port}").strip("-.")
        path = output if is_file else output / f"{name}.json"
        if path in sources and not is_file:
            problems.append(
                f"URL {place} would share {path.name} with another: name it, as in east=https://…"
            )
        sources[path] = TargetSource(name, url, path)
    if problems:
        raise SettingsError(problems)
    return list(sources.values())


def _credentials(url: str) -> str:
    return f"holds a user or password: use {TOKEN}" if URL(url).user or URL(url).password else ""


def _each(values: Sequence[str], count: int, name: str) -> Iterator[str]:
    """Yield an option's value for each URL: given once it is that of all."""
    if len(values) not in (0, 1, count):
        raise SettingsError(
            [f"{name} is given {len(values)} times for {count} URLs: give it once, or once for each in order"]
        )
    return iter(values if len(values) == count else [*values, ""][:1] * count)
