"""Who the proxy is to kubelets: token or certificate, of a file or of the kubeconfig, as they are replaced."""

import asyncio
import contextlib
import ssl
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import trustme
from structlog.testing import capture_logs

from k8s_consul_registrar.errors import AccessError
from k8s_consul_registrar.kube.access import Access, load_access
from k8s_consul_registrar.sandbox.certificates import Authority
from k8s_consul_registrar.settings.proxy import KubeletSettings
from k8s_consul_registrar.tls import POD, client_tls
from k8s_consul_registrar.wiring.proxy import KubeletIdentity
from support.cluster import kubeconfig
from support.proxy_lab import Kubelet, answer, authority, authority_pem, cadvisor, proxying
from support.waiting import until

PLAIN = KubeletSettings("", skip_verify=False, tls_server_name="ip", client_cert_file="", client_key_file="")


class Pair:
    """A client's certificate and key in files."""

    def __init__(self, folder: Path) -> None:
        self.certificate, self.key = folder / "client.crt", folder / "client.key"
        self.issue()

    def issue(self, name: str = "proxy.example") -> None:
        """Put a new certificate in place."""
        leaf = authority().issue_cert(name)
        self.certificate.write_bytes(b"".join(blob.bytes() for blob in leaf.cert_chain_pems))
        self.key.write_bytes(leaf.private_key_pem.bytes())

    def settings(self, ca: Path) -> KubeletSettings:
        """Return the settings that name them."""
        return replace(
            PLAIN, ca_file=str(ca), client_cert_file=str(self.certificate), client_key_file=str(self.key)
        )


def access_of(folder: Path, user: dict[str, Any]) -> Access:
    """Return the access of a kubeconfig with this user."""
    file = folder / "kubeconfig"
    file.write_text(kubeconfig("127.0.0.1:1", Authority(), user))
    return load_access({"KUBECONFIG": str(file)})


@pytest.fixture
def ca(tmp_path: Path) -> Path:
    """Return the file of the kubelets' authority."""
    file = tmp_path / "kubelets.crt"
    file.write_text(authority_pem())
    return file


class AskingKubelet(Kubelet):
    """A kubelet that wants a certificate and notes whose it was shown."""

    shown: list[str]

    @contextlib.asynccontextmanager
    async def serving(self) -> AsyncIterator["Kubelet"]:
        """Serve until the block ends."""
        self.shown = []
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        authority().issue_cert("127.0.0.1").configure_cert(context)
        authority().configure_trust(context)
        context.verify_mode = ssl.CERT_REQUIRED

        async def converse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            names = writer.get_extra_info("peercert")["subjectAltName"]
            self.shown.append(names[0][1])
            with contextlib.suppress(asyncio.IncompleteReadError, OSError):
                while True:
                    self.requests.append(await reader.readuntil(b"\r\n\r\n"))
                    writer.write(answer())
            writer.close()

        server = await asyncio.start_server(converse, "127.0.0.1", 0, ssl=context)
        self.port = server.sockets[0].getsockname()[1]
        yield self
        server.close()


async def test_certificate_stands_in_place_of_the_token(tmp_path: Path, ca: Path) -> None:
    """The certificate of the files is shown and no token; a replaced one counts for the next scrape."""
    pair = Pair(tmp_path)
    identity = KubeletIdentity(pair.settings(ca), access_of(tmp_path, {"token": "the-kubeconfigs"}))
    await identity.refresh()
    kubelet = AskingKubelet()
    async with (
        kubelet.serving(),
        proxying(kubelet.node(), token=identity.token, contexts=identity.context) as proxy,
    ):
        for _ in range(2):
            assert (await proxy.get(cadvisor(kubelet))).status == 200
        pair.issue("proxy-2.example")
        await identity.refresh()
        assert (await proxy.get(cadvisor(kubelet))).status == 200
        assert kubelet.shown == ["proxy.example", "proxy-2.example"]
        assert not [one for one in kubelet.requests if b"uthorization" in one]


async def test_pair_caught_half_way(tmp_path: Path, ca: Path) -> None:
    """A certificate whose key has not come yet leaves the old pair in use, under load without a failed scrape."""
    pair = Pair(tmp_path)
    identity = KubeletIdentity(pair.settings(ca), access_of(tmp_path, {}))
    kubelet = AskingKubelet()
    async with (
        kubelet.serving(),
        proxying(kubelet.node(), token=identity.token, contexts=identity.context) as proxy,
    ):
        done = 0

        async def load() -> None:
            nonlocal done
            while True:
                assert (await proxy.get(cadvisor(kubelet))).status == 200
                done += 1

        loading = asyncio.create_task(load())
        await until(lambda: done > 3)
        old_key = pair.key.read_bytes()
        pair.issue("proxy-2.example")
        new_key = pair.key.read_bytes()
        pair.key.write_bytes(old_key)
        await identity.refresh()
        await until(lambda: done > 8)
        assert set(kubelet.shown) == {"proxy.example"}
        pair.key.write_bytes(new_key)
        await identity.refresh()
        await until(lambda: "proxy-2.example" in kubelet.shown)
        assert not loading.done()
        loading.cancel()


async def test_kubeconfigs_certificate_where_there_is_no_token(tmp_path: Path, ca: Path) -> None:
    """Without a token the certificate the kubeconfig names is shown; with one it is not."""
    pair = Pair(tmp_path)
    files = {"client-certificate": str(pair.certificate), "client-key": str(pair.key)}
    kubelet = AskingKubelet()
    async with kubelet.serving():
        for user, status in ((files, 200), ({**files, "token": "a-token"}, 502)):
            identity = KubeletIdentity(replace(PLAIN, ca_file=str(ca)), access_of(tmp_path, user))
            await identity.refresh()
            async with proxying(kubelet.node(), token=identity.token, contexts=identity.context) as proxy:
                assert (await proxy.get(cadvisor(kubelet))).status == status
    assert kubelet.shown == ["proxy.example"]


async def test_new_authority_of_kubelets(tmp_path: Path, ca: Path) -> None:
    """A replaced KUBELET_CA_FILE makes a new context, so that the old authority's kubelet is no longer believed."""
    identity = KubeletIdentity(replace(PLAIN, ca_file=str(ca)), access_of(tmp_path, {"token": "t"}))
    await identity.refresh()
    kubelet = Kubelet()
    async with (
        kubelet.serving(),
        proxying(kubelet.node(), token=identity.token, contexts=identity.context) as proxy,
    ):
        assert (await proxy.get(cadvisor(kubelet))).status == 200
        trustme.CA().cert_pem.write_to_path(str(ca))
        await identity.refresh()
        assert (await proxy.get(cadvisor(kubelet))).status == 502


async def test_new_authority_of_the_cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where kubelets are verified by the cluster's CA, a new one counts for them, too."""
    monkeypatch.setattr("k8s_consul_registrar.rotating.LOOK_EVERY", 0.0)
    ca = tmp_path / "ca.crt"
    ca.write_text(authority_pem())
    (tmp_path / "token").write_text("t")
    inside = {"KUBERNETES_SERVICE_HOST": "127.0.0.1", "KUBERNETES_SERVICE_PORT": "1"}
    identity = KubeletIdentity(PLAIN, load_access(inside, service_account=tmp_path))
    await identity.refresh()
    kubelet = Kubelet()
    async with (
        kubelet.serving(),
        proxying(kubelet.node(), token=identity.token, contexts=identity.context) as proxy,
    ):
        assert (await proxy.get(cadvisor(kubelet))).status == 200
        before = identity.context()
        await identity.refresh()
        assert identity.context() is before
        trustme.CA().cert_pem.write_to_path(str(ca))
        await identity.refresh()
        assert (await proxy.get(cadvisor(kubelet))).status == 502


def test_unusable_file_is_named_by_its_setting(tmp_path: Path, ca: Path) -> None:
    """Every file is named by its setting at the start."""
    access = access_of(tmp_path, {})
    pair = Pair(tmp_path)
    with pytest.raises(AccessError, match="KUBELET_CA_FILE"):
        KubeletIdentity(replace(PLAIN, ca_file=str(pair.key)), access)
    with pytest.raises(AccessError, match="KUBELET_CA_FILE"):
        KubeletIdentity(replace(PLAIN, ca_file="/nowhere"), access)
    pair.key.write_text("nothing")
    with pytest.raises(AccessError, match="KUBELET_CLIENT_CERT_FILE"):
        KubeletIdentity(pair.settings(ca), access)
    with pytest.raises(AccessError, match="POD_CA_FILE"):
        client_tls(POD, str(pair.key))


async def test_token_that_cannot_be_had(tmp_path: Path) -> None:
    """Without any credential the scrape fails with that reason; one that was loaded stays; the log says it once."""
    file = tmp_path / "token"
    plugin = {"apiVersion": "client.authentication.k8s.io/v1", "command": str(tmp_path / "plugin")}
    identity = KubeletIdentity(PLAIN, access_of(tmp_path, {"exec": {**plugin, "interactiveMode": "Never"}}))
    with capture_logs() as logs:
        for _ in range(3):
            await identity.refresh()
            with pytest.raises(AccessError, match="there is no program"):
                identity.token()
    assert [line["event"] for line in logs] == ["no fresh credentials for the kubelets"]
    file.write_text("first")
    identity = KubeletIdentity(PLAIN, access_of(tmp_path, {"tokenFile": str(file)}))
    await identity.refresh()
    assert identity.token() == "first"
