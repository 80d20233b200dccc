"""One file for each host that robust_spectral plugs into."""
