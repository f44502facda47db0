"""Relays scrapes to kubelets and Pods: an allow-list, two sides of HTTP, and the pool between them.

What the composition uses:

- `nodes.NodeTable.of(nodes, allow_loopback=, verify_node_name=)` makes the table of `model.Node` values,
  `nodes.Nodes` holds the current one: `replace(table)`, `forget()`, `known`.
- `route.allowed_paths(PROXY_PATHS)` checks the operator's choice (ValueError names what is not permitted).
- `token` and `context` give what kubelets are shown and verified by; `inbound` and `tls` are what clients must show.
- `pod_route.Pods` holds the Pods that may be scraped: `put(namespace, name, proxied_pod(pod, prefix))` one at a time,
  `known`, `forget()`; `peers.PodAccess(pods, context, concurrency)` says how they are reached.
- `limits.Concurrency(per_node, overall)`, `relay.RelayTiming(longest_scrape=, …)`.
- `sockets.raise_file_limit(concurrency, max_callers, kept_connections, kinds=)`, `sockets.listen(port)`.
- `server.ProxyServer(nodes=, paths=, token=, context=, concurrency=, inbound=, tls=, pods=, …)`: `await start(sockets)`,
  `notice_nodes()` after each `nodes.replace`, `await drain(grace)` or `await stop()`, `stats()`, an
  `outcomes.ProxyStats`, and `failures()` for `failing.failing_report`.

Inside, `request` and `response` read HTTP without sockets, `downstream` and `upstream` are the two sides'
connections, `scrape` is one request between them, `relay` what all scrapes share, `peers` what those of one kind share;
`secure` is a caller's connection over TLS.
"""
