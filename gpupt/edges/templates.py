"""The gate to jinja2: renders a file of templates/; an undefined name is an error."""

from __future__ import annotations

from functools import cache

import jinja2

from gpupt.edges.resources import resource_folder
from gpupt.errors import Failed


@cache
def environment() -> jinja2.Environment:
    """Values are escaped in ``.xml.j2`` and ``.html.j2``, and nowhere else."""
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(resource_folder("templates")),
        undefined=jinja2.StrictUndefined,
        autoescape=lambda name: name is not None and name.endswith((".xml.j2", ".html.j2")),
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )


def render_template(name: str, /, **values: object) -> str:
    """The text of ``templates/NAME`` with these values in it; raises Failed."""
    try:
        return environment().get_template(name).render(values)
    except jinja2.TemplateNotFound as error:
        raise Failed(f"there is no template {error.name}") from None
    except jinja2.TemplateError as error:
        raise Failed(f"template {name} cannot be rendered", details=str(error)) from None
