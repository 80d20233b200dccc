"""Data sets of images by name, from packages or folders on this machine, and IDX files."""

from .image_data import ImageData as ImageData
from .image_data import check_pixels as check_pixels
from .image_data import data_hash as data_hash
from .image_data import load_data as load_data
from .image_data import stack as stack
from .sample_order import FIRST as FIRST
from .sample_order import PROPORTIONAL as PROPORTIONAL
from .sample_order import order_record as order_record
from .sample_order import proportional_order as proportional_order
