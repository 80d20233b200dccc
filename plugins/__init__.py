"""Integrations with other packages (hosts), one or several modules for each, and the defences and attacks available by name."""
