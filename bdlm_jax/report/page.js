"use strict";
// Tables sort by a column: numbers by their first number, empty cells last, what is pinned (tfoot) stays below.
const number = (text) =>
  parseFloat(text.replace(/[,\s]|^[<≤=±]/g, "").replace("−", "-")) * (/min$/.test(text) ? 60 : 1);
const compare = (a, b, sign, numeric) => {
  if (!a || !b) return !a - !b;
  return sign * (numeric ? number(a) - number(b) : a.localeCompare(b));
};
for (const table of document.querySelectorAll("table.sorts")) {
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => {
    const button = document.createElement("button");
    button.append(...head.childNodes);
    head.append(button);
    head.setAttribute("aria-sort", "none");
    button.addEventListener("click", () => {
      const numeric = head.classList.contains("number"), first = numeric ? "descending" : "ascending";
      const other = first === "ascending" ? "descending" : "ascending";
      const order = head.getAttribute("aria-sort") === first ? other : first;
      heads.forEach((each) => each.setAttribute("aria-sort", each === head ? order : "none"));
      const sign = order === "ascending" ? 1 : -1, text = (row) => row.cells[column].textContent.trim();
      const rows = [...table.tBodies[0].rows].sort((a, b) => compare(text(a), text(b), sign, numeric));
      table.tBodies[0].append(...rows);
    });
  });
}
// A pointer on the map names the nearest item and rings it in every panel.
for (const map of document.querySelectorAll(".itemmap")) {
  const { titles, points } = JSON.parse(map.querySelector("script").textContent);
  const panels = [...map.querySelectorAll("svg.map")], named = map.querySelector(".named");
  panels.forEach((panel, n) => {
    const find = (event) => {
      const box = panel.getBoundingClientRect(), scale = panel.viewBox.baseVal.width / box.width;
      const x = (event.clientX - box.left) * scale, y = (event.clientY - box.top) * scale;
      let best = -1, least = 400;
      for (let i = 0; i < titles.length; i++) {
        const away = (points[n][2 * i] - x) ** 2 + (points[n][2 * i + 1] - y) ** 2;
        if (away < least) [best, least] = [i, away];
      }
      if (best < 0) return;
      named.textContent = titles[best];
      panels.forEach((other, m) => {
        const ring = other.querySelector(".found");
        ring.setAttribute("cx", points[m][2 * best]);
        ring.setAttribute("cy", points[m][2 * best + 1]);
      });
    };
    panel.addEventListener("pointermove", find);
    panel.addEventListener("pointerdown", find);
  });
}
