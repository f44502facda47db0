"""`kube.access`: kubeconfigs merged and read, service accounts, and every mistake by name."""

import base64
import itertools
import ssl
from pathlib import Path
from typing import Any

import pytest
import trustme
import yaml
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    PrivateFormat,
    load_pem_private_key,
)
from structlog.testing import capture_logs

from k8s_consul_registrar.errors import AccessError
from k8s_consul_registrar.kube.access import Access, load_access
from k8s_consul_registrar.kube.credentials import ClientIdentity, StoredCredentials, rotating_token

SECRET = "s3cr3t-t0ken"
CA = trustme.CA()
OTHER_CA = trustme.CA()
CA_PEM = CA.cert_pem.bytes()
LEAF = CA.issue_cert("client.example")
CERT_PEM = b"".join(blob.bytes() for blob in LEAF.cert_chain_pems)
KEY_PEM = LEAF.private_key_pem.bytes()


def b64(content: bytes) -> str:
    """Return base64 text as a kubeconfig holds it."""
    return base64.b64encode(content).decode()


def config(
    *, cluster: dict[str, Any] | None = None, user: dict[str, Any] | None = None, name: str = "main"
) -> dict[str, Any]:
    """Return a kubeconfig with one context, its parts all called `name`."""
    return {
        "apiVersion": "v1",
        "kind": "Config",
        "current-context": name,
        "preferences": {},
        "clusters": [{"name": name, "cluster": {"server": "https://api.example:6443", **(cluster or {})}}],
        "users": [{"name": name, "user": user if user is not None else {"token": SECRET}}],
        "contexts": [{"name": name, "context": {"cluster": name, "user": name, "namespace": "x"}}],
    }


def write(folder: Path, content: object, name: str = "config") -> Path:
    """Write a kubeconfig and return its path."""
    path = folder / name
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
    return path


def load(*paths: Path, **env: str) -> Access:
    """Load by KUBECONFIG alone."""
    return load_access(
        {"KUBECONFIG": ":".join(str(path) for path in paths), **env}, home=Path("/nonexistent")
    )


def mistake(*paths: Path) -> str:
    """Return the text of the AccessError these files cause; it never holds the secret."""
    with pytest.raises(AccessError) as caught:
        load(*paths)
    assert SECRET not in str(caught.value)
    assert SECRET not in repr(caught.value.__cause__)
    return str(caught.value)


def service_account(folder: Path) -> Path:
    """Write a service account folder as the kubelet mounts it."""
    folder.mkdir()
    (folder / "token").write_text(f"{SECRET}\n")
    (folder / "ca.crt").write_bytes(CA_PEM)
    return folder


def cluster_ca(access: Access) -> str:
    """Return the CAs (PEM) that the API server's certificate must come from, empty for none of its own."""
    assert access.trust is not None
    return access.trust.ca


async def headers(access: Access) -> dict[str, str]:
    """Return what a request sends now."""
    return dict((await access.credentials.identity()).headers())


IN_CLUSTER = {"KUBERNETES_SERVICE_HOST": "10.96.0.1", "KUBERNETES_SERVICE_PORT": "443"}


async def test_in_a_cluster_the_service_account_is_used(tmp_path: Path) -> None:
    """Host and port come from the environment, token and CA from the mounted folder."""
    access = load_access(IN_CLUSTER, home=tmp_path, service_account=service_account(tmp_path / "sa"))
    assert access.server == "https://10.96.0.1:443"
    assert await access.token() == SECRET
    assert await headers(access) == {"Authorization": f"Bearer {SECRET}"}
    assert cluster_ca(access) == CA_PEM.decode()
    context = access.ssl_context(ClientIdentity())
    assert context is not None
    assert context.verify_mode is ssl.CERT_REQUIRED
    assert context.check_hostname
    assert context.minimum_version is ssl.TLSVersion.TLSv1_2


@pytest.fixture
def looks_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have files looked at whenever what they hold is asked for."""
    monkeypatch.setattr("k8s_consul_registrar.rotating.LOOK_EVERY", 0.0)


@pytest.mark.usefixtures("looks_at_once")
def test_new_ca_of_the_cluster_is_followed(tmp_path: Path) -> None:
    """A replaced `ca.crt` makes another context; one that is empty for a moment changes nothing."""
    folder = service_account(tmp_path / "sa")
    access = load_access(IN_CLUSTER, home=tmp_path, service_account=folder)
    first = access.ssl_context(ClientIdentity())
    assert access.ssl_context(ClientIdentity()) is first
    (folder / "ca.crt").write_bytes(b"")
    assert access.ssl_context(ClientIdentity()) is first
    (folder / "ca.crt").write_bytes(OTHER_CA.cert_pem.bytes())
    second = access.ssl_context(ClientIdentity())
    assert second is not None
    assert second is not first
    assert cluster_ca(access) == OTHER_CA.cert_pem.bytes().decode()
    (trusted,) = second.get_ca_certs(binary_form=True)
    assert ssl.DER_cert_to_PEM_cert(trusted).split() == OTHER_CA.cert_pem.bytes().decode().split()


@pytest.mark.usefixtures("looks_at_once")
async def test_new_token_is_logged_as_the_token_only(tmp_path: Path) -> None:
    """The kubelet replaces the whole folder; `ca.crt` is another file then, and the same authority."""

    def mount(token: str) -> None:
        (tmp_path / token).mkdir()
        (tmp_path / token / "token").write_text(token)
        (tmp_path / token / "ca.crt").write_bytes(CA_PEM)
        (tmp_path / "..new").symlink_to(token)
        (tmp_path / "..new").rename(tmp_path / "..data")

    mount("first")
    for name in ("token", "ca.crt"):
        (tmp_path / name).symlink_to(f"..data/{name}")
    access = load_access(IN_CLUSTER, home=tmp_path, service_account=tmp_path)
    context = access.ssl_context(await access.credentials.identity())
    mount("second")
    with capture_logs() as logs:
        identity = await access.credentials.identity()
        assert identity.token == "second"
        assert access.ssl_context(identity) is context
    assert [line["of"] for line in logs] == ["service account token"]


@pytest.mark.usefixtures("looks_at_once")
@pytest.mark.parametrize("beside", [{}, {"token": SECRET}, {"tokenFile": "token"}])
async def test_certificate_in_files_is_followed(tmp_path: Path, beside: dict[str, str]) -> None:
    """A kubeconfig's replaced certificate counts once its key came as well, whatever stands beside it."""
    files = {"client-certificate": "own.crt", "client-key": "own.key"}
    (tmp_path / "token").write_text(SECRET)
    (tmp_path / "own.crt").write_bytes(CERT_PEM)
    (tmp_path / "own.key").write_bytes(KEY_PEM)
    access = load(write(tmp_path, config(user={**files, **beside})))
    first = await access.credentials.identity()
    assert await access.credentials.identity() is first
    context = access.ssl_context(first)
    leaf = CA.issue_cert("renewed.example")
    renewed = leaf.cert_chain_pems[0].bytes()
    (tmp_path / "own.crt").write_bytes(renewed)
    assert await access.credentials.identity() is first, "half-way"
    (tmp_path / "own.key").write_bytes(leaf.private_key_pem.bytes())
    second = await access.credentials.identity()
    assert second.pair is not None
    assert (second.pair.certificate, second.token) == (renewed, first.token)
    assert second.token == (SECRET if beside else "")
    assert access.ssl_context(second) is not context


def test_ipv6_service_host_is_bracketed(tmp_path: Path) -> None:
    """An IPv6 cluster announces a bare address."""
    env = {**IN_CLUSTER, "KUBERNETES_SERVICE_HOST": "fd00:10:96::1"}
    access = load_access(env, home=tmp_path, service_account=service_account(tmp_path / "sa"))
    assert access.server == "https://[fd00:10:96::1]:443"


def test_order_is_kubeconfig_then_cluster_then_home(tmp_path: Path) -> None:
    """KUBECONFIG wins over the service account, which wins over ~/.kube/config."""
    account = service_account(tmp_path / "sa")
    (tmp_path / ".kube").mkdir()
    write(tmp_path / ".kube", config(cluster={"server": "https://home.example"}))
    listed = write(tmp_path, config(cluster={"server": "https://listed.example"}), "listed")
    both = {**IN_CLUSTER, "KUBECONFIG": str(listed)}
    assert load_access(both, home=tmp_path, service_account=account).server == "https://listed.example"
    assert load_access(IN_CLUSTER, home=tmp_path, service_account=account).server == "https://10.96.0.1:443"
    assert load_access({"HOME": str(tmp_path)}, service_account=account).server == "https://home.example"
    unmounted = load_access(IN_CLUSTER, home=tmp_path, service_account=tmp_path / "none")
    assert unmounted.server == "https://home.example"


def test_nothing_to_go_by_says_what_was_looked_for(tmp_path: Path) -> None:
    """The error names KUBECONFIG, the token and the home file."""
    with pytest.raises(AccessError, match=r"KUBECONFIG is not set.*no Pod.*\.kube/config"):
        load_access({}, home=tmp_path)
    with pytest.raises(AccessError, match="sa/token"):
        load_access(IN_CLUSTER, home=tmp_path, service_account=tmp_path / "sa")


def test_service_account_without_a_ca_is_an_error(tmp_path: Path) -> None:
    """A missing or empty ca.crt is named, and never means unverified."""
    account = service_account(tmp_path / "sa")
    (account / "ca.crt").write_text("")
    with pytest.raises(AccessError, match=r"ca\.crt.*no PEM certificate"):
        load_access(IN_CLUSTER, home=tmp_path, service_account=account)
    (account / "ca.crt").unlink()
    with pytest.raises(AccessError, match=r"cannot read .*ca\.crt"):
        load_access(IN_CLUSTER, home=tmp_path, service_account=account)


async def test_rotating_token_is_read_again_each_minute_and_after_a_401(tmp_path: Path) -> None:
    """Between, and while the file is gone, the last token stays in use."""
    path = tmp_path / "token"
    path.write_text("first")
    now = 0.0
    source = StoredCredentials(token=rotating_token(path, "test", clock=lambda: now))
    first = await source.identity()
    path.write_text("second")
    assert (await source.identity()).token == "first"
    now = 60.0
    assert (await source.identity()).token == "second"
    path.write_text("third")
    source.rejected(first)
    assert (await source.identity()).token == "second"
    source.rejected(await source.identity())
    assert (await source.identity()).token == "third"
    path.unlink()
    now = 120.0
    assert (await source.identity()).token == "third"
    path.write_text("")
    now = 180.0
    assert (await source.identity()).token == "third"
    path.write_text("fourth")
    now = 240.0
    assert (await source.identity()).token == "fourth"


async def test_token_file_that_never_was_is_an_error(tmp_path: Path) -> None:
    """There is nothing to fall back on before the first read."""
    with pytest.raises(AccessError, match=r"cannot read .*none: No such file"):
        await StoredCredentials(token=rotating_token(tmp_path / "none", "user 'x'")).identity()


@pytest.mark.parametrize("token", [" \n", f"{SECRET}\r\nX-Evil: 1", f"{SECRET} x", f"{SECRET}é"])
def test_token_that_is_none_is_refused_without_showing_it(tmp_path: Path, token: str) -> None:
    """A header cannot be smuggled in, nor a token leaked, by a broken one."""
    assert "user 'main': token: the token" in mistake(write(tmp_path, config(user={"token": token})))


async def test_relative_paths_start_at_their_own_file(tmp_path: Path) -> None:
    """Of two merged files each keeps its own folder."""
    one, two = tmp_path / "one", tmp_path / "two"
    for folder in (one, two):
        folder.mkdir()
    (two / "ca.pem").write_bytes(CA_PEM)
    (two / "tok").write_text("from-two")
    context = {**config(), "clusters": None, "users": None}
    parts = {
        **config(cluster={"certificate-authority": "ca.pem"}, user={"tokenFile": "tok"}),
        "current-context": "",
    }
    access = load(write(one, context), write(two, parts))
    assert cluster_ca(access) == CA_PEM.decode()
    assert await access.token() == "from-two"


async def test_merging_takes_the_first_of_each_name_whole(tmp_path: Path) -> None:
    """The first current-context wins; a second file adds names but no field to a known one."""
    first = config(user={"token": "first"})
    second = {
        **config(
            cluster={"server": "https://second.example", "tls-server-name": "x"}, user={"token": "second"}
        ),
        "current-context": "other",
    }
    other = config(name="other", cluster={"server": "https://other.example"}, user={"token": "other"})
    missing = tmp_path / "missing"
    paths = [write(tmp_path, c, f"c{i}") for i, c in enumerate((first, second, other))]
    access = load(missing, *paths)
    assert access.server == "https://api.example:6443"
    assert access.server_hostname is None
    assert await access.token() == "first"
    assert (await load(paths[1], paths[2]).token()) == "other"


def test_missing_file_matters_only_when_none_is_there(tmp_path: Path) -> None:
    """The only file missing is an error by its path."""
    assert "there is no" in mistake(tmp_path / "a")
    assert str(tmp_path / "b") in mistake(tmp_path / "a", tmp_path / "b")


async def test_data_and_files_give_the_same(tmp_path: Path) -> None:
    """Certificates may be in the file or beside it."""
    for name, content in (("ca", CA_PEM), ("crt", CERT_PEM), ("key", KEY_PEM)):
        (tmp_path / name).write_bytes(content)
    by_file = load(
        write(
            tmp_path,
            config(
                cluster={"certificate-authority": "ca"},
                user={"client-certificate": "crt", "client-key": str(tmp_path / "key")},
            ),
        )
    )
    by_data = load(
        write(
            tmp_path,
            config(
                cluster={"certificate-authority-data": b64(CA_PEM)},
                user={"client-certificate-data": b64(CERT_PEM), "client-key-data": b64(KEY_PEM)},
            ),
        )
    )
    for access in (by_file, by_data):
        assert cluster_ca(access) == CA_PEM.decode()
        identity = await access.credentials.identity()
        assert identity.pair is not None
        assert identity.pair.certificate == CERT_PEM
        assert access.ssl_context(identity) is access.ssl_context(identity)


async def test_passwords_are_sent_as_basic(tmp_path: Path) -> None:
    """Username and password make a Basic header, the password is in no repr."""
    access = load(write(tmp_path, config(user={"username": "me", "password": SECRET})))
    assert await headers(access) == {"Authorization": f"Basic {b64(f'me:{SECRET}'.encode())}"}
    assert SECRET not in repr(access)
    assert SECRET not in repr(await access.credentials.identity())


async def test_context_without_a_user_is_anonymous(tmp_path: Path) -> None:
    """As in kubectl, no user means no credentials."""
    content = config()
    del content["contexts"][0]["context"]["user"]
    assert await headers(load(write(tmp_path, content))) == {}


def test_options_of_the_cluster_are_taken_over(tmp_path: Path) -> None:
    """Server prefix, TLS name, proxy and skipped verification."""
    access = load(
        write(
            tmp_path,
            config(
                cluster={
                    "server": "https://rancher.example/k8s/clusters/c-1/",
                    "tls-server-name": "kubernetes",
                    "proxy-url": f"http://u:{SECRET}@proxy.example:3128",
                    "insecure-skip-tls-verify": True,
                }
            ),
        )
    )
    assert access.server == "https://rancher.example/k8s/clusters/c-1"
    assert access.server_hostname == "kubernetes"
    assert access.proxy == f"http://u:{SECRET}@proxy.example:3128"
    assert SECRET not in repr(access)
    context = access.ssl_context(ClientIdentity())
    assert context is not None
    assert context.verify_mode is ssl.CERT_NONE
    assert cluster_ca(access) == ""


def test_plain_http_has_no_tls(tmp_path: Path) -> None:
    """Kubectl proxy and the like are spoken to in the clear."""
    access = load(write(tmp_path, config(cluster={"server": "http://127.0.0.1:8001"})))
    assert access.ssl_context(ClientIdentity()) is None


def test_ca_bundle_may_hold_comments(tmp_path: Path) -> None:
    """Text between certificates, in any language, is skipped."""
    bundle = "# CA von Zürich\n".encode() + CA_PEM + b"\n# next\n" + OTHER_CA.cert_pem.bytes()
    access = load(write(tmp_path, config(cluster={"certificate-authority-data": b64(bundle)})))
    assert cluster_ca(access).count("BEGIN CERTIFICATE") == 2


CLUSTER_MISTAKES: list[tuple[dict[str, Any], str]] = [
    ({"server": ""}, "cluster 'main': server is missing"),
    ({"server": "api.example:6443"}, "cluster 'main': server is not"),
    ({"server": "ftp://x"}, "cluster 'main': server is not an http"),
    ({"server": "https://"}, "cluster 'main': server is not a URL with a host"),
    ({"server": "https://api:99999"}, "cluster 'main': server is not a URL with a host"),
    ({"server": f"https://me:{SECRET}@api"}, "cluster 'main': server may have no user"),
    (
        {"proxy-url": f"socks5://u:{SECRET}@p:1080"},
        "cluster 'main': proxy-url: socks5 proxies are not supported",
    ),
    ({"proxy-url": "ftp://p"}, "cluster 'main': proxy-url is not an http"),
    ({"certificate-authority": "none.pem"}, "cluster 'main': certificate-authority: cannot read"),
    ({"certificate-authority-data": "%%"}, "cluster 'main': certificate-authority-data is not base64"),
    ({"certificate-authority-data": b64(b"junk")}, "cluster 'main': certificate-authority: holds no PEM"),
    (
        {"certificate-authority-data": b64(b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----")},
        "cluster 'main': certificate-authority: not a usable CA",
    ),
    ({"certificate-authority": "a", "certificate-authority-data": b64(CA_PEM)}, "exclude each other"),
    (
        {"insecure-skip-tls-verify": True, "certificate-authority-data": b64(CA_PEM)},
        "cluster 'main': insecure-skip-tls-verify contradicts",
    ),
    ({"insecure-skip-tls-verify": "yes"}, r"$.clusters[0].cluster.insecure-skip-tls-verify"),
]


@pytest.mark.parametrize(("cluster", "text"), CLUSTER_MISTAKES)
def test_mistakes_of_a_cluster_are_named(tmp_path: Path, cluster: dict[str, Any], text: str) -> None:
    """The file, the cluster and the field stand in the error."""
    path = write(tmp_path, config(cluster=cluster))
    said = mistake(path)
    assert text in said
    assert str(path) in said


PLUGIN = {"apiVersion": "client.authentication.k8s.io/v1", "command": "x", "interactiveMode": "Never"}
USER_MISTAKES: list[tuple[dict[str, Any], str]] = [
    (
        {"token": SECRET, "username": "me", "password": "p"},
        "user 'main': token and username exclude each other",
    ),
    ({"token": SECRET, "exec": PLUGIN}, "user 'main': token and exec exclude each other"),
    ({"password": SECRET}, "user 'main': username is missing"),
    (
        {"auth-provider": {"name": "gcp", "config": {"access-token": SECRET}}},
        "user 'main': auth-provider was retired",
    ),
    ({"token": SECRET, "as": "admin"}, "user 'main': as: impersonation"),
    ({"client-certificate-data": b64(CERT_PEM)}, "user 'main': client-key is missing"),
    ({"client-key-data": b64(KEY_PEM)}, "user 'main': client-certificate is missing"),
    (
        {"client-certificate": "no", "client-key-data": b64(KEY_PEM)},
        "user 'main': client-certificate: cannot read",
    ),
    (
        {
            "client-certificate-data": b64(CERT_PEM),
            "client-key-data": b64(OTHER_CA.issue_cert("x").private_key_pem.bytes()),
        },
        "user 'main': client-certificate: the certificate and key cannot be used: key values mismatch",
    ),
    ({"client-certificate-data": b64(b"junk"), "client-key-data": b64(KEY_PEM)}, "holds no PEM certificate"),
    (
        {"client-certificate-data": b64(CERT_PEM), "client-key-data": b64(SECRET.encode())},
        "holds no PEM private key",
    ),
    ({"exec": {**PLUGIN, "command": ""}}, "user 'main': exec.command is missing"),
    (
        {"exec": {**PLUGIN, "apiVersion": "client.authentication.k8s.io/v1alpha1"}},
        "user 'main': exec.apiVersion must be",
    ),
    ({"exec": {**PLUGIN, "interactiveMode": "Sometimes"}}, "user 'main': exec.interactiveMode must be"),
    ({"exec": {**PLUGIN, "interactiveMode": "Always"}}, "a daemon has no terminal"),
    ({"token": 5}, "$.users[0].user.token"),
]


@pytest.mark.parametrize(("user", "text"), USER_MISTAKES)
def test_mistakes_of_a_user_are_named(tmp_path: Path, user: dict[str, Any], text: str) -> None:
    """The file, the user and the field stand in the error, the secret does not."""
    path = write(tmp_path, config(user=user))
    said = mistake(path)
    assert text in said
    assert str(path) in said


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("", "names no current-context"),
        (f"users: [{{token: {SECRET}\n  x", "not YAML (line"),
        ("\x00", "not YAML"),
        ("when: 2020-99-99", "names no current-context"),
        ("when: !!timestamp 2020-99-99", "not YAML"),
        ("when: !!timestamp soon", "not YAML"),
        ("when: !!bool perhaps", "not YAML"),
        ("when: !!python/object:os.system x", "not YAML"),
        ("[" * 100_000, "not YAML"),
        ("a: &a [*a]", "nested too deeply"),
        ("\xff\xfe\x00", "not YAML"),
        (
            "a: &a [x,x,x,x,x,x,x,x,x,x]\n"
            + "".join(f"{b}: &{b} [*{a}{f', *{a}' * 9}]\n" for a, b in itertools.pairwise("abcdefghijk")),
            "nested too deeply",
        ),
        ("- a\n- b", "Expected `object`"),
        ("users: 5", "$.users"),
        ({**config(), "current-context": "gone"}, "current-context 'gone' is not among the contexts"),
        ({**config(), "clusters": []}, "context 'main': cluster 'main' is not among the clusters"),
        ({**config(), "users": []}, "context 'main': user 'main' is not among the users"),
        ({**config(), "users": config()["users"] * 2}, "user 'main': stands more than once"),
    ],
)
def test_mistakes_of_a_file_are_named(tmp_path: Path, content: object, text: str) -> None:
    """A file that is broken or points nowhere says so, without being quoted."""
    assert text in mistake(write(tmp_path, content))


def test_unreadable_file_is_an_error_even_in_a_list(tmp_path: Path) -> None:
    """Only a file that is not there is skipped: a folder in its place is a mistake."""
    assert "Is a directory" in mistake(tmp_path, write(tmp_path, config()))


def test_encrypted_key_is_refused_without_asking_for_its_password(tmp_path: Path) -> None:
    """OpenSSL would ask on the terminal and hang a daemon."""
    key = load_pem_private_key(KEY_PEM, None).private_bytes(
        Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(SECRET.encode())
    )
    user = {"client-certificate-data": b64(CERT_PEM), "client-key-data": b64(key)}
    assert "not encrypted" in mistake(write(tmp_path, config(user=user)))


NAMES = [
    "2024-01-01",
    "2001-12-14t21:59:43.10-05:00",
    "2020-99-99",
    "123",
    "0123",
    "0x1F",
    "0b11",
    "1_000",
    "1e3",
    "1.10",
    "-.inf",
    ".nan",
    "true",
    "No",
    "off",
    "12:30:45",
    "=",
    "<<",
    "none",
    "nil",
]


@pytest.mark.parametrize("name", NAMES)
async def test_name_is_text_whatever_yaml_takes_it_for(tmp_path: Path, name: str) -> None:
    """As it is written: to kubectl a date is text, and a number in quotes or without names the same."""
    text = (
        f"current-context: {name}\n"
        f"clusters: [{{name: {name}, cluster: {{server: 'http://127.0.0.1:1'}}}}]\n"
        f"users: [{{name: {name}, user: {{username: me, password: '1'}}}}]\n"
        f"contexts: [{{name: '{name}', context: {{cluster: {name}, user: '{name}', namespace: 5}}}}]\n"
    )
    access = load(write(tmp_path, text))
    assert access.origin.endswith(f"context {name!r}, user {name!r}")
    assert "Authorization" in await headers(access)


@pytest.mark.parametrize("name", ["null", "Null", "~", ""])
def test_name_that_is_null_is_none(tmp_path: Path, name: str) -> None:
    """To kubectl a null field is an absent one."""
    text = write(tmp_path, config()).read_text().replace("current-context: main", f"current-context: {name}")
    assert "names no current-context" in mistake(write(tmp_path, text))


def test_dates_and_aliases_elsewhere_are_taken_as_kubectl_does(tmp_path: Path) -> None:
    """A date in the cluster's extensions, an alias and a merge key do no harm."""
    text = (
        "x: &server {server: 'http://127.0.0.1:1'}\n"
        "current-context: a\nclusters: [{name: a, cluster: {<<: *server, extensions: [{name: n, extension: "
        "{last-update: 2024-01-01}}]}}]\ncontexts: [{name: a, context: {cluster: a}}]\n"
    )
    assert load(write(tmp_path, text)).server == "http://127.0.0.1:1"


@pytest.mark.parametrize(
    ("cluster", "text"),
    [
        ({"server": "https://a..b"}, "cluster 'main': server has a host name"),
        ({"server": "https://[fe80::1%25eth0]:6443"}, "cluster 'main': server has a zone"),
        ({"server": "https://api/%zz"}, "cluster 'main': server holds a %"),
        ({"server": "https://exa mple"}, "cluster 'main': server holds spaces"),
        ({"server": "https://\u2028x"}, "cluster 'main': server holds spaces or control"),
        ({"proxy-url": "http://a..b"}, "cluster 'main': proxy-url has a host name"),
        ({"proxy-url": f"http://m\u20ac:{SECRET}@p"}, "cluster 'main': proxy-url has a host, user"),
        ({"tls-server-name": "a..b"}, "cluster 'main': tls-server-name has a host name"),
    ],
)
def test_urls_and_names_that_no_client_can_use_are_refused(
    tmp_path: Path, cluster: dict[str, Any], text: str
) -> None:
    """At the start, and not by a traceback at the first request."""
    assert text in mistake(write(tmp_path, config(cluster=cluster)))


def test_address_of_the_service_that_no_client_can_use_is_refused(tmp_path: Path) -> None:
    """The kubelet sets these, and a Pod's author may."""
    account = service_account(tmp_path / "sa")
    for wrong in ({"KUBERNETES_SERVICE_HOST": "a..b"}, {"KUBERNETES_SERVICE_PORT": "http"}):
        with pytest.raises(AccessError, match="KUBERNETES_SERVICE_HOST"):
            load_access({**IN_CLUSTER, **wrong}, service_account=account)


def test_text_that_cannot_be_encoded_is_an_error(tmp_path: Path) -> None:
    """YAML can write half of a surrogate pair."""
    text = write(tmp_path, config(user={"username": "me", "password": "X"})).read_text()
    said = mistake(write(tmp_path, text.replace("password: X", 'password: "\\ud800"')))
    assert said.startswith("kubeconfig ")
