"""The training hook: `FastClip` clips the spectral norms of a model's layers to a target after every optimizer step."""

from .composites import Composites as Composites
from .fastclip import FastClip as FastClip
