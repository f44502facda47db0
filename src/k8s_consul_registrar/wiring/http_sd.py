"""Composition of what serves targets to collectors."""

from collections.abc import Callable
from pathlib import Path

from k8s_consul_registrar.admin.documents import Documents
from k8s_consul_registrar.admin.http_sd import HttpSdServer, no_saved_targets
from k8s_consul_registrar.admin.view import SavedTargets, TargetsView
from k8s_consul_registrar.rotating import BearerTokens, Rotating, bearer_tokens
from k8s_consul_registrar.settings.registrar import HttpSdSettings
from k8s_consul_registrar.tls import ServerTls, server_tls


def http_sd_server(
    settings: HttpSdSettings,
    view: TargetsView,
    saved: Callable[[], SavedTargets | None] = no_saved_targets,
    documents: Documents | None = None,
) -> HttpSdServer:
    """Build what serves targets to collectors; raises an `AccessError` naming the setting at fault."""
    return HttpSdServer(
        port=settings.port,
        view=view,
        saved=saved,
        documents=documents,
        bearer=http_sd_bearer(settings) if settings.bearer_token_file else None,
        tls=http_sd_tls(settings) if settings.cert_file else None,
    )


def http_sd_bearer(settings: HttpSdSettings) -> Rotating[BearerTokens]:
    """Read the token of collectors; raises an `AccessError`."""
    return bearer_tokens(Path(settings.bearer_token_file), "HTTP_SD_BEARER_TOKEN_FILE")


def http_sd_tls(settings: HttpSdSettings) -> ServerTls:
    """Read the files of TLS towards collectors; raises an `AccessError`."""
    return server_tls(settings.cert_file, settings.key_file, settings.client_ca_file, setting="HTTP_SD_TLS")
