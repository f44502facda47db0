"""An in-process Kubernetes API, kubelets and Consul for the demo, tests and benchmarks."""

from k8s_consul_registrar.sandbox.access import Rule
from k8s_consul_registrar.sandbox.api_errors import ApiError
from k8s_consul_registrar.sandbox.certificates import KubeletCertificate
from k8s_consul_registrar.sandbox.consul_release import ConsulOptions
from k8s_consul_registrar.sandbox.sandbox import Sandbox

__all__ = ["ApiError", "ConsulOptions", "KubeletCertificate", "Rule", "Sandbox"]
