"""The report of an evaluated run: tables, charts and one self-contained page."""

from .charts import accuracies as accuracies
from .charts import layer_norms as layer_norms
from .charts import layer_spectra as layer_spectra
from .charts import robustness as robustness
from .example_images import examples as examples
from .example_images import uri as uri
from .pages import render as render
from .report import print_report as print_report
from .report import write_report as write_report
