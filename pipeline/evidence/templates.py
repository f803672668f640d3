"""The templates beside this file, filled."""

from collections.abc import Callable
from pathlib import Path

import jinja2


def fill(template: str, values: dict, **filters: Callable) -> str:
    """A template's text. Raises jinja2.UndefinedError where it names what is not among the values."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), trim_blocks=True, lstrip_blocks=True,
        autoescape=jinja2.select_autoescape(["html.jinja"]), undefined=jinja2.StrictUndefined,
    )  # fmt: skip
    environment.filters.update(filters)
    return environment.get_template(template).render(values)
