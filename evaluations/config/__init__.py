"""The configuration of a fine-tuning run, and recipes, which are configurations as TOML files; needs neither timm nor ART."""

from .finetune_config import MOVES as MOVES
from .finetune_config import FinetuneConfig as FinetuneConfig
from .finetune_config import numbers as numbers
from .recipes import config_of as config_of
from .recipes import read_recipe as read_recipe
from .recipes import read_toml as read_toml
from .recipes import recipe_names as recipe_names
