// Two methods of one table side by side. Data are script files, loaded when a table is chosen.
"use strict";

(() => {
  const form = document.querySelector("form.compare");
  const target = document.getElementById("comparison");
  const fields = form.elements;

  function element(name, attributes = {}, ...children) {
    const made = document.createElement(name);
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
    made.append(...children);
    return made;
  }

  const shown = ([value, low, high]) =>
    low === null ? value.toFixed(1) : `${value.toFixed(1)} [${low.toFixed(1)}, ${high.toFixed(1)}]`;

  function load(slug, then) {
    if (window.comparisons?.[slug]) return then(window.comparisons[slug]);
    const script = element("script", { src: `data/compare-${slug}.js` });
    script.addEventListener("load", () => then(window.comparisons[slug]));
    script.addEventListener("error", () => target.replaceChildren(`data/compare-${slug}.js is missing`));
    document.head.append(script);
  }

  function chooseMethods(data) {
    for (const [field, wanted] of [[fields.a, 0], [fields.b, 1]]) {
      const names = data.methods.map((method, index) => element("option", { value: index }, method.name));
      field.replaceChildren(...names);
      field.value = Math.min(wanted, data.methods.length - 1);
    }
    draw(data);
  }

  function verdict(data, a, b) {
    const forward = data.pairs[`${a},${b}`], backward = data.pairs[`${b},${a}`];
    if (!forward && !backward) {
      return "No probability of improvement: it needs two methods that are complete on all tasks with references.";
    }
    let [value, low, high, p] = forward ?? backward;
    if (!forward) [value, low, high] = [1 - value, high === null ? null : 1 - high, low === null ? null : 1 - low];
    const interval = low === null ? " (no interval below 3 seeds)" : ` [${low.toFixed(2)}, ${high.toFixed(2)}]`;
    const [x, y] = [data.methods[a].name, data.methods[b].name];
    return `P(${x} > ${y}) = ${value.toFixed(2)}${interval}: the chance that a run of ${x} scores above a ` +
      `run of ${y}, averaged over tasks. Corrected p-value ${p}: ` +
      (p <= data.alpha ? "significantly different." : "not significantly different.");
  }

  function row(task, ours, theirs, reach) {
    const difference = ours[0] - theirs[0];
    const width = 50 * Math.abs(difference) / reach;
    const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
    svg.setAttribute("viewBox", "0 0 100 12");
    svg.setAttribute("class", "diff");
    svg.setAttribute("aria-hidden", "true");
    svg.innerHTML = `<line class="axis" x1="50" x2="50" y1="0" y2="12"/>` +
      `<rect class="band" x="${difference < 0 ? 50 - width : 50}" y="2" width="${width}" height="8"/>`;
    const cell = (values) => element("td", { class: "num" },
      element("a", { href: `cells/${values[4]}.html` }, shown(values)), ` (${values[3]})`);
    return element("tr", {}, element("th", { scope: "row" }, task.name), cell(ours), cell(theirs),
      element("td", { class: "num" }, `${difference > 0 ? "+" : ""}${difference.toFixed(1)}`),
      element("td", {}, svg), element("td", {}, task.unit));
  }

  function draw(data) {
    const [a, b] = [Number(fields.a.value), Number(fields.b.value)];
    if (a === b) return target.replaceChildren(element("p", {}, "Choose two different methods."));
    const [ours, theirs] = [data.methods[a], data.methods[b]];
    const common = data.tasks.map((task, place) => [task, ours.cells[place], theirs.cells[place]]);
    const both = common.filter(([, x, y]) => x && y);
    // Returns and scores have their own units, so each has its own scale.
    const reach = (unit) => Math.max(1e-9, ...both.filter(([task]) => task.unit === unit)
      .map(([, x, y]) => Math.abs(x[0] - y[0])));
    const head = ["Task", `${ours.name} (seeds)`, `${theirs.name} (seeds)`, "Difference", "", "Unit"]
      .map((text, place) => element("th", { scope: "col", class: place && place < 4 ? "num" : "" }, text));
    const table = element("table", { class: "board" }, element("thead", {}, element("tr", {}, ...head)),
      element("tbody", {}, ...both.map(([task, x, y]) => row(task, x, y, reach(task.unit)))));
    const parts = [element("p", { class: "lead" }, verdict(data, a, b)),
      element("div", { class: "scroll", role: "region", tabindex: "0", "aria-label": "Differences by task" }, table)];
    const left = common.filter(([, x, y]) => !x || !y).map(([task]) => task.name);
    if (left.length) parts.push(element("p", {}, `Left out, because one of the two lacks scores: ${left.join(", ")}.`));
    parts.push(element("p", { class: "hint" }, "Means over seeds with their 95 % bootstrap intervals."));
    target.replaceChildren(...parts);
  }

  fields.track.addEventListener("change", () => load(fields.track.value, chooseMethods));
  for (const field of [fields.a, fields.b]) {
    field.addEventListener("change", () => load(fields.track.value, draw));
  }
  form.addEventListener("submit", (event) => event.preventDefault());
  load(fields.track.value, chooseMethods);
})();
