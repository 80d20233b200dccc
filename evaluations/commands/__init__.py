"""The command line: spectrum, finetune, grid, evaluate, report, leaderboard, export."""

from .cli import main as main
