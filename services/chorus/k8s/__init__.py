"""Chorus in Kubernetes: the manifests, what renders and examines them, and what runs beside the services there."""
