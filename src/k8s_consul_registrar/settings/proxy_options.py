"""The settings that say whom the proxy lets ask, who it is to kubelets, and whether Pods go through it."""

from k8s_consul_registrar.settings.option import PROXY_ONLY, REGISTRAR_ONLY, Option

INBOUND_OPTIONS: tuple[Option, ...] = (
    Option(
        "TLS_CERT_FILE",
        "file with the proxy's own certificate and its chain: callers must then use https",
        PROXY_ONLY,
    ),
    Option(
        "TLS_KEY_FILE", "file with the key of that certificate; all three are read as they change", PROXY_ONLY
    ),
    Option(
        "TLS_CLIENT_CA_FILE",
        "file with the authorities one of which must have signed a caller's certificate",
        PROXY_ONLY,
    ),
)

IDENTITY_OPTIONS: tuple[Option, ...] = (
    Option(
        "KUBELET_CLIENT_CERT_FILE",
        "file with a certificate to show kubelets instead of a token, read again as it changes",
        PROXY_ONLY,
    ),
    Option("KUBELET_CLIENT_KEY_FILE", "file with the key of that certificate", PROXY_ONLY),
)

POD_OPTIONS: tuple[Option, ...] = (
    Option(
        "PROXY_PODS",
        "true: annotated Pods are relayed too, at /api/v1/namespaces/<namespace>/pods/<pod>/metrics; needs "
        "PROXY_BEARER_TOKEN_FILE or TLS_CLIENT_CA_FILE, and the permission to list and watch pods",
        PROXY_ONLY,
        "false",
    ),
    Option(
        "PROXY_PODS_ANONYMOUS",
        "true: they are relayed to whoever asks, so that every author of a Pod can open a port of it to the outside",
        PROXY_ONLY,
        "false",
    ),
    Option(
        "POD_CA_FILE",
        "file with the authorities that sign certificates of Pods scraped by https; default the system's",
        PROXY_ONLY,
    ),
    Option("POD_INSECURE_SKIP_TLS_VERIFY", "true: accept any certificate of a Pod", PROXY_ONLY, "false"),
)

REACHING_OPTIONS: tuple[Option, ...] = (
    Option(
        "POD_ADDRESS",
        "where Prometheus scrapes Pods: 'pod', at their own IP, or 'proxy', through the proxy at their node "
        "(its PROXY_PODS)",
        REGISTRAR_ONLY,
        "pod",
    ),
    Option(
        "PROXY_SCHEME",
        "how Prometheus speaks to the proxy: http, or https where it has TLS_CERT_FILE",
        REGISTRAR_ONLY,
        "http",
    ),
)
