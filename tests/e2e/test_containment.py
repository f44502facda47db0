"""Each file we are given, odd in each way: named at the start, outlived while we run."""

import os
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import trustme
from structlog.testing import capture_logs

from k8s_consul_registrar.admin.metrics import new_registry
from k8s_consul_registrar.cli import main
from k8s_consul_registrar.consul.access import ConsulTokenFile
from k8s_consul_registrar.errors import AccessError
from k8s_consul_registrar.kube.access import Access, load_access
from k8s_consul_registrar.settings.proxy import KubeletSettings
from k8s_consul_registrar.settings.reading import read_proxy, read_registrar
from k8s_consul_registrar.tls import POD, client_tls
from k8s_consul_registrar.wiring.consul import consul_access
from k8s_consul_registrar.wiring.http_sd import http_sd_bearer, http_sd_tls
from k8s_consul_registrar.wiring.proxy import Inbound, KubeletIdentity, credentials
from support.daemon import Daemon
from support.lab import running_lab
from support.odd_inputs import ODD, restore
from support.waiting import PATIENCE

BEGINS = "changed files cannot be used; those before stay in use"
ENDS = "changed files are in use"
SECRET = "s3cr3t-t0ken-0123456789"
CA = trustme.CA()
LEAF = CA.issue_cert("127.0.0.1")
UNSET = KubeletSettings("", skip_verify=False, tls_server_name="ip", client_cert_file="", client_key_file="")
Holder = Callable[[], Awaitable[object]]


class Folder:
    """A good file of each kind, and what is made of them."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.good = {
            "ca": CA.cert_pem.bytes(),
            "crt": b"".join(blob.bytes() for blob in LEAF.cert_chain_pems),
            "key": LEAF.private_key_pem.bytes(),
            "token": f"{SECRET}\n".encode(),
        }
        for name, content in self.good.items():
            (path / name).write_bytes(content)
        self.kubeconfig("server: 'http://127.0.0.1:1'", "{}")

    def file(self, name: str) -> str:
        """Return where a file is."""
        return str(self.path / name)

    def kubeconfig(self, cluster: str, user: str) -> None:
        """Write a kubeconfig."""
        self.good["config"] = (
            f"current-context: a\nclusters: [{{name: a, cluster: {{{cluster}}}}}]\n"
            f"users: [{{name: a, user: {user}}}]\ncontexts: [{{name: a, context: {{cluster: a, user: a}}}}]\n"
        ).encode()
        (self.path / "config").write_bytes(self.good["config"])

    def access(self) -> Access:
        """Load the kubeconfig."""
        return load_access({"KUBECONFIG": self.file("config")})

    def registrar(self, **environment: str) -> dict[str, str]:
        """Return the registrar's environment."""
        return {"CLUSTER_NAME": "lab", "KUBECONFIG": self.file("config"), **environment}


def kube_ca(folder: Folder) -> Holder:
    """Hold a kubeconfig's certificate-authority."""
    folder.kubeconfig("server: 'https://127.0.0.1:1', certificate-authority: ca", "{}")
    access = folder.access()

    async def held() -> object:
        return access.trust

    return held


def kube_token(folder: Folder) -> Holder:
    """Hold a kubeconfig's tokenFile."""
    folder.kubeconfig("server: 'http://127.0.0.1:1'", "{tokenFile: token}")
    return folder.access().token


def kube_certificate(folder: Folder) -> Holder:
    """Hold a kubeconfig's client-certificate."""
    folder.kubeconfig("server: 'https://127.0.0.1:1'", "{client-certificate: crt, client-key: key}")
    return folder.access().credentials.identity


def consul(folder: Folder) -> Holder:
    """Hold the files of Consul's TLS."""
    settings = read_registrar(
        folder.registrar(
            CONSUL_ADDRESS="https://127.0.0.1:1",
            CONSUL_CACERT=folder.file("ca"),
            CONSUL_CLIENT_CERT=folder.file("crt"),
            CONSUL_CLIENT_KEY=folder.file("key"),
        )
    )
    tls = consul_access(settings.consul).tls
    assert tls is not None

    async def held() -> object:
        return tls.current()

    return held


def consul_token(folder: Folder) -> Holder:
    """Hold CONSUL_HTTP_TOKEN_FILE."""
    settings = read_registrar(folder.registrar(CONSUL_HTTP_TOKEN_FILE=folder.file("token")))
    token = ConsulTokenFile(consul_access(settings.consul).token_file)

    async def held() -> object:
        return token.current()

    return held


def http_sd(folder: Folder) -> Holder:
    """Hold the files of HTTP_SD_PORT."""
    settings = read_registrar(
        folder.registrar(
            HTTP_SD_PORT="1",
            HTTP_SD_TLS_CERT_FILE=folder.file("crt"),
            HTTP_SD_TLS_KEY_FILE=folder.file("key"),
            HTTP_SD_TLS_CLIENT_CA_FILE=folder.file("ca"),
        )
    ).http_sd
    assert settings is not None
    tls = http_sd_tls(settings)

    async def held() -> object:
        tls.refresh()
        return tls.value

    return held


def http_sd_token(folder: Folder) -> Holder:
    """Hold HTTP_SD_BEARER_TOKEN_FILE."""
    settings = read_registrar(
        folder.registrar(HTTP_SD_PORT="1", HTTP_SD_BEARER_TOKEN_FILE=folder.file("token"))
    ).http_sd
    assert settings is not None
    bearer = http_sd_bearer(settings)

    async def held() -> object:
        assert bearer.current().accepts(f"Bearer {SECRET}".encode())
        return bearer.value

    return held


def workers(folder: Folder) -> Holder:
    """Hold what workers get of the files that clients are checked by."""
    kubelets = KubeletIdentity(UNSET, folder.access())
    inbound = Inbound.of(
        read_proxy(
            {
                "TLS_CERT_FILE": folder.file("crt"),
                "TLS_KEY_FILE": folder.file("key"),
                "TLS_CLIENT_CA_FILE": folder.file("ca"),
                "PROXY_BEARER_TOKEN_FILE": folder.file("token"),
            }
        ).inbound
    )

    async def held() -> object:
        return credentials(kubelets, None, inbound)

    return held


def kubelets(folder: Folder) -> Holder:
    """Hold the files of TLS towards kubelets."""
    settings = KubeletSettings(
        folder.file("ca"),
        skip_verify=False,
        tls_server_name="ip",
        client_cert_file=folder.file("crt"),
        client_key_file=folder.file("key"),
    )
    identity = KubeletIdentity(settings, folder.access())

    async def held() -> object:
        await identity.refresh()
        return identity.context()

    return held


def pods(folder: Folder) -> Holder:
    """Hold POD_CA_FILE."""
    settings = read_proxy(
        {"PROXY_PODS": "true", "PROXY_PODS_ANONYMOUS": "true", "POD_CA_FILE": folder.file("ca")}
    ).pods
    assert settings is not None
    trust = client_tls(POD, settings.ca_file)

    async def held() -> object:
        return trust.current()

    return held


class Use(NamedTuple):
    """A case: the file that turns odd and its content, the words that name its setting, and its name in the metric."""

    make: Callable[[Folder], Holder]
    name: str
    setting: str
    of: str


USES = [
    Use(kube_ca, "ca", "cluster 'a': certificate-authority", "kubeconfig certificate-authority"),
    Use(kube_token, "token", "user 'a': tokenFile", "kubeconfig tokenFile"),
    Use(kube_certificate, "crt", "user 'a': client-certificate", "kubeconfig client-certificate"),
    Use(kube_certificate, "key", "user 'a': client-", "kubeconfig client-certificate"),
    Use(consul, "ca", "CONSUL_CACERT", "CONSUL_CACERT"),
    Use(consul, "crt", "CONSUL_CLIENT_CERT", "CONSUL_CLIENT_CERT"),
    Use(consul, "key", "CONSUL_CLIENT_KEY", "CONSUL_CLIENT_CERT"),
    Use(consul_token, "token", "CONSUL_HTTP_TOKEN_FILE", "CONSUL_HTTP_TOKEN_FILE"),
    Use(http_sd, "crt", "HTTP_SD_TLS_CERT_FILE", "HTTP_SD_TLS_CERT_FILE"),
    Use(http_sd, "key", "HTTP_SD_TLS_KEY_FILE", "HTTP_SD_TLS_CERT_FILE"),
    Use(http_sd, "ca", "HTTP_SD_TLS_CLIENT_CA_FILE", "HTTP_SD_TLS_CLIENT_CA_FILE"),
    Use(http_sd_token, "token", "HTTP_SD_BEARER_TOKEN_FILE", "HTTP_SD_BEARER_TOKEN_FILE"),
    Use(workers, "crt", "TLS_CERT_FILE", "TLS_CERT_FILE"),
    Use(workers, "key", "TLS_KEY_FILE", "TLS_CERT_FILE"),
    Use(workers, "ca", "TLS_CLIENT_CA_FILE", "TLS_CLIENT_CA_FILE"),
    Use(workers, "token", "PROXY_BEARER_TOKEN_FILE", "PROXY_BEARER_TOKEN_FILE"),
    Use(kubelets, "ca", "KUBELET_CA_FILE", "KUBELET_CA_FILE"),
    Use(kubelets, "crt", "KUBELET_CLIENT_CERT_FILE", "KUBELET_CLIENT_CERT_FILE"),
    Use(kubelets, "key", "KUBELET_CLIENT_KEY_FILE", "KUBELET_CLIENT_CERT_FILE"),
    Use(pods, "ca", "POD_CA_FILE", "POD_CA_FILE"),
]
IDS = [f"{use.make.__name__}-{use.name}" for use in USES]
# The first half of a token is a token, unless the whole is known.
HALF_IS_GOOD = ("token", "half-written")


@pytest.mark.timeout(2 * PATIENCE)
@pytest.mark.parametrize("use", USES, ids=IDS)
def test_odd_file_is_named_at_the_start(tmp_path: Path, use: Use) -> None:
    """By its setting and its path, without a traceback, a hang, or a word of what it holds."""
    folder = Folder(tmp_path)
    file = tmp_path / use.name
    for odd, put in ODD.items():
        put(file)
        if (use.name, odd) != HALF_IS_GOOD:
            with pytest.raises(AccessError) as caught:
                use.make(folder)
            said = str(caught.value)
            assert use.setting in said, odd
            assert "\n" not in said
            assert SECRET[:12] not in said
        restore(file, folder.good[use.name])
    use.make(folder)


@pytest.mark.timeout(2 * PATIENCE)
@pytest.mark.parametrize("use", USES, ids=IDS)
async def test_odd_file_is_outlived_while_we_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, use: Use
) -> None:
    """The last good value stays, one line tells that it is so, another that it is over, and a metric shows it."""
    monkeypatch.setattr("k8s_consul_registrar.rotating.LOOK_EVERY", 0.0)
    monkeypatch.setattr("k8s_consul_registrar.rotating.RETRY_EVERY", 0.0)
    folder = Folder(tmp_path)
    file = tmp_path / use.name
    held = use.make(folder)
    first = await held()
    for odd, put in ODD.items():
        with capture_logs() as logs:
            put(file)
            for _ in range(3):
                assert await held() == first, odd
            assert _gauge(use.of) == 0, odd
            restore(file, folder.good[use.name])
            await held()
        assert [(line["event"], line["of"]) for line in logs] == [(BEGINS, use.of), (ENDS, use.of)], odd
        assert use.setting in logs[0]["problem"], odd
        assert SECRET[:12] not in str(logs)
        first = await held()


def refuse(monkeypatch: pytest.MonkeyPatch, file: Path) -> None:
    """Have the system refuse to open a file; as root a mode would not."""
    system = os.open

    def open_(path: Path, flags: int) -> int:
        if path == file:
            raise PermissionError(13, "Permission denied")
        return system(path, flags)

    monkeypatch.setattr(os, "open", open_)


@pytest.mark.parametrize("use", USES, ids=IDS)
async def test_file_that_is_unreadable_for_a_moment_is_read_as_soon_as_it_can_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, use: Use
) -> None:
    """Its new content counts, though the file looks the same as when it could not be read."""
    monkeypatch.setattr("k8s_consul_registrar.rotating.LOOK_EVERY", 0.0)
    monkeypatch.setattr("k8s_consul_registrar.rotating.RETRY_EVERY", 0.0)
    folder = Folder(tmp_path)
    file = tmp_path / use.name
    with monkeypatch.context() as refused:
        refuse(refused, file)
        with pytest.raises(AccessError, match=f"{use.setting}.*cannot read .*Permission denied"):
            use.make(folder)
    held = use.make(folder)
    first = await held()
    restore(file, folder.good[use.name] + b"\n")
    with capture_logs() as logs:
        with monkeypatch.context() as refused:
            refuse(refused, file)
            for _ in range(3):
                assert await held() == first
            assert _gauge(use.of) == 0
        await held()
        assert _gauge(use.of) == 1
    assert [(line["event"], line["of"]) for line in logs] == [(BEGINS, use.of), (ENDS, use.of)]


def _gauge(of: str) -> float | None:
    return new_registry("proxy").get_sample_value("k8s_consul_registrar_rotating_file_ok", {"of": of})


@pytest.mark.timeout(2 * PATIENCE)
@pytest.mark.parametrize("odd", [odd for odd in ODD if odd not in ("half-written", "absent")])
def test_odd_kubeconfig_is_named_at_the_start(tmp_path: Path, odd: str) -> None:
    """It is read once."""
    folder = Folder(tmp_path)
    ODD[odd](tmp_path / "config")
    with pytest.raises(AccessError, match=r"^kubeconfig") as caught:
        folder.access()
    assert str(tmp_path / "config") in str(caught.value)


class Start(NamedTuple):
    """A mode, the file that is odd and how, the settings that name files, and the one at fault."""

    mode: str
    name: str
    odd: str
    files: dict[str, str]
    setting: str
    fixed: dict[str, str]


REGISTRAR, PROXY = {"CLUSTER_NAME": "lab"}, {"PORT": "0"}
HTTPS = {**REGISTRAR, "CONSUL_ADDRESS": "https://127.0.0.1:1"}
PAIR = {"TLS_CERT_FILE": "crt", "TLS_KEY_FILE": "key"}
STARTS = [
    Start("registrar", "config", "endless", {}, "kubeconfig ", REGISTRAR),
    Start("registrar", "ca", "a directory", {"CONSUL_CACERT": "ca"}, "CONSUL_CACERT", HTTPS),
    Start(
        "registrar",
        "token",
        "empty",
        {"CONSUL_HTTP_TOKEN_FILE": "token"},
        "CONSUL_HTTP_TOKEN_FILE",
        REGISTRAR,
    ),
    Start("proxy", "token", "a pipe", {"PROXY_BEARER_TOKEN_FILE": "token"}, "PROXY_BEARER_TOKEN_FILE", PROXY),
    Start("proxy", "ca", "binary", {**PAIR, "TLS_CLIENT_CA_FILE": "ca"}, "TLS_CLIENT_CA_FILE", PROXY),
    Start("proxy", "key", "huge", PAIR, "TLS_KEY_FILE", PROXY),
]


@pytest.mark.parametrize("start", STARTS, ids=[f"{one.setting.strip()}-{one.odd}" for one in STARTS])
async def test_command_ends_with_one_line_that_names_the_file(tmp_path: Path, start: Start) -> None:
    """Exit 2."""
    folder = Folder(tmp_path)
    ODD[start.odd](tmp_path / start.name)
    files = {"KUBECONFIG": "config", **start.files}
    settings = {**start.fixed, **{setting: folder.file(name) for setting, name in files.items()}}
    async with Daemon([start.mode], settings, tmp_path, secrets=[SECRET]) as daemon:
        assert await daemon.ended() == 2
        (line,) = [line for line in daemon.output.splitlines() if line.startswith("  - ")]
        assert start.setting in line
        assert folder.file(start.name) in line


KINDS = [
    ("registrar", "ca", "CONSUL_CACERT", HTTPS),
    ("registrar", "token", "CONSUL_HTTP_TOKEN_FILE", REGISTRAR),
    ("registrar", "crt", "CONSUL_CLIENT_CERT", HTTPS),
    ("registrar", "key", "CONSUL_CLIENT_KEY", HTTPS),
    ("proxy", "token", "PROXY_BEARER_TOKEN_FILE", PROXY),
    ("proxy", "crt", "TLS_CERT_FILE", PROXY),
    ("proxy", "ca", "TLS_CLIENT_CA_FILE", PROXY),
    ("proxy", "crt", "KUBELET_CLIENT_CERT_FILE", PROXY),
]
TOGETHER = {
    "CONSUL_CLIENT_CERT": {"CONSUL_CLIENT_KEY": "key"},
    "CONSUL_CLIENT_KEY": {"CONSUL_CLIENT_CERT": "crt"},
    "TLS_CERT_FILE": {"TLS_KEY_FILE": "key"},
    "TLS_CLIENT_CA_FILE": PAIR,
    "KUBELET_CLIENT_CERT_FILE": {"KUBELET_CLIENT_KEY_FILE": "key"},
}


@pytest.mark.timeout(2 * PATIENCE)
@pytest.mark.parametrize("kind", KINDS, ids=[setting for _, _, setting, _ in KINDS])
def test_odd_file_of_every_kind_is_exit_2_and_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: tuple[str, str, str, dict[str, str]]
) -> None:
    """The line names the setting and the file, and quotes nothing of it."""
    mode, name, setting, fixed = kind
    folder = Folder(tmp_path)
    files = {"KUBECONFIG": "config", setting: name, **TOGETHER.get(setting, {})}
    environment = {**fixed, "ADMIN_PORT": "0", **{one: folder.file(file) for one, file in files.items()}}
    secret = folder.good["key"].splitlines()[1].decode()
    for odd, put in ODD.items():
        put(tmp_path / name)
        if (name, odd) != HALF_IS_GOOD:
            assert main([mode], environment) == 2, odd
            (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("  - ")]
            assert setting in line, odd
            assert folder.file(name) in line, odd
            assert SECRET[:12] not in line, odd
            assert secret not in line, odd
        restore(tmp_path / name, folder.good[name])


async def test_cluster_s_ca_that_is_garbage_is_outlived_by_the_daemon() -> None:
    """With a byte that is not ASCII in its block, it was a traceback and the end."""
    async with running_lab() as lab:
        await lab.cluster.add_pod()
        ca = lab.folder / "ca.crt"
        good = lab.cluster.endpoint.authority.pem
        ca.write_bytes(good)
        text = lab.kubeconfig.read_text()
        (data,) = [line for line in text.splitlines() if "certificate-authority-data" in line]
        lab.kubeconfig.write_text(text.replace(data, f"    certificate-authority: {ca}"))
        async with await lab.registrar() as daemon:
            await daemon.until(lambda: lab.has("pod--shop--web-1"))
            ca.write_bytes(good[:200] + b"\xc3" + good[201:])
            lab.api_door.cut()

            async def is_noticed() -> bool:
                lab.api_door.cut()
                return await daemon.metric('rotating_file_ok{of="kubeconfig certificate-authority"}') == 0

            await daemon.until(is_noticed)
            (line,) = daemon.said(BEGINS)
            assert "holds a damaged certificate" in line["problem"]
            await lab.cluster.add_pod("web-2")
            await daemon.until(lambda: lab.has("pod--shop--web-1", "pod--shop--web-2"))
            ca.write_bytes(good)

            async def is_over() -> bool:
                lab.api_door.cut()
                return bool(daemon.said(ENDS))

            await daemon.until(is_over)
            assert await daemon.metric('rotating_file_ok{of="kubeconfig certificate-authority"}') == 1
            assert len(daemon.said(BEGINS)) == 1
