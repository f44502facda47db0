"""Whether targets are served to collectors over HTTP, and to whom."""

from dataclasses import dataclass

from k8s_consul_registrar.settings.reader import Reader


@dataclass(frozen=True, slots=True)
class HttpSdSettings:
    """Where targets are served, and what callers must show; files are read by whoever serves."""

    port: int
    bearer_token_file: str
    cert_file: str
    key_file: str
    client_ca_file: str


def read_state_file(reader: Reader) -> str:
    """Read where targets are saved for the next start, empty where they are not.

    Without a port to serve them on, the file still tells the brake which settings an earlier run had.
    """
    path = reader.text("HTTP_SD_STATE_FILE")
    if "\0" in path or path.endswith("/"):
        reader.problem("HTTP_SD_STATE_FILE", f"{path!r} is no path of a file")
    return path


def read_http_sd(reader: Reader) -> HttpSdSettings | None:
    """Read what serving targets needs, None where they are not served; mistakes in it count all the same."""
    settings = HttpSdSettings(
        port=reader.integer("HTTP_SD_PORT", 0, 65535) if reader.is_set("HTTP_SD_PORT") else 0,
        bearer_token_file=reader.text("HTTP_SD_BEARER_TOKEN_FILE"),
        cert_file=reader.text("HTTP_SD_TLS_CERT_FILE"),
        key_file=reader.text("HTTP_SD_TLS_KEY_FILE"),
        client_ca_file=reader.text("HTTP_SD_TLS_CLIENT_CA_FILE"),
    )
    if bool(settings.cert_file) != bool(settings.key_file):
        reader.problem("HTTP_SD_TLS_CERT_FILE", "and HTTP_SD_TLS_KEY_FILE go together")
    if settings.client_ca_file and not settings.cert_file:
        reader.problem("HTTP_SD_TLS_CLIENT_CA_FILE", "needs HTTP_SD_TLS_CERT_FILE: it is part of TLS")
    return settings if reader.is_set("HTTP_SD_PORT") else None
