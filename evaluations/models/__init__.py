"""Models of evaluations, which take pixels in [0, 1]: made from a configuration, a run folder or a specification."""

from .loading import adopt as adopt
from .loading import create_model as create_model
from .loading import input_in_words as input_in_words
from .loading import load_model as load_model
from .loading import load_run as load_run
from .loading import logits_of as logits_of
from .loading import restore as restore
from .loading import sized as sized
