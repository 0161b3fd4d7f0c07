"""Pages of one file: no request to a network, and no script but the one that sorts tables."""

import base64
import functools
import hashlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from vit_nabirds.errors import visible
from vit_nabirds.files import written_whole
from vit_nabirds.runs import quantities

TEMPLATES = Path(__file__).parent / "templates"


def write_page(file: Path, template: str, sorts: bool = True, **content: Any) -> None:
    """Whole or not at all. What is iterated over may be lazy: the page is written as it is made."""
    script = (TEMPLATES / "sort.js").read_text() if sorts else ""
    # The browser runs this script alone, whatever a species is called.
    script_hash = "sha256-" + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    own = {"style": Markup((TEMPLATES / "style.css").read_text()), "script": Markup(script), "script_hash": script_hash}
    with written_whole(file) as partial, partial.open("w", encoding="utf-8", errors="replace") as opened:
        opened.writelines(_pieces(template, own | content))


def _pieces(template: str, content: dict) -> Iterator[str]:
    stream = _environment().get_template(template).stream(content)
    stream.enable_buffering(100)
    return stream


@functools.cache
def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        finalize=_shown,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"percent": percent, "count": count, "decimals": decimals, "moment": moment}
    return environment


def _shown(value: Any) -> Any:
    """Text of others without controls and marks of direction; what is not there as a dash."""
    return "–" if value is None else visible(value) if type(value) is str else value


def percent(share: float | None, digits: int = 1) -> str | None:
    return None if share is None else quantities.percent(share, digits)


def count(number: float | None) -> str | None:
    return None if number is None else f"{number:,.0f}"


def decimals(number: float | None, digits: int = 3) -> str | None:
    return None if number is None else f"{number:.{digits}f}" if abs(number) < 1e6 else f"{number:.3g}"


def moment(seconds: float) -> str:
    return time.strftime("%-d %B %Y, %H:%M UTC", time.gmtime(seconds))
