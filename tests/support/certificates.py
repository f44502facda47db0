"""Certificates as other tools make them, and handshakes in memory."""

import ssl
from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from typing import NamedTuple

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID

DAY = timedelta(days=1)


class Issued(NamedTuple):
    """A certificate and its key, in PEM."""

    certificate: bytes
    key: bytes


class PlainCA:
    """A CA as old tools make it: a basic constraint, and no key identifier in it or in what it signs."""

    def __init__(self, name: str = "plain CA") -> None:
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = _name(name)
        self.pem = self._sign(self._name, self._key, is_ca=True)

    def issue(self, *names: str, begins: timedelta = -DAY, ends: timedelta = DAY) -> Issued:
        """Issue a certificate for names and addresses, with validity relative to now."""
        key = ec.generate_private_key(ec.SECP256R1())
        certificate = self._sign(_name("leaf"), key, names, begins=begins, ends=ends)
        return Issued(certificate, _pem(key))

    def _sign(
        self,
        subject: x509.Name,
        key: ec.EllipticCurvePrivateKey,
        names: Iterable[str] = (),
        *,
        is_ca: bool = False,
        begins: timedelta = -DAY,
        ends: timedelta = DAY,
    ) -> bytes:
        now = datetime.now(UTC)
        builder = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self._name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now + begins)
            .not_valid_after(now + ends)
        )
        if is_ca:
            builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        else:
            builder = builder.add_extension(
                x509.SubjectAlternativeName(map(_general_name, names)), critical=False
            )
        return builder.sign(self._key, hashes.SHA256()).public_bytes(Encoding.PEM)


class SelfSigned(PlainCA):
    """Issues certificates that are signed by their own key and are no CA's."""

    def issue(self, *names: str, begins: timedelta = -DAY, ends: timedelta = DAY) -> Issued:
        """Issue one for names and addresses."""
        certificate = self._sign(self._name, self._key, names, begins=begins, ends=ends)
        return Issued(certificate, _pem(self._key))


def _pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def _name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


def _general_name(text: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ip_address(text))
    except ValueError:
        return x509.DNSName(text)


def shake_hands(client: ssl.SSLContext, server: ssl.SSLContext, name: str) -> None:
    """Shake hands in memory and exchange a byte each way; raises the client's or the server's error."""
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    asking = client.wrap_bio(to_client, to_server, server_hostname=name)
    answering = server.wrap_bio(to_server, to_client, server_side=True)
    done: set[int] = set()
    while len(done) < 2:
        for side, connection in enumerate((asking, answering)):
            try:
                connection.do_handshake()
                done.add(side)
            except ssl.SSLWantReadError:
                pass
    asking.write(b"?")
    answering.read(1)
    answering.write(b"!")
    asking.read(1)
