"""The comparison of runs as one HTML file that needs no network and no script."""

from jinja2 import Environment, PackageLoader, StrictUndefined

from job.compare.models import Compared
from job.compare.text import rows_of
from job.report.page import legible


def render_page(compared: Compared) -> str:
    """The page; the same comparison gives the same text."""
    environment = Environment(
        loader=PackageLoader("job.compare"),
        autoescape=True,
        finalize=lambda value: legible(value) if isinstance(value, str) else value,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    return environment.get_template("compare.html.j2").render(
        compared=compared, tests=rows_of(compared)
    )
