"""Relays scrapes to kubelets: an allow-list, two sides of HTTP, and the pool between them.

What the composition uses:

- `nodes.NodeTable.of(nodes, allow_loopback=, verify_node_name=)` makes the table of `model.Node` values,
  `nodes.Nodes` holds the current one: `replace(table)`, `forget()`, `known`.
- `route.allowed_paths(PROXY_PATHS)` checks the operator's choice (ValueError names what is not permitted).
- `tls.kubelet_context(ca_pem=, skip_verification=, client_certificate=)` makes the context for kubelets.
- `limits.Concurrency(per_node, overall)`, `relay.RelayTiming(longest_scrape=, …)`.
- `sockets.raise_file_limit(concurrency, max_callers, kept_connections)`, `sockets.listen(port)`.
- `server.ProxyServer(nodes=, paths=, token=, context=, concurrency=, inbound=, …)`: `await start(sockets)`,
  `notice_nodes()` after each `nodes.replace`, `await drain(grace)` or `await stop()`, `stats()`, an
  `outcomes.ProxyStats`.

Inside, `request` and `response` read HTTP without sockets, `downstream` and `upstream` are the two sides'
connections, `scrape` is one request between them, `relay` what all scrapes share.
"""
