"""The certificate authority of a mesh: what `chorus certs` makes, shows and checks."""
