"""The training hook: `FastClip` holds the spectral norms of a model's layers at a target after every optimizer step."""

from .composites import Composites as Composites
from .fastclip import FastClip as FastClip
