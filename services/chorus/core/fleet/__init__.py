"""Who lives in the mesh: nodes, runners, leases, and the directory that coordinators read."""
