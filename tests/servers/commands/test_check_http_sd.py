"""`check` of serving targets to collectors: the port, the token's file, the files of TLS."""

import asyncio
import socket
import ssl
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import trustme

from k8s_consul_registrar.admin.http_sd import HttpSdServer
from k8s_consul_registrar.admin.saved_state import Origin
from k8s_consul_registrar.commands.check.http_sd import check_file_sd, check_http_sd, check_state_file
from k8s_consul_registrar.commands.check.report import Finding, Result
from k8s_consul_registrar.rotating import bearer_tokens
from k8s_consul_registrar.settings.reading import read_registrar
from k8s_consul_registrar.settings.registrar import HttpSdSettings
from k8s_consul_registrar.tls import server_tls
from support.processes import reserve_ports
from support.seen import Registrar, pod_target
from unit.admin.test_saved_state import encoded


class Files:
    """A token, a certificate with its key, and an authority of clients, in a folder."""

    def __init__(self, folder: Path) -> None:
        self.token, self.ca = folder / "token", folder / "ca.crt"
        self.cert, self.key = folder / "tls.crt", folder / "tls.key"
        self.authority = trustme.CA()
        ours = self.authority.issue_cert("localhost")
        self.token.write_text("t0ken-of-collectors\n")
        ours.cert_chain_pems[0].write_to_path(str(self.cert))
        ours.private_key_pem.write_to_path(str(self.key))
        self.authority.cert_pem.write_to_path(str(self.ca))

    def settings(self, port: int = 0, **without: bool) -> HttpSdSettings:
        """Return the settings that name them, as the environment would give them."""
        given = {
            "HTTP_SD_BEARER_TOKEN_FILE": self.token,
            "HTTP_SD_TLS_CERT_FILE": self.cert,
            "HTTP_SD_TLS_KEY_FILE": self.key,
            "HTTP_SD_TLS_CLIENT_CA_FILE": self.ca,
        }
        environment = {name: str(path) for name, path in given.items() if without.get(name, True)}
        read = read_registrar({"HTTP_SD_PORT": str(port), **environment}).http_sd
        assert read is not None
        return read


@pytest.fixture
def files(tmp_path: Path) -> Files:
    """Write them."""
    return Files(tmp_path)


async def found(settings: HttpSdSettings) -> dict[str, Finding]:
    """Check, and return the findings by name."""
    return {one.name: one for one in await check_http_sd(settings, 2.0)}


async def test_all_is_well(files: Files) -> None:
    """A free port, and files that can be used."""
    findings = await found(files.settings())
    assert {name: one.outcome for name, one in findings.items()} == dict.fromkeys(
        ("http_sd port", "http_sd token", "http_sd tls"), Result.OK
    )
    assert "t0ken" not in str(findings)


async def test_open_port_is_told_and_a_token_in_the_clear_is_warned_of(files: Files) -> None:
    """Neither is a failure, and both are said."""
    open_port = await found(HttpSdSettings(0, "", "", "", ""))
    assert set(open_port) == {"http_sd port"}
    assert "anyone who reaches it" in open_port["http_sd port"].detail
    in_the_clear = await found(HttpSdSettings(0, str(files.token), "", "", ""))
    assert in_the_clear["http_sd token"].outcome is Result.WARN
    assert "HTTP_SD_TLS_CERT_FILE" in in_the_clear["http_sd token"].hint


def _other_key(files: Files) -> None:
    files.authority.issue_cert("else").private_key_pem.write_to_path(str(files.key))


@pytest.mark.parametrize(
    ("spoil", "name", "setting"),
    [
        (lambda files: files.token.unlink(), "http_sd token", "HTTP_SD_BEARER_TOKEN_FILE"),
        (lambda files: files.token.write_text("\n \n"), "http_sd token", "HTTP_SD_BEARER_TOKEN_FILE"),
        (lambda files: files.cert.unlink(), "http_sd tls", "HTTP_SD_TLS_CERT_FILE"),
        (_other_key, "http_sd tls", "HTTP_SD_TLS_KEY_FILE"),
        (lambda files: files.ca.write_text("no authority"), "http_sd tls", "HTTP_SD_TLS_CLIENT_CA_FILE"),
    ],
    ids=["token missing", "token empty", "certificate missing", "key of another", "authority unreadable"],
)
async def test_each_file_that_cannot_be_used_is_named_by_its_setting(
    files: Files, spoil: Callable[[Files], None], name: str, setting: str
) -> None:
    """Detail and hint name the setting, and nothing else fails."""
    spoil(files)
    findings = await found(files.settings())
    assert {one.name for one in findings.values() if one.outcome is Result.FAIL} == {name}
    assert setting in findings[name].detail
    assert setting in findings[name].hint


async def test_port_of_another_process_fails(files: Files) -> None:
    """The hint names HTTP_SD_PORT, whether the other speaks HTTP or not."""
    settings = HttpSdSettings(0, str(files.token), "", "", "")
    (port,) = reserve_ports(1)
    with socket.create_server(("", port)):
        taken = (await found(HttpSdSettings(port, settings.bearer_token_file, "", "", "")))["http_sd port"]
    assert taken.outcome is Result.FAIL
    assert "HTTP_SD_PORT" in taken.hint


@pytest.mark.parametrize("is_tls", [False, True])
async def test_beside_a_running_registrar_the_port_is_its_own(files: Files, is_tls: bool) -> None:
    """In the registrar's Pod the port is taken by the registrar, which is as it should be."""
    tls = server_tls(files.cert, files.key, setting="HTTP_SD_TLS") if is_tls else None
    bearer = bearer_tokens(files.token, "TOKEN")
    async with HttpSdServer(port=0, view=Registrar(), bearer=bearer, tls=tls) as server:
        pair = (str(files.cert), str(files.key)) if is_tls else ("", "")
        findings = await found(HttpSdSettings(server.port, str(files.token), *pair, ""))
    assert findings["http_sd port"].outcome is Result.OK
    assert "registrar answers" in findings["http_sd port"].detail


async def test_port_that_wants_a_client_certificate_is_a_warning(files: Files) -> None:
    """It is warned of: we have no client's certificate to ask with."""
    tls = server_tls(files.cert, files.key, files.ca, setting="HTTP_SD_TLS")
    async with HttpSdServer(port=0, view=Registrar(), tls=tls) as server:
        assert tls.value.context.verify_mode is ssl.CERT_REQUIRED
        findings = await found(files.settings(server.port))
    assert findings["http_sd port"].outcome is Result.WARN


def names(folder: Path) -> set[str]:
    """Return what is in a folder."""
    return {one.name for one in folder.iterdir()}


@pytest.mark.parametrize(
    ("name", "content", "outcome", "text"),
    [
        ("state.json", None, Result.OK, "no targets are saved yet"),
        ("state.json", b"garbage", Result.OK, "does not hold saved targets, and it will be replaced"),
        (
            "state.json",
            encoded([pod_target("a")], at=time.time(), origin=Origin("lab", "", "abc")),
            Result.OK,
            "1 targets are saved",
        ),
        ("missing/state.json", None, Result.FAIL, "cannot write in"),
        ("folder", None, Result.FAIL, "Is a directory"),
    ],
)
async def test_file_of_saved_targets_is_looked_at(
    name: str, content: bytes | None, outcome: Result, text: str, tmp_path: Path
) -> None:
    """The folder must be one to write in; what is there already need not be good, unless it is no file."""
    path = tmp_path / name
    (tmp_path / "folder").mkdir()
    if content is not None:
        path.write_bytes(content)
    before = names(tmp_path)
    (finding,) = await check_state_file(path, Origin("lab", "", "abc"))
    assert (finding.name, finding.outcome) == ("http_sd state", outcome)
    assert text in finding.detail
    assert names(tmp_path) == before


async def test_folder_of_the_targets_file_is_checked(tmp_path: Path) -> None:
    """A folder that is there will do, a missing one and a directory in the file's place will not; nothing is left."""
    (found,) = await check_file_sd(tmp_path / "targets.json")
    assert found.outcome == Result.OK
    (missing,) = await check_file_sd(tmp_path / "nowhere" / "targets.json")
    (taken,) = await check_file_sd(tmp_path)
    assert {missing.outcome, taken.outcome} == {Result.FAIL}
    assert "volume" in missing.hint
    await asyncio.to_thread(tmp_path.rmdir)
