"""Grids of fine-tunings, and the runs with the best attacked accuracy at a given clean accuracy."""

from .frontier import Frontier as Frontier
from .frontier import frontier_of as frontier_of
from .grid import read_grid as read_grid
from .grid import run_grid as run_grid
from .grid import write_rows as write_rows
