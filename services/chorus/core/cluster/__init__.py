"""What Chorus decides about a Kubernetes cluster that it runs in."""
