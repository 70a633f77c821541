"""The registry: keeps a lease for every live runner, and tells whoever watches."""
