"""The Consul API: its wire forms, and the registries built on them."""
