"""A static site that ranks the models of many evaluated runs."""

from .site import build as build
