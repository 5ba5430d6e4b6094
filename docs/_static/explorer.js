// The explorer of attention: hover, focus or press a token, and see each head's weights.
"use strict";

function element(name, parent, text) {
  const made = document.createElement(name);
  if (text !== undefined) made.textContent = text;
  parent.appendChild(made);
  return made;
}

// One map: ticks [T], weights [L][N][T][T]; the table shows the rows of one query.
function drawMap(place, map) {
  place.textContent = "";
  const table = element("table", place);
  table.className = "maps";
  const top = element("tr", element("thead", table));
  const said = element("th", top, "asks:");
  const buttons = map.ticks.map((tick, at) => {
    const button = element("button", element("th", top), tick || "·");
    button.type = "button";
    button.setAttribute("aria-label", `token ${at + 1}: ${tick || "as before"}`);
    for (const event of ["mouseenter", "focus", "click"]) {
      button.addEventListener(event, () => show(at));
    }
    return button;
  });
  const body = element("tbody", table);
  const rows = [];
  map.weights.forEach((heads, layer) => heads.forEach((weights, head) => {
    const row = element("tr", body);
    element("th", row, `layer ${layer + 1}, head ${head + 1}`);
    rows.push({ weights, cells: map.ticks.map(() => element("td", row)) });
  }));
  const few = map.ticks.length <= 16;
  function show(query) {
    said.textContent = `asks: ${map.ticks[query] || "·"}`;
    buttons.forEach((button, at) => button.setAttribute("aria-pressed", at === query));
    for (const { weights, cells } of rows) {
      cells.forEach((cell, at) => {
        const weight = weights[query][at];
        cell.style.setProperty("--weight", weight);
        cell.classList.toggle("dark", weight > 0.5);
        cell.dataset.weight = weight;
        cell.title = `${map.ticks[at] || "·"}: ${weight}`;
        if (few) cell.textContent = weight.toFixed(2).replace(/^0/, "");
      });
    }
  }
  show(0);
}

document.addEventListener("DOMContentLoaded", () => {
  const data = document.getElementById("explorer-data");
  if (!data) return;
  const maps = JSON.parse(data.textContent);
  const whole = document.getElementById("explorer");
  const choice = element("select", whole);
  choice.setAttribute("aria-label", "map");
  maps.forEach((map, at) => { element("option", choice, map.name).value = at; });
  const place = element("div", whole);
  choice.addEventListener("change", () => drawMap(place, maps[choice.value]));
  drawMap(place, maps[0]);
});
