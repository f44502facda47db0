"""The Kubernetes API: who we are there, what we ask, what its objects mean."""
