"""TLS towards an API server: what is trusted, and the certificate shown, as an ssl context."""

import os
import re
import ssl
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from k8s_consul_registrar.errors import AccessError

_CERTIFICATE = re.compile(r"-----BEGIN CERTIFICATE-----[^-]+-----END CERTIFICATE-----")


@dataclass(frozen=True, slots=True)
class KeyPair:
    """A client certificate (with its chain) and its key, both PEM; `origin` names both in error texts."""

    certificate: bytes = field(repr=False)
    key: bytes = field(repr=False)
    origin: str = ""


@dataclass(frozen=True, slots=True)
class Trust:
    """Whom we believe to be the API server; an empty `ca` is the system's own list.

    `ca_setting` names where the CA came from, for error texts.
    """

    ca: str = field(default="", repr=False)
    is_verified: bool = True
    ca_setting: str = ""

    def ssl_context(self, pair: KeyPair | None = None) -> ssl.SSLContext:
        """Build the context of this trust that shows `pair`.

        Raises AccessError, naming the setting, where a certificate or key cannot be used.
        """
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        # Go, which everyone's cluster certificates are made for, accepts an intermediate as an anchor and CAs
        # without key identifiers; Python 3.13 turns the strict check on by default elsewhere.
        context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
        context.verify_flags &= ~ssl.VERIFY_X509_STRICT
        if not self.is_verified:
            context.check_hostname = False
            context.verify_mode = ssl.CERT_NONE
        elif self.ca:
            try:
                context.load_verify_locations(cadata=self.ca)
            except ssl.SSLError as error:
                raise AccessError(
                    f"{self.ca_setting}: not a usable CA certificate: {_reason(error)}"
                ) from None
        else:
            context.load_default_certs()
        if pair is not None:
            show(context, pair)
        return context


def certificates(text: bytes, setting: str) -> str:
    """Return the PEM certificates of a bundle, without the comments between them.

    Raises AccessError where there is none.
    """
    found = _CERTIFICATE.findall(text.decode("ascii", errors="replace"))
    if not found:
        raise AccessError(f"{setting}: holds no PEM certificate")
    return "\n".join(found) + "\n"


def trust_in(ca: bytes | None, setting: str) -> Trust:
    """Return the trust in the certificates of a bundle, in the system's list without one.

    Raises AccessError, naming the setting, where they cannot be used.
    """
    if ca is None:
        return Trust(ca_setting=setting)
    trust = Trust(ca=certificates(ca, setting), ca_setting=setting)
    trust.ssl_context()
    return trust


def checked(pair: KeyPair) -> KeyPair:
    """Return a pair that can be shown; raises AccessError, naming its origin, for another."""
    show(ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT), pair)
    return pair


def show(context: ssl.SSLContext, pair: KeyPair) -> None:
    """Have a context show a client certificate; raises AccessError, naming its origin, where it cannot."""
    try:
        with _private_file(pair.certificate + b"\n" + pair.key) as path:
            # The password keeps OpenSSL from asking on the terminal for an encrypted key's.
            context.load_cert_chain(path, password="")
    except ssl.SSLError as error:
        problem = _reason(error)
        raise AccessError(
            f"{pair.origin}: the client certificate and key cannot be used: {problem} "
            "(both PEM, the key of this certificate and not encrypted)"
        ) from None


@contextmanager
def _private_file(content: bytes) -> Iterator[str]:
    """Hold `content` in a file that nobody else can open and that is gone afterwards.

    OpenSSL loads a key from a path alone. Where the kernel has them, a file in memory spares both the disk
    and the need of a writable one.
    """
    if hasattr(os, "memfd_create"):
        descriptor = os.memfd_create("client-key", os.MFD_CLOEXEC)
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            yield f"/proc/self/fd/{descriptor}"
    else:
        with tempfile.NamedTemporaryFile() as named:
            named.write(content)
            named.flush()
            yield named.name


def _reason(error: ssl.SSLError) -> str:
    """Return OpenSSL's own word for it, without the place in Python's source."""
    return (error.reason or "unknown").lower().replace("_", " ")
