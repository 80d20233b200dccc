"""Export of runs: for timm and the Hugging Face hub, or for RobustBench."""

from .export import to_hub as to_hub
from .export import to_robustbench as to_robustbench
