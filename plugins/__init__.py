"""One file for each host that robust_spectral plugs into, or a few whose names begin with the host's."""
