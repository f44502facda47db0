"""Keeps Consul equal to the cluster: the loop, and the pure decisions it carries out."""
