"""Fine-tuning of timm models into run folders: single runs, twins that differ in one setting, and recipes."""

from .process_group import ranks as ranks
from .recipes import config_of as config_of
from .recipes import read_recipe as read_recipe
from .recipes import read_toml as read_toml
from .recipes import recipe_names as recipe_names
from .training import finetune as finetune
from .twins import finetune_twins as finetune_twins
