"""Pages rendered from templates.

Templates escape all values and raise an error at an unknown name, so that no page shows a missing value as if it were a
figure.
"""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from ..wording import NORM_NAMES, count, duration, images_in_words, interval, local_in_words, number, percent, size, verdict


def render(template: str, **values: Any) -> str:
    """Render a template of this package."""
    return _environment().get_template(template).render(norm_names=NORM_NAMES, **values)


def breakable(text: str) -> Markup:
    """A name that may be broken after its separators, where a column is narrow."""
    return Markup(re.sub(r"([_/.-])(?=\w)", r"\1<wbr>", str(escape(text))))


@lru_cache(maxsize=1)
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("robust_spectral.evaluations"), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    filters = (number, percent, interval, verdict, size, duration, count, breakable, local_in_words, images_in_words)
    environment.filters.update({function.__name__: function for function in filters})
    return environment
