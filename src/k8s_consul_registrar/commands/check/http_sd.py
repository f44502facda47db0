"""Checks of the service for collectors: its port, the files that guard it, and the file of saved targets."""

import asyncio
import errno
import time
from pathlib import Path

import aiohttp

from k8s_consul_registrar.admin.file_sd import SETTING as FILE_SETTING
from k8s_consul_registrar.admin.http_sd import HEADERS, SD_PATH
from k8s_consul_registrar.admin.replacement import check_folder
from k8s_consul_registrar.admin.saved_state import Origin
from k8s_consul_registrar.admin.server import listen
from k8s_consul_registrar.admin.state_file import SETTING, read_state
from k8s_consul_registrar.commands.check.report import Finding, fail, ok, warn
from k8s_consul_registrar.errors import AccessError, OperationalError
from k8s_consul_registrar.settings.registrar import HttpSdSettings
from k8s_consul_registrar.tls import Trust, out_of_date
from k8s_consul_registrar.wiring.http_sd import http_sd_bearer, http_sd_tls

PORT, TOKEN, TLS, STATE = "http_sd port", "http_sd token", "http_sd tls", "http_sd state"
FILE = "file_sd"
WHERE = "the registrar reads the files: is their Secret mounted in its Pod, and readable to its user?"


async def check_http_sd(settings: HttpSdSettings, timeout: float) -> list[Finding]:  # noqa: ASYNC109 - of the request
    """Check the port, the token's file and the files of TLS separately."""
    return [await _port(settings, timeout), *_token(settings), *_tls(settings)]


async def check_state_file(path: Path, origin: Origin) -> list[Finding]:
    """Check the folder and the content of HTTP_SD_STATE_FILE; nothing is left there."""
    return [await asyncio.to_thread(_state_file, path, origin)]


def _state_file(path: Path, origin: Origin) -> Finding:
    try:
        check_folder(path, SETTING)
    except AccessError as error:
        hint = "HTTP_SD_STATE_FILE needs a folder that the registrar can write in: is a volume mounted there?"
        return fail(STATE, str(error), hint)
    try:
        saved = read_state(path, origin, time.time())
    except AccessError as error:
        if path.is_file() and not path.is_symlink():
            return ok(STATE, f"{path.parent} can be written in; {error}, and it will be replaced")
        hint = "let HTTP_SD_STATE_FILE name a file of its own, which need not be there yet"
        return fail(STATE, str(error), hint)
    held = "no targets are saved yet" if saved is None else f"{saved.count} targets are saved"
    return ok(STATE, f"{path.parent} can be written in; {held}")


async def check_file_sd(path: Path) -> list[Finding]:
    """Check the folder of FILE_SD_PATH; nothing is left there."""
    return [await asyncio.to_thread(_file_sd, path)]


def _file_sd(path: Path) -> Finding:
    try:
        check_folder(path, FILE_SETTING)
    except AccessError as error:
        hint = "FILE_SD_PATH needs a folder that the registrar can write in: is a volume mounted there?"
        return fail(FILE, str(error), hint)
    if path.is_symlink() or (path.exists() and not path.is_file()):
        hint = "let FILE_SD_PATH name a file of its own, which need not be there yet"
        return fail(FILE, f"{path} is not a regular file", hint)
    return ok(FILE, f"{path.parent} can be written in")


def _token(settings: HttpSdSettings) -> list[Finding]:
    if not settings.bearer_token_file:
        return []
    try:
        http_sd_bearer(settings)
    except AccessError as error:
        hint = f"HTTP_SD_BEARER_TOKEN_FILE names a file with one token a line; {WHERE}"
        return [fail(TOKEN, str(error), hint)]
    if settings.cert_file:
        return [ok(TOKEN, f"{settings.bearer_token_file} can be used")]
    detail = f"{settings.bearer_token_file} can be used, and collectors send the token over plain HTTP"
    return [warn(TOKEN, detail, "others can read it: set HTTP_SD_TLS_CERT_FILE and HTTP_SD_TLS_KEY_FILE")]


def _tls(settings: HttpSdSettings) -> list[Finding]:
    if not settings.cert_file:
        return []
    hint = (
        "HTTP_SD_TLS_CERT_FILE is a certificate in PEM with its chain, HTTP_SD_TLS_KEY_FILE its key without a "
        f"password, HTTP_SD_TLS_CLIENT_CA_FILE has CA certificates; {WHERE}"
    )
    try:
        pair = http_sd_tls(settings).value.pair
    except AccessError as error:
        return [fail(TLS, str(error), hint)]
    if problem := out_of_date(pair.certificate):
        return [fail(TLS, f"{pair.origin}: {problem}", hint)]
    clients = "must" if settings.client_ca_file else "need not"
    return [ok(TLS, f"certificate and key match; clients {clients} show a certificate")]


async def _port(settings: HttpSdSettings, seconds: float) -> Finding:
    try:
        listen(settings.port, "HTTP_SD_PORT").close()
    except OperationalError as error:
        cause = error.__cause__
        if isinstance(cause, OSError) and cause.errno == errno.EADDRINUSE:
            return await _taken(settings, str(error), seconds)
        return fail(PORT, str(error), "let HTTP_SD_PORT be a port above 1023 that nothing else uses")
    is_open = not settings.bearer_token_file and not settings.client_ca_file
    aside = "; anyone who reaches it can read the targets" if is_open else ""
    return ok(PORT, f"{settings.port or 'any port'} is free{aside}")


async def _taken(settings: HttpSdSettings, problem: str, seconds: float) -> Finding:
    """Find out if a registrar has the port, as it does when this runs in its Pod."""
    scheme = "https" if settings.cert_file else "http"
    is_registrar = False
    try:
        async with (
            asyncio.timeout(seconds),
            aiohttp.ClientSession(cookie_jar=aiohttp.DummyCookieJar()) as session,
            session.get(
                f"{scheme}://127.0.0.1:{settings.port}{SD_PATH}?kind=none",
                ssl=Trust(is_verified=False).context,
                allow_redirects=False,
            ) as response,
        ):
            is_registrar = HEADERS.items() <= dict(response.headers).items()
    except (aiohttp.ClientError, OSError, TimeoutError):
        if settings.client_ca_file:
            hint = "in the Pod of a running registrar this is right; otherwise stop the program that has the port"
            return warn(
                PORT, f"{problem}; without a client's certificate it is not known by which program", hint
            )
    if is_registrar:
        return ok(PORT, f"a registrar answers on {settings.port} already")
    return fail(PORT, problem, "let HTTP_SD_PORT be another port, or stop the program that has this one")
