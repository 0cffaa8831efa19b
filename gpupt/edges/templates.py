"""The gate to jinja2: renders a file of templates/; an undefined name is an error."""

from __future__ import annotations

from dataclasses import fields, is_dataclass
from functools import cache

import jinja2

from gpupt.edges.resources import resource_folder
from gpupt.errors import Failed


@cache
def environment() -> jinja2.Environment:
    """Every value is escaped, as XML and HTML need it."""
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(resource_folder("templates")),
        undefined=jinja2.StrictUndefined,
        autoescape=True,
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


def render_view(name: str, view: object) -> str:
    """The text of ``templates/NAME`` filled from a dataclass's fields; raises Failed."""
    if not is_dataclass(view) or isinstance(view, type):
        raise TypeError(f"{view!r} is not a value to render")
    # One level only: nested values keep their properties.
    return render_template(name, **{part.name: getattr(view, part.name) for part in fields(view)})
