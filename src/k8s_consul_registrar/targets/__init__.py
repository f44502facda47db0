"""Resolution of Pods and Nodes into targets: pure, used by the registrar and the proxy."""
