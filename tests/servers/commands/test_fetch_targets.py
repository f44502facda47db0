"""fetch-targets against registrars that serve, and servers that hang, lie or are others."""

import argparse
import asyncio
import gzip
import json
import os
import stat
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import trustme
from aiohttp import web
from aiohttp.test_utils import TestServer

from k8s_consul_registrar.admin.http_sd import SD_PATH, HttpSdServer
from k8s_consul_registrar.admin.view import Owner
from k8s_consul_registrar.commands import COMMANDS
from k8s_consul_registrar.commands.fetch_targets import follower
from k8s_consul_registrar.commands.fetch_targets.arguments import read_arguments, target_sources
from k8s_consul_registrar.commands.fetch_targets.follower import Follower
from k8s_consul_registrar.errors import AccessError, OperationalError, SettingsError
from k8s_consul_registrar.rotating import bearer_tokens
from k8s_consul_registrar.tls import server_tls
from support.odd_inputs import full_disk
from support.seen import Registrar, pod_target
from support.waiting import PATIENCE, until

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
OURS = {"X-Registrar-Cluster": "lab", "ETag": 'W/"1"'}


def parsed(urls: list[str], output: Path, *options: str) -> argparse.Namespace:
    """Return the arguments as the command line gives them."""
    (command,) = [one for one in COMMANDS if one.name == "fetch-targets"]
    parser = argparse.ArgumentParser()
    for argument in command.arguments:
        argument.add_to(parser)
    return parser.parse_args([*urls, "--output", str(output), *options])


def follower_of(url: str, path: Path, *options: str, wait: float = 20) -> Follower:
    """Return what follows one URL into a file."""
    ((source, tls, token),) = read_arguments(parsed([url], path, *options))
    return Follower(source, tls, token, wait=wait)


@asynccontextmanager
async def following(*followers: Follower) -> AsyncIterator[None]:
    """Let them run."""
    async with aiohttp.ClientSession() as session:
        tasks = [asyncio.create_task(one.run(session)) for one in followers]
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)


async def once(one: Follower) -> str:
    """Fetch once and return the problem."""
    async with aiohttp.ClientSession() as session:
        return await one.fetch_once(session)


@asynccontextmanager
async def answering(handler: Handler) -> AsyncIterator[str]:
    """Serve an answer of the test's own at the path of targets, and return its URL."""
    app = web.Application()
    app.router.add_get(SD_PATH, handler)
    async with TestServer(app) as server:
        yield f"http://127.0.0.1:{server.port}"


def files_in(folder: Path) -> set[str]:
    """Return the names of what is in a folder."""
    return {one.name for one in folder.iterdir()}


def pods_in(path: Path) -> set[str]:
    """Return the Pods of a file; none while there is no file."""
    if not path.exists():
        return set()
    return {group["labels"]["__meta_consul_service_metadata_pod"] for group in json.loads(path.read_bytes())}


async def test_files_follow_their_registrars_and_outlive_them(tmp_path: Path) -> None:
    """One file for each; a change arrives by the poll that waits for it; the last state stays when all are gone."""
    east, west = Registrar(owner=Owner("east")), Registrar(owner=Owner("west"))
    east.put(pod_target("a"))
    west.put(pod_target("b"))
    async with HttpSdServer(port=0, view=east) as first, HttpSdServer(port=0, view=west) as second:
        urls = [
            f"east=http://127.0.0.1:{first.port}",
            f"west=http://127.0.0.1:{second.port}/sd/targets?kind=pod",
        ]
        followers = [
            Follower(source, tls, token, wait=20)
            for source, tls, token in read_arguments(parsed(urls, tmp_path))
        ]
        async with following(*followers):
            files = tmp_path / "east.json", tmp_path / "west.json"
            await until(lambda: [pods_in(one) for one in files] == [{"a"}, {"b"}])
            assert stat.S_IMODE(files[0].stat().st_mode) == 0o644
            await until(lambda: len(first.polls) == 1)
            before = files[1].stat().st_ino
            east.put(pod_target("c"))
            await until(lambda: pods_in(files[0]) == {"a", "c"})
            assert files[1].stat().st_ino == before
            await first.__aexit__()
            await until(lambda: bool(followers[0].problem))
            assert pods_in(files[0]) == {"a", "c"}
            assert not followers[1].problem


async def test_file_that_was_deleted_is_written_again(tmp_path: Path) -> None:
    """By the next poll: an operator who deletes it need not restart anything."""
    registrar, path = Registrar(), tmp_path / "lab.json"
    registrar.put(pod_target("a"))
    async with HttpSdServer(port=0, view=registrar) as server:
        url = f"http://127.0.0.1:{server.port}"
        async with following(follower_of(url, path, wait=0.1)):
            await until(lambda: pods_in(path) == {"a"})
            path.unlink()
            await until(lambda: pods_in(path) == {"a"})


@pytest.mark.parametrize(
    ("now", "words"),
    [
        (Owner("other", "", "uid-1"), "are of the cluster other, and the file's of lab"),
        (Owner("lab", "blue", "uid-1"), "of the instance 'blue'"),
        (Owner("lab", "", "uid-2"), "with another UID"),
    ],
)
async def test_another_clusters_targets_are_refused(tmp_path: Path, now: Owner, words: str) -> None:
    """A URL that leads elsewhere changes nothing, also for a new process, until the file is deleted."""
    registrar, path = Registrar(), tmp_path / "targets.json"
    registrar.put(pod_target("a"))
    async with HttpSdServer(port=0, view=registrar) as server:
        url = f"http://127.0.0.1:{server.port}"
        assert await once(follower_of(url, path)) == ""
        content = path.read_bytes()
        registrar.owner = now
        registrar.put(pod_target("b"))
        problem = await once(follower_of(url, path))
        assert words in problem
        assert f"Delete {path} if that is right" in problem
        assert path.read_bytes() == content
        path.unlink()
        assert await once(follower_of(url, path)) == ""
        assert pods_in(path) == {"a", "b"}


@pytest.mark.parametrize("record", [None, b"garbage", b"[]"])
async def test_without_its_record_a_file_tells_by_its_labels_whose_it_is(
    tmp_path: Path, record: bytes | None
) -> None:
    """A file that was copied, or whose record is broken, is no less protected."""
    registrar, path = Registrar(), tmp_path / "targets.json"
    registrar.put(pod_target("a"))
    async with HttpSdServer(port=0, view=registrar) as server:
        url = f"http://127.0.0.1:{server.port}"
        assert await once(follower_of(url, path)) == ""
        record_of = tmp_path / ".targets.json.origin"
        record_of.unlink()
        if record is not None:
            record_of.write_bytes(record)
        registrar.owner = Owner("other")
        assert "of the cluster other" in await once(follower_of(url, path))
        registrar.owner = Owner("lab")
        assert await once(follower_of(url, path)) == ""


async def _gigabyte(request: web.Request) -> web.StreamResponse:
    response = web.StreamResponse(headers={**OURS, "Content-Type": "application/json"})
    await response.prepare(request)
    with suppress(ConnectionError):
        for _ in range(1024):
            await response.write(b" " * (1 << 20))
    return response


async def _bomb(_: web.Request) -> web.StreamResponse:
    body = gzip.compress(b" " * (64 << 20), 1)
    return web.Response(
        body=body, headers={**OURS, "Content-Encoding": "gzip"}, content_type="application/json"
    )


async def _hang(_: web.Request) -> web.StreamResponse:
    await asyncio.sleep(60)
    return web.Response()


async def _stall(request: web.Request) -> web.StreamResponse:
    response = web.StreamResponse(
        headers={**OURS, "Content-Type": "application/json", "Content-Length": "100"}
    )
    await response.prepare(request)
    await response.write(b"[")
    await asyncio.sleep(60)
    return response


async def _cut(request: web.Request) -> web.StreamResponse:
    response = web.StreamResponse(
        headers={**OURS, "Content-Type": "application/json", "Content-Length": "100"}
    )
    await response.prepare(request)
    await response.write(b'[{"targets":["a:1"]')
    assert request.transport is not None
    request.transport.close()
    return response


def answer(body: bytes, status: int = 200, **headers: Any) -> Handler:
    """Return a handler with one answer; a header's `-` is written `_`."""

    async def handle(_: web.Request) -> web.StreamResponse:
        given = {name.replace("_", "-"): value for name, value in headers.items()}
        return web.Response(body=body, status=status, headers={"Content-Type": "application/json", **given})

    return handle


LAB: dict[str, Any] = {"X_Registrar_Cluster": "lab"}


@pytest.mark.parametrize(
    ("handler", "words"),
    [
        pytest.param(_gigabyte, "longer than", id="gigabyte"),
        pytest.param(_bomb, "longer than", id="bomb"),
        pytest.param(_hang, "not answer in time", id="hangs"),
        pytest.param(_stall, "not answer in time", id="stalls"),
        pytest.param(_cut, "broke off", id="cut"),
        pytest.param(answer(b"[]\n"), "no registrar", id="empty from another"),
        pytest.param(answer(b"[]\n", X_Registrar_Cluster=""), "no registrar", id="without a name"),
        pytest.param(answer(b"<html>", Content_Type="text/html", **LAB), "no JSON", id="page"),
        pytest.param(answer(b"garbage", **LAB), "no target", id="garbage"),
        pytest.param(answer(b"{}", **LAB), "no target", id="object"),
        pytest.param(answer(b'[{"targets":"a","labels":{}}]', **LAB), "no target", id="wrong type"),
        pytest.param(answer(b'[{"targets":["a"],"labels":{}}', **LAB), "no target", id="half"),
        pytest.param(answer(b"[" * 100_000, **LAB), "no target", id="deep"),
        pytest.param(answer(b"xx", Content_Encoding="gzip", **LAB), "broke off", id="no gzip"),
        pytest.param(answer(b"", 302, Location="http://192.0.2.1/"), "redirects", id="redirect"),
        pytest.param(answer(b"", 304), "answers 304", id="not asked for"),
        pytest.param(answer(b"", 401), "--bearer-token-file", id="unauthorized"),
        pytest.param(answer(b"", 404), "/sd/targets", id="wrong path"),
        pytest.param(answer(b"pods are not\nlisted \x1b[2J" + b"x" * 10_000, 503), "answers 503: pods are not listed ?", id="not ready"),
    ],
)  # fmt: skip
async def test_answer_that_is_no_registrars_document_leaves_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, handler: Handler, words: str
) -> None:
    """Each is named, in few and printable words, and the last good state stays."""
    monkeypatch.setattr(follower, "HEAD", 0.5 if "in time" in words else PATIENCE)
    monkeypatch.setattr(follower, "SIZE_LIMIT", 8 << 20)
    path = tmp_path / "targets.json"
    path.write_bytes(b'[{"targets":["192.0.2.1:80"],"labels":{}}]')
    before = path.stat()
    async with answering(handler) as url:
        problem = await once(follower_of(url, path))
    assert words in problem
    assert problem.isprintable()
    assert len(problem) < 400
    assert (path.stat().st_ino, path.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


async def test_failures_are_tried_again_with_growing_pauses_and_said_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A server that is down is not hammered, and is followed again as soon as it answers."""
    monkeypatch.setattr(follower, "RETRY_FIRST", 0.02)
    monkeypatch.setattr(follower, "RETRY_CAP", 0.2)
    asked: list[int] = []

    async def handle(request: web.Request) -> web.StreamResponse:
        asked.append(1)
        return await (answer(b"[]\n", **LAB) if len(asked) > 5 else answer(b"down", 503))(request)

    path = tmp_path / "targets.json"
    async with answering(handle) as url:
        one = follower_of(url, path)
        async with following(one):
            await until(path.exists)
            await until(lambda: not one.problem)
    said = capsys.readouterr().out
    assert said.count("targets cannot be fetched") == 1
    assert said.count("targets are fetched again") == 1


async def test_stale_targets_never_replace_a_file(tmp_path: Path) -> None:
    """Targets that a restarted registrar saved are older than those fetched since; without a file they are better than none."""
    path = tmp_path / "targets.json"
    async with answering(answer(b"[]\n", X_Stale_Since="2026-01-01T00:00:00Z", **LAB)) as url:
        assert await once(follower_of(url, path)) == ""
        assert path.read_bytes() == b"[]\n"
        path.write_bytes(b'[{"targets":["192.0.2.1:80"],"labels":{}}]')
        assert await once(follower_of(url, path)) == ""
        assert path.read_bytes() != b"[]\n"


async def test_token_and_certificate_are_shown_as_http_sd_wants_them(tmp_path: Path) -> None:
    """With them targets come; without the CA, the certificate or the token the words name the option."""
    authority = trustme.CA()
    ours, theirs = authority.issue_cert("localhost"), authority.issue_cert("prometheus")
    for name, pem in (("tls.crt", ours.cert_chain_pems[0]), ("tls.key", ours.private_key_pem), ("ca.crt", authority.cert_pem),
                      ("me.crt", theirs.cert_chain_pems[0]), ("me.key", theirs.private_key_pem)):  # fmt: skip
        pem.write_to_path(str(tmp_path / name))
    (tmp_path / "token").write_text("t0ken\n")
    tls = server_tls(tmp_path / "tls.crt", tmp_path / "tls.key", tmp_path / "ca.crt", setting="HTTP_SD_TLS")
    registrar, path = Registrar(), tmp_path / "targets.json"
    registrar.put(pod_target("a"))
    ca = ("--ca-file", str(tmp_path / "ca.crt"))
    shown = ("--cert-file", str(tmp_path / "me.crt"), "--key-file", str(tmp_path / "me.key"))
    token = ("--bearer-token-file", str(tmp_path / "token"))
    async with HttpSdServer(
        port=0, view=registrar, tls=tls, bearer=bearer_tokens(tmp_path / "token", "TOKEN")
    ) as server:
        url = f"https://localhost:{server.port}"
        assert "--ca-file must name" in await once(follower_of(url, path, *shown, *token))
        assert "--bearer-token-file" in await once(follower_of(url, path, *ca, *shown))
        without = await once(follower_of(url, path, *ca, *token))
        assert without
        assert not path.exists()
        assert await once(follower_of(url, path, *ca, *shown, *token)) == ""
    assert pods_in(path) == {"a"}


async def test_folder_that_vanishes_is_named_with_its_remedy(tmp_path: Path) -> None:
    """The targets are written as soon as it is back."""
    folder = tmp_path / "targets"
    folder.mkdir()
    registrar, path = Registrar(), folder / "lab.json"
    registrar.put(pod_target("a"))
    async with HttpSdServer(port=0, view=registrar) as server:
        one = follower_of(f"http://127.0.0.1:{server.port}", path)
        folder.rmdir()
        assert f"make {folder}, or mount it again" in await once(one)
        folder.mkdir()
        assert await once(one) == ""
        path.unlink()
        os.mkfifo(path)
        assert "not a regular file" in await once(one)


async def test_file_system_that_is_full_leaves_the_last_file_whole(tmp_path: Path) -> None:
    """Said in words; what was fetched before stays, and nothing is left behind."""
    registrar, path = Registrar(), tmp_path / "lab.json"
    registrar.put(pod_target("a"))
    async with HttpSdServer(port=0, view=registrar) as server:
        one = follower_of(f"http://127.0.0.1:{server.port}", path)
        assert await once(one) == ""
        before, files = path.read_bytes(), files_in(tmp_path)
        registrar.put(*(pod_target(f"web-{number}") for number in range(20)))
        with full_disk(len(before)):
            assert f"cannot write {path}: " in await once(one)
        assert (path.read_bytes(), files_in(tmp_path)) == (before, files)
        assert await once(one) == ""
    assert len(pods_in(path)) == 21


@pytest.mark.parametrize(
    ("urls", "words"),
    [
        (["ftp://a/"], "URL 1 does not begin"),
        (["http://"], "URL 1"),
        (["http://user:secret@a/"], "use --bearer-token-file"),
        (["http://a:1", "http://a:1/other"], "name it, as in"),
        (["a/b=http://a"], "URL 1 does not begin"),
        (["../x=http://a"], "URL 1 does not begin"),
    ],
)
def test_wrong_url_is_named_without_what_may_be_secret(tmp_path: Path, urls: list[str], words: str) -> None:
    """Exit 2 with every mistake."""
    with pytest.raises(SettingsError) as raised:
        target_sources(urls, tmp_path)
    assert words in str(raised.value)
    assert "secret" not in str(raised.value)


def test_output_and_options_that_do_not_fit_are_named(tmp_path: Path) -> None:
    """One file for two URLs, a folder that is missing, too few tokens, a key without its certificate."""
    two = ["a=http://a", "b=http://b"]
    for urls, output, options, words in (
        (two, tmp_path / "x.json", (), "need a folder"),
        (two, tmp_path / "missing", (), "neither a folder"),
        ([*two, "c=http://c"], tmp_path, ("--ca-file", "x", "--ca-file", "y"), "2 times for 3 URLs"),
        (two, tmp_path, ("--key-file", "x"), "--cert-file is missing"),
        (two, tmp_path, ("--wait", "61"), "at most 60"),
        (two, tmp_path, ("--wait", "nan"), "at most 60"),
        (["http://a"], tmp_path / "missing" / "x.json", (), "--output"),
        (["http://a"], tmp_path, ("--bearer-token-file", str(tmp_path / "none")), "--bearer-token-file"),
    ):
        with pytest.raises((SettingsError, AccessError), match=words) as raised:
            read_arguments(parsed(urls, output, *options))
        assert isinstance(raised.value, OperationalError)


def test_url_has_the_path_and_its_file_a_name(tmp_path: Path) -> None:
    """A path and a query that are given stay; without a name the file has the host's."""
    one, other = target_sources(
        ["https://Registrar.example:8443/?kind=pod", "x=http://[::1]:80/sub/sd"], tmp_path
    )
    assert (str(one.url), one.path.name) == (
        "https://registrar.example:8443/sd/targets?kind=pod",
        "registrar.example-8443.json",
    )
    assert (other.url.path, other.path.name) == ("/sub/sd", "x.json")
