"""PEM in whatever surroundings, and certificates and keys that are damaged, cut off or of another kind."""

import ssl
import subprocess
import sys
import time
from base64 import b64encode
from collections.abc import Callable
from pathlib import Path

import pytest
import trustme
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)

from k8s_consul_registrar.errors import AccessError
from k8s_consul_registrar.kube.access import load_access
from k8s_consul_registrar.pem import certificates, expires_at
from k8s_consul_registrar.settings.proxy import KubeletSettings
from k8s_consul_registrar.tls import CONSUL, POD, KeyPair, checked, client_tls, server_tls, trust_in
from k8s_consul_registrar.wiring.proxy import KubeletIdentity
from support.waiting import PATIENCE

CA = trustme.CA()
OTHER = trustme.CA()
PEM = CA.cert_pem.bytes()
LEAF = CA.issue_cert("client.example")
CERTIFICATE = b"".join(blob.bytes() for blob in LEAF.cert_chain_pems)
KEY = LEAF.private_key_pem.bytes()
COMMENT = "# NetLock Arany (Class Gold) Főtanúsítvány\n"
MIDDLE = len(PEM) // 2

GOOD = {
    "plain": PEM,
    "an ASCII comment": b"# Example CA\n" + PEM,
    "a UTF-8 comment": COMMENT.encode() + PEM,
    "a Latin-2 comment": COMMENT.encode("iso-8859-2") + PEM,
    "a byte order mark": b"\xef\xbb\xbf" + PEM,
    "NULs beside it": b"\0\0" + PEM + b"\0",
    "dashes beside it": b"---\nServer certificate\n" + PEM + b"---\n-----\n",
    "CRLF": PEM.replace(b"\n", b"\r\n"),
    "CR": PEM.replace(b"\n", b"\r"),
    "no line end": PEM.rstrip(),
    "one long line": b"-----BEGIN CERTIFICATE-----\n"
    + b64encode(ssl.PEM_cert_to_DER_cert(PEM.decode()))
    + b"\n-----END CERTIFICATE-----",
    "an older label": PEM.replace(b" CERTIFICATE", b" X509 CERTIFICATE"),
    "a key beside it": KEY + PEM,
    "indented": b"\n".join(b"  " + line for line in PEM.splitlines()),
}
BAD = {
    "empty": (b"", "holds no PEM certificate"),
    "text": (b"no certificate", "holds no PEM certificate"),
    "UTF-16": (PEM.decode().encode("utf-16"), "holds no PEM certificate"),
    "DER": (ssl.PEM_cert_to_DER_cert(PEM.decode()), "holds no PEM certificate"),
    "a key only": (KEY, "holds no PEM certificate"),
    "cut off": (PEM[:MIDDLE], "holds an unfinished PEM block"),
    "cut off in its last line": (PEM.rstrip()[:-3], "holds an unfinished PEM block"),
    "the second cut off": (PEM + PEM[:MIDDLE], "holds an unfinished PEM block"),
    "the second cut off in its first line": (PEM + b"-----BEG", "holds an unfinished PEM block"),
    "the first cut off": (PEM[:MIDDLE] + b"\n" + PEM, "holds an unfinished PEM block"),
    "a byte that is not ASCII inside": (PEM[:200] + b"\xc3" + PEM[201:], "holds a damaged certificate"),
    "a byte that is not base64 inside": (PEM[:200] + b"!" + PEM[201:], "holds a damaged certificate"),
    "NULs inside": (PEM[:200] + b"\0" * 50 + PEM[250:], "holds a damaged certificate"),
    "OpenSSL's own": (PEM.replace(b" CERTIFICATE", b" TRUSTED CERTIFICATE"), "holds a TRUSTED CERTIFICATE"),
    "no certificate in it": (
        b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n",
        "not a usable CA certificate|cannot be used|holds no usable certificate",
    ),
    "nothing in it": (
        b"-----BEGIN CERTIFICATE-----\n-----END CERTIFICATE-----\n",
        "damaged|not a usable CA certificate|cannot be used|holds no usable certificate",
    ),
}


def consul(ca: Path) -> ssl.SSLContext:
    """Return Consul's context with this CA."""
    return client_tls(CONSUL, str(ca)).value.context


def client_ca(ca: Path) -> ssl.SSLContext:
    """Return a server's context with this CA of clients."""
    (ca.parent / "crt").write_bytes(CERTIFICATE)
    (ca.parent / "key").write_bytes(KEY)
    return server_tls(ca.parent / "crt", ca.parent / "key", ca, setting="TLS").value.context


def kubelets(ca: Path) -> ssl.SSLContext:
    """Return the context for kubelets with this CA."""
    config = ca.parent / "config"
    config.write_text(
        "current-context: a\nclusters: [{name: a, cluster: {server: 'http://127.0.0.1:1'}}]\n"
        "contexts: [{name: a, context: {cluster: a}}]\n"
    )
    settings = KubeletSettings(
        str(ca), skip_verify=False, tls_server_name="ip", client_cert_file="", client_key_file=""
    )
    return KubeletIdentity(settings, load_access({"KUBECONFIG": str(config)})).context()


def pods(ca: Path) -> ssl.SSLContext:
    """Return the context for Pods with this CA."""
    return client_tls(POD, str(ca)).value.context


def api_server(ca: Path) -> ssl.SSLContext:
    """Return the API server's context with this CA."""
    return trust_in(ca.read_bytes(), f"CA {ca}").context


USERS = {
    "CONSUL_CACERT": consul,
    "CLIENT_CA_FILE": client_ca,
    "KUBELET_CA_FILE": kubelets,
    "POD_CA_FILE": pods,
    "CA": api_server,
}


@pytest.mark.parametrize("user", USERS.values(), ids=USERS)
@pytest.mark.parametrize("bundle", GOOD.values(), ids=GOOD)
def test_bundle_is_used_whatever_stands_around_its_certificates(
    tmp_path: Path, bundle: bytes, user: Callable[[Path], ssl.SSLContext]
) -> None:
    """A comment with an é was a TypeError of OpenSSL's, and ended the daemon."""
    ca = tmp_path / "ca"
    ca.write_bytes(bundle)
    (found,) = user(ca).get_ca_certs(binary_form=True)
    assert found == ssl.PEM_cert_to_DER_cert(PEM.decode())


@pytest.mark.parametrize(("setting", "user"), USERS.items(), ids=USERS)
@pytest.mark.parametrize(("bundle", "why"), BAD.values(), ids=BAD)
def test_bundle_that_cannot_be_used_is_named(
    tmp_path: Path, bundle: bytes, why: str, setting: str, user: Callable[[Path], ssl.SSLContext]
) -> None:
    """By its setting and its file, whatever uses it; a part of it never passes for the whole."""
    ca = tmp_path / "the-ca"
    ca.write_bytes(bundle)
    with pytest.raises(AccessError, match=why) as caught:
        user(ca)
    assert setting in str(caught.value)
    assert "the-ca" in str(caught.value)


def test_folder_in_the_place_of_a_bundle_is_named(tmp_path: Path) -> None:
    """OpenSSL would say "system lib"."""
    for setting, user in USERS.items():
        if user is not api_server:
            folder = tmp_path / setting
            folder.mkdir()
            with pytest.raises(AccessError, match=rf"{setting}: cannot read .*: Is a directory"):
                user(folder)


def test_every_certificate_of_a_bundle_counts() -> None:
    """In their order, each once more in one form."""
    both = certificates(COMMENT.encode() + PEM + b"\n\nand\n" + OTHER.cert_pem.bytes(), "CA")
    assert both.encode() == PEM + OTHER.cert_pem.bytes()


def key_as(how: PrivateFormat, *, password: bytes = b"") -> bytes:
    """Return the key in another form."""
    encryption = BestAvailableEncryption(password) if password else NoEncryption()
    return load_pem_private_key(KEY, None).private_bytes(Encoding.PEM, how, encryption)


@pytest.mark.parametrize(
    "key",
    [
        KEY,
        CERTIFICATE + KEY,
        KEY + CERTIFICATE,
        COMMENT.encode() + KEY,
        KEY.replace(b"\n", b"\r\n"),
        key_as(PrivateFormat.PKCS8),
        key_as(PrivateFormat.TraditionalOpenSSL),
    ],
)
def test_key_is_used_in_every_form(key: bytes) -> None:
    """Its file may hold the certificate as well, or comments."""
    checked(KeyPair(COMMENT.encode() + CERTIFICATE, key, "PAIR"))


@pytest.mark.timeout(PATIENCE)
@pytest.mark.parametrize(
    ("certificate", "key", "why"),
    [
        (CERTIFICATE, b"", "holds no PEM private key"),
        (CERTIFICATE, KEY[:200], "holds no PEM private key"),
        (CERTIFICATE, PEM, "holds no PEM private key"),
        (CERTIFICATE, b"\xff" * 500, "holds no PEM private key"),
        (CERTIFICATE, OTHER.issue_cert("x").private_key_pem.bytes(), "key values mismatch"),
        (CERTIFICATE, key_as(PrivateFormat.PKCS8, password=b"s3cr3t"), "not encrypted"),
        (CERTIFICATE, key_as(PrivateFormat.TraditionalOpenSSL, password=b"s3cr3t"), "not encrypted"),
        (CERTIFICATE, KEY[:100] + b"!!" + KEY[102:], "cannot be used"),
        (CERTIFICATE[: len(CERTIFICATE) // 2], KEY, "unfinished"),
        (b"", KEY, "holds no PEM certificate"),
    ],
)
def test_pair_that_cannot_be_used_is_named(certificate: bytes, key: bytes, why: str) -> None:
    """Without asking for a password on the terminal, and without a word of the key."""
    with pytest.raises(AccessError, match=why) as caught:
        checked(KeyPair(certificate, key, "PAIR"))
    assert str(caught.value).startswith("PAIR: ")
    assert KEY.splitlines()[1].decode() not in str(caught.value)


async def test_consul_s_own_certificate_may_stand_beside_its_key(tmp_path: Path) -> None:
    """And is followed as the others are."""
    own = tmp_path / "own.pem"
    own.write_bytes(KEY + CERTIFICATE)
    tls = client_tls(CONSUL, certificate=str(own), is_verified=False)
    first = tls.value
    own.write_bytes(b"half-way")
    assert not tls.refresh()
    assert tls.problem
    own.write_bytes(CERTIFICATE + KEY + b"\n")
    assert tls.refresh()
    assert tls.value is not first


def test_files_of_a_server_caught_half_way_leave_the_last_in_force(tmp_path: Path) -> None:
    """Each of them in each way, and the next good ones count."""
    files = tmp_path / "crt", tmp_path / "key", tmp_path / "ca"
    good = dict(zip(files, (CERTIFICATE, KEY, PEM), strict=True))
    for path, content in good.items():
        path.write_bytes(content)
    tls = server_tls(*files, setting="TLS")
    first = tls.value
    for path, content in good.items():
        for broken in (b"", content[: len(content) // 2], b"\xff\0" * 600, COMMENT.encode()):
            path.write_bytes(broken)
            assert not tls.refresh()
            assert tls.value is first
        path.unlink()
        assert not tls.refresh()
        path.mkdir()
        assert not tls.refresh()
        path.rmdir()
        path.symlink_to(tmp_path / "nowhere")
        assert not tls.refresh()
        path.unlink()
        assert tls.value is first
        path.write_bytes(content)
    (tmp_path / "ca").write_bytes(OTHER.cert_pem.bytes())
    assert tls.refresh()
    assert tls.value.client_ca == OTHER.cert_pem.bytes().decode()


def test_start_reads_no_authorities_of_the_system(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Loading aiohttp makes two contexts, which no request uses; afterwards contexts are as they always are."""
    bundle = tmp_path / "ca.pem"
    bundle.write_bytes(trustme.CA().cert_pem.bytes())
    monkeypatch.setenv("SSL_CERT_FILE", str(bundle))
    script = """
import ssl
from k8s_consul_registrar.tls import without_authorities
with without_authorities():
    from aiohttp import connector
for context in connector._SSL_CONTEXT_VERIFIED, connector._SSL_CONTEXT_UNVERIFIED, ssl.create_default_context():
    print(context.cert_store_stats()["x509"])
"""
    shown = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True).stdout
    assert shown.split() == ["0", "0", "1"]


def test_expiry_of_a_certificate_is_read_from_its_first_block() -> None:
    """The status page shows it; of anything else there is none."""
    chain = trustme.CA().issue_cert("one").cert_chain_pems
    expiry = expires_at(b"".join(one.bytes() for one in chain))
    assert expiry is not None
    assert expiry > time.time()
    assert expires_at(b"odd") is None
