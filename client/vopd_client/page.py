"""Pages of one file: no script, nothing from elsewhere, everything that is filled in escaped."""

from __future__ import annotations

from typing import Any


def render_template(name: str, values: dict[str, Any]) -> str:
    """A template beside this module; it fails for a name that `values` does not have."""
    import jinja2

    templates = jinja2.Environment(
        loader=jinja2.PackageLoader("vopd_client", package_path=""),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return templates.get_template(name).render(values)
