"""Certificates around single images, from bounds of how far a network is from its linearisation in a ball.

`certify` bounds the margins at a radius, `local_radius` finds the largest radius.
"""

from .prover import certify as certify
from .prover import largest_radii as largest_radii
from .prover import local_radius as local_radius
from .refinement import refined_bound as refined_bound
from .results import Certificates as Certificates
from .results import Radii as Radii
