"""What the proxy's benchmark is made of: kubelets, the contenders, their load, and the figures."""
