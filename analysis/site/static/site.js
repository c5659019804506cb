// Sorting and filtering of the tables that are in the page. Nothing is fetched.
"use strict";

const number = (text) => (text === "" ? NaN : Number(text));

function sortTable(button) {
  const header = button.closest("th");
  const table = header.closest("table");
  const column = [...header.parentElement.children].indexOf(header);
  const numeric = button.dataset.sort === "number";
  const now = header.getAttribute("aria-sort");
  const descending = now ? now === "ascending" : numeric && column > 0;
  for (const other of header.parentElement.children) other.removeAttribute("aria-sort");
  header.setAttribute("aria-sort", descending ? "descending" : "ascending");
  const body = table.tBodies[0];
  const keyed = [...body.rows].map((row) => [row.children[column].dataset.v ?? "", row]);
  keyed.sort(([a], [b]) => {
    if (!numeric) return descending ? b.localeCompare(a) : a.localeCompare(b);
    const x = number(a), y = number(b);
    if (Number.isNaN(x) || Number.isNaN(y)) return Number.isNaN(x) - Number.isNaN(y); // missing last
    return descending ? y - x : x - y;
  });
  body.append(...keyed.map(([, row]) => row));
}

function applyFilters(form) {
  const wanted = new FormData(form);
  const seeds = Number(wanted.get("seeds") || 0);
  let shown = 0, all = 0;
  for (const section of document.querySelectorAll("section.track")) {
    const ok = ["suite", "protocol", "environment", "tier"].every(
      (name) => !wanted.get(name) || wanted.get(name) === section.dataset[name]);
    let visible = 0;
    for (const row of section.querySelectorAll("tbody tr")) {
      const family = wanted.get("family");
      const pass = ok && (!family || family === row.dataset.family) && Number(row.dataset.seeds) >= seeds;
      row.hidden = !pass;
      visible += pass;
      all += 1;
    }
    section.hidden = !visible;
    shown += visible;
  }
  form.querySelector("output").textContent = `${shown} of ${all} rows`;
  const none = document.querySelector(".none");
  if (none) none.hidden = shown > 0;
  const kept = [...wanted].filter(([name, value]) => value && !(name === "seeds" && seeds === 0));
  const hash = new URLSearchParams(kept).toString();
  if (hash || location.hash.includes("=")) history.replaceState(null, "", `#${hash}`);
}

function readHash(form) {
  if (!location.hash.includes("=")) return;
  for (const [name, value] of new URLSearchParams(location.hash.slice(1))) {
    if (form.elements[name]) form.elements[name].value = value;
  }
}

document.addEventListener("click", (event) => {
  const button = event.target.closest("button[data-sort]");
  if (button) sortTable(button);
});

const form = document.querySelector("form.filters:not(.compare)");
if (form) {
  readHash(form);
  applyFilters(form);
  form.addEventListener("input", () => applyFilters(form));
  form.addEventListener("reset", () => setTimeout(() => applyFilters(form)));
  form.addEventListener("submit", (event) => event.preventDefault());
}
