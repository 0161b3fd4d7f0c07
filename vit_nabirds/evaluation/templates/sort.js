// Sorts a table by the column whose heading is pressed: numbers by their data-value, where there is one, text by what
// is shown.
for (const table of document.querySelectorAll("table.sortable")) {
  const headings = [...table.tHead.rows[0].cells];
  headings.forEach((heading, column) => {
    const button = document.createElement("button");
    button.append(...heading.childNodes);
    heading.append(button);
    button.addEventListener("click", () => {
      const numeric = heading.classList.contains("n");
      const first = numeric ? "descending" : "ascending";
      const order = heading.ariaSort === first ? (numeric ? "ascending" : "descending") : first;
      headings.forEach((other) => other.removeAttribute("aria-sort"));
      heading.ariaSort = order;
      const key = (row) => {
        const cell = row.cells[column];
        return !numeric ? cell.textContent.trim() : cell.dataset.value === undefined ? null : Number(cell.dataset.value);
      };
      const compare = numeric ? (a, b) => a - b : (a, b) => a.localeCompare(b);
      const sign = order === "ascending" ? 1 : -1;
      const rows = [...table.tBodies[0].rows].map((row) => [key(row), row]);
      rows.sort(([a], [b]) => (a === null || b === null ? (a === null) - (b === null) : sign * compare(a, b)));
      table.tBodies[0].append(...rows.map((pair) => pair[1]));
    });
  });
}
