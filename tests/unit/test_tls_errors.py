"""Certificates without key identifiers, and explanations of certificates that cannot be used or verified."""

import ssl
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from k8s_consul_registrar.errors import AccessError
from k8s_consul_registrar.kube.access import load_access
from k8s_consul_registrar.settings.proxy import KubeletSettings
from k8s_consul_registrar.tls import (
    API_SERVER,
    CONSUL,
    KUBELET,
    POD,
    Cause,
    KeyPair,
    Peer,
    ServerCertificate,
    Trust,
    checked,
    client_tls,
    explain,
    out_of_date,
    server_tls,
)
from k8s_consul_registrar.wiring.proxy import KubeletIdentity
from support.certificates import DAY, Issued, PlainCA, SelfSigned, shake_hands

CA, OTHER = PlainCA(), PlainCA("another CA")
NAME = "127.0.0.1"
PEERS = [CONSUL, API_SERVER, KUBELET, POD]


@pytest.fixture
def strict(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make every context strict from its beginning, as Python 3.13's create_default_context does."""
    make = ssl.SSLContext.__new__

    def make_strict(kind: type[ssl.SSLContext], protocol: int) -> ssl.SSLContext:
        context = make(kind, protocol)
        context.verify_flags |= ssl.VERIFY_X509_STRICT
        return context

    monkeypatch.setattr(ssl.SSLContext, "__new__", make_strict)


def consul(ca: Path) -> ssl.SSLContext:
    """Return Consul's context."""
    return client_tls(CONSUL, str(ca)).value.context


def api_server(ca: Path) -> ssl.SSLContext:
    """Return the API server's context."""
    config = ca.parent / "config"
    config.write_text(
        "current-context: a\ncontexts: [{name: a, context: {cluster: a}}]\nclusters: [{name: a, cluster: "
        f"{{server: 'https://{NAME}:1', certificate-authority: {ca}}}}}]\n"
    )
    trust = load_access({"KUBECONFIG": str(config)}).trust
    assert trust is not None
    return trust.context


def kubelet(ca: Path) -> ssl.SSLContext:
    """Return the context for kubelets, verified by the cluster's CA."""
    api_server(ca)
    access = load_access({"KUBECONFIG": str(ca.parent / "config")})
    settings = KubeletSettings(
        "", skip_verify=False, tls_server_name="ip", client_cert_file="", client_key_file=""
    )
    return KubeletIdentity(settings, access).context()


def pod(ca: Path) -> ssl.SSLContext:
    """Return the context for Pods."""
    return client_tls(POD, str(ca)).value.context


CLIENTS = {"Consul": consul, "API server": api_server, "kubelet": kubelet, "Pod": pod}


def server_of(issued: Issued) -> ssl.SSLContext:
    """Return a server that shows a certificate."""
    return ServerCertificate(KeyPair(issued.certificate, issued.key)).context


def written(folder: Path, name: str, content: bytes) -> Path:
    """Write a file and return its path."""
    path = folder / name
    path.write_bytes(content)
    return path


@pytest.mark.usefixtures("strict")
def test_strict_context_refuses_a_ca_without_key_identifiers() -> None:
    """The fault that the next tests are about exists: Python 3.13's default refuses such a CA."""
    client = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    client.load_verify_locations(cadata=CA.pem.decode())
    with pytest.raises(ssl.SSLCertVerificationError, match="Missing Authority Key Identifier"):
        shake_hands(client, server_of(CA.issue(NAME)), NAME)


@pytest.mark.usefixtures("strict")
@pytest.mark.parametrize("client", CLIENTS.values(), ids=CLIENTS)
def test_ca_without_key_identifiers_is_trusted_and_chain_name_and_dates_count(
    tmp_path: Path, client: Callable[[Path], ssl.SSLContext]
) -> None:
    """Whatever Python's default is, and for each kind of server that we connect to."""
    context = client(written(tmp_path, "ca", CA.pem))
    shake_hands(context, server_of(CA.issue(NAME)), NAME)
    for issued, code in (
        (OTHER.issue(NAME), 20),
        (CA.issue("192.0.2.1"), 64),
        (CA.issue(NAME, begins=-2 * DAY, ends=-DAY), 10),
        (CA.issue(NAME, begins=DAY, ends=2 * DAY), 9),
    ):
        with pytest.raises(ssl.SSLCertVerificationError) as caught:
            shake_hands(context, server_of(issued), NAME)
        assert caught.value.verify_code == code


@pytest.mark.usefixtures("strict")
def test_clients_of_a_ca_without_key_identifiers_are_let_in(tmp_path: Path) -> None:
    """At our own ports; a client of another CA, with an expired certificate or with none is not."""
    own, client_ca = CA.issue(NAME), written(tmp_path, "ca", CA.pem)
    certificate, key = written(tmp_path, "crt", own.certificate), written(tmp_path, "key", own.key)
    server = server_tls(certificate, key, client_ca, setting="TLS").value.context

    def client(issued: Issued | None) -> ssl.SSLContext:
        return Trust(CA.pem.decode(), pair=issued and KeyPair(issued.certificate, issued.key)).context

    shake_hands(client(CA.issue("client.example")), server, NAME)
    for issued in (OTHER.issue("client.example"), CA.issue("client.example", ends=-DAY / 2), None):
        with pytest.raises(ssl.SSLError):
            shake_hands(client(issued), server, NAME)


def test_common_name_is_no_name() -> None:
    """As for Go: only alternative names count, also where there are none."""
    with pytest.raises(ssl.SSLCertVerificationError):
        shake_hands(Trust(CA.pem.decode()).context, server_of(CA.issue()), "leaf")


def test_server_s_own_certificate_may_be_pinned() -> None:
    """A file may hold the certificate that is shown in the place of its CA's, as for Go."""
    issued = CA.issue(NAME)
    shake_hands(Trust(issued.certificate.decode()).context, server_of(issued), NAME)


def failure(client: ssl.SSLContext, server: ssl.SSLContext) -> Exception:
    """Return the error of a handshake."""
    with pytest.raises(ssl.SSLError) as caught:
        shake_hands(client, server, NAME)
    return caught.value


@pytest.mark.parametrize("peer", PEERS, ids=lambda peer: peer.ca)
@pytest.mark.parametrize(
    ("issued", "cause", "words"),
    [
        (OTHER.issue(NAME), Cause.UNKNOWN_CA, "unable to get local issuer certificate"),
        (CA.issue("192.0.2.1"), Cause.OTHER_NAME, "IP address mismatch"),
        (CA.issue(NAME, begins=-2 * DAY, ends=-DAY), Cause.OUT_OF_DATE, "certificate has expired"),
        (CA.issue(NAME, begins=DAY, ends=2 * DAY), Cause.OUT_OF_DATE, "certificate is not yet valid"),
    ],
    ids=["signed by another CA", "for another name", "expired", "not yet valid"],
)
def test_unverified_certificate_is_explained_with_its_remedy(
    peer: Peer, issued: Issued, cause: Cause, words: str
) -> None:
    """The same problem for each kind of server, and the remedy in the words of its settings."""
    context = Trust(CA.pem.decode()).context
    explanation = explain(failure(context, server_of(issued)), peer, context)
    assert explanation is not None
    assert (explanation.cause, explanation.is_unverified) == (cause, True)
    assert explanation.problem.startswith(f"its certificate cannot be verified: {words}")
    assert explanation.remedy == peer.remedies[cause]
    assert str(explanation) == f"{explanation.problem}; {explanation.remedy}"


def test_leaf_in_the_place_of_a_ca_is_told() -> None:
    """A certificate that signed nothing is no use for any other server."""
    context = Trust(CA.issue("elsewhere.example").certificate.decode()).context
    explanation = explain(
        failure(context, server_of(CA.issue(NAME))), CONSUL, context, trusted="CONSUL_CACERT /ca"
    )
    assert explanation is not None
    assert explanation.remedy.startswith("CONSUL_CACERT must name a file with the CA that signed it (now: ")
    assert "CONSUL_CACERT /ca holds no CA certificate, only one of a server or client" in explanation.remedy


def alert(reason: str) -> ssl.SSLError:
    """Return an error as OpenSSL names it."""
    error = ssl.SSLError(1, f"[SSL: {reason}] text (_ssl.c:1000)")
    error.reason = reason
    return error


@pytest.mark.parametrize(
    ("reason", "cause", "problem"),
    [
        ("WRONG_VERSION_NUMBER", Cause.NO_TLS, "it does not speak TLS"),
        ("TLSV13_ALERT_CERTIFICATE_REQUIRED", Cause.OUR_CERTIFICATE, "it does not accept our certificate"),
        ("TLSV1_ALERT_UNKNOWN_CA", Cause.OUR_CERTIFICATE, "it does not accept our certificate"),
        ("SSLV3_ALERT_BAD_CERTIFICATE", Cause.OUR_CERTIFICATE, "it does not accept our certificate"),
        ("TLSV1_ALERT_INTERNAL_ERROR", Cause.NOT_READY, "it cannot make a TLS connection"),
        ("SSLV3_ALERT_HANDSHAKE_FAILURE", Cause.OTHER, "TLS failed: sslv3 alert handshake failure"),
        ("UNEXPECTED_EOF_WHILE_READING", Cause.OTHER, "TLS failed: unexpected eof while reading"),
    ],
)
def test_tls_alert_is_told_from_others(reason: str, cause: Cause, problem: str) -> None:
    """Without a place in Python's source, and with its remedy if there is one."""
    for peer in PEERS:
        explanation = explain(alert(reason), peer)
        assert explanation is not None
        assert (explanation.cause, explanation.is_unverified) == (cause, False)
        assert explanation.problem.startswith(problem)
        assert "_ssl.c" not in str(explanation)
        assert explanation.remedy == peer.remedies.get(cause, "")


def test_error_of_another_kind_is_not_explained() -> None:
    """Refused connections and the like are for those who dialled."""
    assert explain(ConnectionRefusedError(111, "Connection refused"), CONSUL) is None


def der(pem: bytes) -> bytes:
    """Return a certificate as DER."""
    return ssl.PEM_cert_to_DER_cert(pem.decode())


OWN = CA.issue(NAME)


@pytest.mark.parametrize(
    ("certificate", "key", "words"),
    [
        (b"", OWN.key, "holds no PEM certificate: it is empty"),
        (der(OWN.certificate), OWN.key, "holds no PEM certificate: it is DER"),
        (OWN.key, OWN.certificate, "holds no PEM certificate but a private key: are two files swapped?"),
        (OWN.certificate, b" \n", "holds no PEM private key: it is empty"),
        (
            OWN.certificate,
            OWN.certificate,
            "holds no PEM private key but a certificate: are two files swapped?",
        ),
        (OWN.certificate, CA.issue(NAME).key, "key values mismatch: the key is another certificate's"),
    ],
)
def test_pair_is_refused_with_what_its_files_hold(certificate: bytes, key: bytes, words: str) -> None:
    """Not only with what they lack."""
    with pytest.raises(AccessError) as caught:
        checked(KeyPair(certificate, key, "CERT a with KEY b"))
    assert str(caught.value).startswith("CERT a with KEY b: ")
    assert words in str(caught.value)


def test_leaf_as_the_only_client_ca_is_refused(tmp_path: Path) -> None:
    """No client could connect; a client's own self-signed certificate stays possible."""
    pair = written(tmp_path, "crt", OWN.certificate), written(tmp_path, "key", OWN.key)
    leaf = written(tmp_path, "leaf", CA.issue("client.example").certificate)
    with pytest.raises(AccessError, match=r"^TLS_CLIENT_CA_FILE .*leaf: holds no CA certificate"):
        server_tls(*pair, leaf, setting="TLS")
    self_signed = SelfSigned().issue("client.example")
    own = written(tmp_path, "self-signed", self_signed.certificate)
    server = server_tls(*pair, own, setting="TLS").value.context
    shown = KeyPair(self_signed.certificate, self_signed.key)
    shake_hands(Trust(CA.pem.decode(), pair=shown).context, server, NAME)


@pytest.mark.parametrize(
    ("begins", "ends", "words"),
    [(-2 * DAY, -DAY, "the certificate expired on"), (DAY, 2 * DAY, "the certificate is not valid before")],
)
def test_certificate_of_our_own_that_is_out_of_date_is_warned_of(
    begins: timedelta, ends: timedelta, words: str
) -> None:
    """It is shown nevertheless: not every client checks, and the clock here may be wrong."""
    old = CA.issue(NAME, begins=begins, ends=ends)
    with capture_logs() as logs:
        checked(KeyPair(old.certificate, old.key, "CERT a with KEY b"))
        checked(KeyPair(OWN.certificate, OWN.key))
    assert [line["event"] for line in logs] == ["a certificate of our own is not valid now"]
    assert logs[0]["problem"].startswith(f"CERT a with KEY b: {words} ")
    assert out_of_date(b"nothing") == ""
