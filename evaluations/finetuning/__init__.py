"""Fine-tuning of timm models into run folders: single runs, and twins that differ in one setting."""

from .process_group import ranks as ranks
from .training import finetune as finetune
from .twins import finetune_twins as finetune_twins
