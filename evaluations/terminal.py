"""What the commands say: results on standard output, everything else on standard error."""

from __future__ import annotations

from rich.console import Console

console = Console()
errors = Console(stderr=True)
