"""Evaluation of a run: units of work are planned, done by an engine, checked, and merged into the figures of a report."""

from .engine import make_engine as make_engine
from .engine import run_units as run_units
from .evaluated_images import ordered as ordered
from .evaluation import check_options as check_options
from .evaluation import evaluate as evaluate
from .evaluation import planned_work as planned_work
from .gates import Gate as Gate
from .gates import check_attacks as check_attacks
from .gates import check_model as check_model
from .radii import certified_radii as certified_radii
from .work import CHECKS as CHECKS
from .work import DEFAULT_ATTACKS as DEFAULT_ATTACKS
from .work import AttackPlan as AttackPlan
from .work import images_to_certify as images_to_certify
from .work import open_subject as open_subject
from .work import plan_work as plan_work
from .work import sizes as sizes
