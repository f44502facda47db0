"""The proxy: relays scrapes of kubelets and Pods that are on its allow-list.

`server.ProxyServer` serves clients in this process, `workers.Workers` in several; both take a
`config.ProxyConfig`. `nodes.Nodes` and `routes.Pods` hold the upstreams that may be asked and are kept current
from outside. On the way of a scrape, `client_connection` reads it with `request`, `relay` finds its route,
`scrape` takes a place of `limits` and a connection of `relay.Pool`, and `upstream` follows the answer with `response`.
"""
