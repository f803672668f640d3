"""Fill the templates beside this file."""

from collections.abc import Callable
from pathlib import Path

import jinja2


def fill(template: str, values: dict, **filters: Callable) -> str:
    """The text of a template. Raises jinja2.UndefinedError if it names a value that is not given."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), trim_blocks=True, lstrip_blocks=True,
        autoescape=jinja2.select_autoescape(["html.jinja"]), undefined=jinja2.StrictUndefined,
    )  # fmt: skip
    environment.filters.update(filters)
    return environment.get_template(template).render(values)
