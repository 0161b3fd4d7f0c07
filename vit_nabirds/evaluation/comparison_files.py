"""The tables of `compare` as a .csv file, and as a page that needs nothing but a browser."""

from pathlib import Path

import jinja2
import polars as pl

from vit_nabirds.data.foreign import without_formulas
from vit_nabirds.errors import visible
from vit_nabirds.evaluation.comparison import COLUMNS, Row, View, differing, in_words


def write_csv(rows: list[Row], file: Path) -> None:
    """A row for each run, with the ends of intervals in columns of their own."""
    fields = {name: [row.value(name) for row in rows] for name in differing(rows)}
    columns = {"run": [visible(str(row.run.workdir)) for row in rows]} | fields
    for name in (name for name in COLUMNS if name != "run" and any(row.value(name) is not None for row in rows)):
        columns[name] = [row.value(name) for row in rows]
        ends = [row.intervals.get(name) or (None, None) for row in rows]
        if any(end != (None, None) for end in ends):
            columns |= {f"{name}_low": [low for low, _ in ends], f"{name}_high": [high for _, high in ends]}
    columns["problem"] = [visible(row.run.problem) for row in rows]
    table = pl.DataFrame([_series(name, values) for name, values in columns.items()])
    table.with_columns(without_formulas(pl.col(pl.String))).write_csv(file)


def _series(name: str, values: list) -> pl.Series:
    """Numbers as numbers, anything else as text."""
    if all(value is None or type(value) in (int, float) for value in values):
        return pl.Series(name, values, pl.Int64 if any(type(value) is int for value in values) else pl.Float64)
    return pl.Series(name, ["" if value in (None, "") else in_words(value) for value in values], pl.String)


def page(views: list[View]) -> str:
    return (
        jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(PAGE).render(views=views)
    )


PAGE = """\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'">
<title>{{ views[0].rows | length }} runs compared</title>
<style>
:root { color-scheme: light dark; --line: light-dark(#ddd, #444); --dim: light-dark(#666, #aaa);
  --head: light-dark(#f4f4f2, #26282b); --page: light-dark(#fff, #17181a); }
body { margin: 0; padding: 1.2rem; background: var(--page); font: 15px/1.4 system-ui, sans-serif; }
h1 { font-size: 1.3rem; margin: 0 0 .8rem; }
h2 { font-size: 1.05rem; margin: 1.6rem 0 .6rem; }
p { margin: .4rem 0; color: var(--dim); overflow-wrap: anywhere; }
div { overflow-x: auto; max-width: 100%; border: 1px solid var(--line); border-radius: 6px; width: fit-content; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .4rem .7rem; text-align: right; vertical-align: top; white-space: nowrap; }
thead th { background: var(--head); padding: 0; }
tbody tr { border-top: 1px solid var(--line); }
th:first-child, td.text { text-align: left; }
tbody th { position: sticky; left: 0; background: var(--page); font-weight: 600; white-space: normal;
  overflow-wrap: anywhere; min-width: 9rem; max-width: 45vw; }
td.text { white-space: normal; overflow-wrap: anywhere; min-width: 8.5rem; max-width: 22rem; }
small { display: block; color: var(--dim); }
button { all: unset; box-sizing: border-box; width: 100%; padding: .4rem .7rem; cursor: pointer; font-weight: 600; }
button:focus-visible { outline: 2px solid Highlight; outline-offset: -2px; }
th[aria-sort="ascending"] button::after { content: " ▲"; }
th[aria-sort="descending"] button::after { content: " ▼"; }
</style>
</head>
<body>
<h1>{{ views[0].rows | length }} runs</h1>
{% for view in views %}
{% if view.title %}
<h2>{{ view.title }}</h2>
{% endif %}
<div tabindex="0">
<table>
<thead>
<tr>
{% for header in [view.first] + view.fields + view.figures %}
<th scope="col"><button type="button">{{ header }}</button></th>
{% endfor %}
</tr>
</thead>
<tbody>
{% for row in view.rows %}
<tr>
<th scope="row" data-value="{{ row[view.first].value }}">{{ row[view.first].text }}</th>
{% for header in view.fields + view.figures %}
{% set cell = row[header] %}
<td{% if cell.value is string %} class="text"{% endif %}
 data-value="{{ '' if cell.value is none else cell.value }}">{{ cell.text }}
{%- if cell.note %}<small>({{ cell.note }})</small>{% endif %}</td>
{% endfor %}
</tr>
{% endfor %}
</tbody>
</table>
</div>
{% for note in view.notes %}
<p>{{ note }}</p>
{% endfor %}
{% endfor %}
<script>
function compared(a, b, sign) {  // what has no value comes last
  if (a === "" || b === "") return (a === "") - (b === "");
  const numbers = a - b;
  return sign * (Number.isNaN(numbers) ? a.localeCompare(b, undefined, { numeric: true }) : numbers);
}
for (const button of document.querySelectorAll("thead button")) button.addEventListener("click", () => {
  const head = button.parentElement, column = head.cellIndex, body = head.closest("table").tBodies[0];
  const order = head.ariaSort === "descending" ? "ascending" : "descending";
  const value = row => row.cells[column].dataset.value;
  for (const other of head.parentElement.cells) other.removeAttribute("aria-sort");
  head.setAttribute("aria-sort", order);
  body.append(...[...body.rows].sort((a, b) => compared(value(a), value(b), order === "ascending" ? 1 : -1)));
});
</script>
</body>
</html>
"""
