"""The parts of the proxy's benchmark: kubelets, the contenders, their load, and the figures."""
