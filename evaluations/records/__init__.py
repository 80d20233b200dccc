"""Records of an evaluation, one file for each unit of work, and the figures computed from their verdicts."""

from .accuracy_figures import SCHEMA as SCHEMA
from .accuracy_figures import certified_at as certified_at
from .accuracy_figures import figures as figures
from .accuracy_figures import judged_proof as judged_proof
from .distances import falls_at as falls_at
from .network_checks import NETWORK_CHECKS as NETWORK_CHECKS
from .network_checks import bound_gate as bound_gate
from .network_checks import failed_proofs as failed_proofs
from .network_checks import graph_gate as graph_gate
from .units import FOLDER as FOLDER
from .units import Record as Record
from .units import Unit as Unit
from .units import read_record as read_record
from .units import read_told as read_told
from .units import recorded_orders as recorded_orders
from .units import refuse_foreign as refuse_foreign
from .units import seconds_of as seconds_of
from .units import write_record as write_record
