"""``python -m robust_spectral.evaluations`` is the command ``robust-spectral``."""

from .cli import main

main()
