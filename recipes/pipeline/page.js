// Cards in another order at a button, tables at a column's head. Without scripts the page is as it was written.
"use strict";
for (const bar of document.querySelectorAll(".sort")) {
  const cards = document.getElementById(bar.dataset.of), asWritten = [...cards.children];
  bar.hidden = false;
  bar.addEventListener("click", (event) => {
    const button = event.target.closest("button");
    if (!button) return;
    for (const other of bar.querySelectorAll("button")) other.setAttribute("aria-pressed", other === button);
    const sign = Number(button.dataset.sign), score = (card) => card.dataset.iou === "" ? NaN : Number(card.dataset.iou);
    const order = [...asWritten];
    if (sign) order.sort((a, b) => isNaN(score(a)) - isNaN(score(b)) || sign * (score(a) - score(b)) || 0);
    cards.append(...order);
  });
}
for (const head of document.querySelectorAll("table.sortable thead th")) {
  const seconds = { h: 3600, min: 60, s: 1 };
  const number = (row) => {
    const text = row.cells[head.cellIndex].textContent, parts = [...text.matchAll(/([\d.]+) (h|min|s)\b/g)];
    return parts.length ? parts.reduce((sum, [, n, unit]) => sum + n * seconds[unit], 0) : parseFloat(text.replace(/,/g, ""));
  };
  const words = (row) => row.cells[head.cellIndex].textContent.trim();
  head.dataset.sorts = "";
  head.tabIndex = 0;
  const sort = () => {
    const body = head.closest("table").tBodies[0], rows = [...body.rows].filter((row) => !row.classList.contains("mean"));
    const first = head.cellIndex ? "descending" : "ascending", second = head.cellIndex ? "ascending" : "descending";
    const way = head.getAttribute("aria-sort") === first ? second : first, sign = way === "ascending" ? 1 : -1;
    for (const other of head.parentNode.cells) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", way);
    const numbers = rows.some((row) => !isNaN(number(row)));
    rows.sort((a, b) => numbers
      ? isNaN(number(a)) - isNaN(number(b)) || sign * (number(a) - number(b)) || 0
      : sign * words(a).localeCompare(words(b)));
    body.prepend(...rows);
  };
  head.addEventListener("click", sort);
  head.addEventListener("keydown", (event) => { if (event.key === "Enter") sort(); });
}
