// Tables: a click or Enter on a heading sorts, a field above a long one filters.
"use strict";

// "14.2 [13.9, 14.6]", ".890 ± .002", "1,024", "−.03" sort by their first number.
function keyOf(cell) {
  const text = cell.textContent.trim();
  const found = text.replace("−", "-").match(/^[+-]?(\d[\d,]*)?(\.\d+)?/)[0];
  const number = parseFloat(found.replace(/,/g, ""));
  return { number, text };
}

function compare(one, two) {
  const a = !isNaN(one.number), b = !isNaN(two.number);
  if (a && b) return one.number - two.number;
  if (a !== b) return a ? -1 : 1;
  return one.text.localeCompare(two.text);
}

function sortBy(table, heading) {
  const headings = [...heading.parentNode.children];
  const column = headings.indexOf(heading);
  const down = heading.getAttribute("aria-sort") === "ascending";
  headings.forEach((other) => other.setAttribute("aria-sort", "none"));
  heading.setAttribute("aria-sort", down ? "descending" : "ascending");
  const body = table.tBodies[0];
  const rows = [...body.rows].map((row) => ({ row, key: keyOf(row.cells[column]) }));
  rows.sort((a, b) => (down ? -1 : 1) * compare(a.key, b.key));
  rows.forEach(({ row }) => body.appendChild(row));
}

function filtered(table) {
  const field = document.createElement("input");
  field.className = "filter";
  field.type = "search";
  field.placeholder = "filter rows";
  field.setAttribute("aria-label", "filter rows");
  field.addEventListener("input", () => {
    const words = field.value.toLowerCase().split(/\s+/);
    for (const row of table.tBodies[0].rows) {
      const text = row.textContent.toLowerCase();
      row.hidden = !words.every((word) => text.includes(word));
    }
  });
  const before = table.closest(".table-wrapper") || table;
  before.parentNode.insertBefore(field, before);
}

document.addEventListener("DOMContentLoaded", () => {
  for (const table of document.querySelectorAll("article table:not(.maps)")) {
    if (!table.tHead || !table.tBodies.length) continue;
    if (table.tBodies[0].rows.length < 3) continue;
    for (const heading of table.tHead.rows[0].cells) {
      heading.setAttribute("aria-sort", "none");
      heading.tabIndex = 0;
      heading.addEventListener("click", () => sortBy(table, heading));
      heading.addEventListener("keydown", (event) => {
        if (event.key === "Enter") sortBy(table, heading);
      });
    }
    const navigates = [...table.tBodies[0].rows].every(
      (row) => row.cells[row.cells.length - 1].querySelector("a.internal:not(.number)"));
    if (table.tBodies[0].rows.length > 8 && !navigates) filtered(table);
  }
});
