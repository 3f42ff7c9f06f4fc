// What the page of a report does beyond its tables and pictures: it sorts the tables, compares two models at the same
// seed, says which genotype a point of the search is, and draws the telemetry. It asks for nothing outside the page.
"use strict";

const data = JSON.parse(document.getElementById("data")?.textContent ?? "{}");
const byId = (id) => document.getElementById(id);
const redraws = []; // what is drawn to the width of the window

/** An element of HTML: properties, then children (texts stay texts). */
function make(tag, values = {}, ...children) {
  const element = Object.assign(document.createElement(tag), values);
  element.append(...children);
  return element;
}

/** An element of SVG: attributes, then children. */
function shape(tag, attributes = {}, ...children) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

/** A number in four digits. */
function inDigits(value) {
  const size = Math.abs(value);
  if (size >= 1e6 || (size > 0 && size < 1e-3)) return value.toExponential(2);
  return value.toLocaleString("en", { maximumSignificantDigits: 4 });
}

// ---------------------------------------------------------------- tables

const FACTORS = { k: 1e3, M: 1e6, G: 1e9, T: 1e12 };
const NUMBER = /^(?:≈\s*)?([+-]?\d+(?:\.\d+)?(?:e[+-]?\d+)?)\s*(k|M|G|T)?\s*(?:%|×|ms|s|MB|dB)?(?:\s*(?:\[.*\]|±.*))?$/;

/** What a cell is sorted by: a number without its unit, a text, or null where nothing is known. */
function valueOf(cell) {
  const text = cell.textContent.trim();
  if (text === "" || text === "–") return null;
  const found = NUMBER.exec(text.replaceAll("−", "-").replace(/(\d),(?=\d{3})/g, "$1"));
  return found ? Number(found[1]) * (FACTORS[found[2]] ?? 1) : text;
}

/** Numbers before texts. */
function order(a, b) {
  if (typeof a === "number" && typeof b === "number") return a - b;
  if (typeof a !== typeof b) return typeof a === "number" ? -1 : 1;
  return a.localeCompare(b, "en", { numeric: true });
}

/** Headers that sort: rising, falling, and as it was. What is not known stands last either way. */
function sortable(table) {
  const body = table.tBodies[0];
  const first = [...body.rows];
  const headers = [...table.tHead.rows[0].cells];
  headers.forEach((header, column) => {
    const button = make("button", { type: "button", className: "sort" }, ...header.childNodes);
    header.append(button);
    header.setAttribute("aria-sort", "none");
    button.addEventListener("click", () => {
      const next = { none: "ascending", ascending: "descending", descending: "none" }[header.getAttribute("aria-sort")];
      headers.forEach((other) => other.setAttribute("aria-sort", other === header ? next : "none"));
      const sign = next === "descending" ? -1 : 1;
      const valued = first.map((row) => ({ row, value: valueOf(row.cells[column]) }));
      const known = valued.filter(({ value }) => value !== null);
      if (next !== "none") known.sort((a, b) => sign * order(a.value, b.value));
      const sorted = next === "none" ? valued : [...known, ...valued.filter(({ value }) => value === null)];
      body.append(...sorted.map(({ row }) => row));
    });
  });
}

// ---------------------------------------------------------------- two models at the same seed

function options(select, names, chosen = 0) {
  select.replaceChildren(...names.map((name, value) => make("option", { value, textContent: name })));
  select.selectedIndex = chosen;
}

/** Two images over each other, the right one cut off at the divide. */
function comparison({ groups, models }) {
  const [left, right, what, nth, slider, stage] = ["left", "right", "what", "nth", "slider", "stage"]
    .map((name) => byId(`compare-${name}`));
  const [under, over] = stage.querySelectorAll("canvas");
  const sprites = new Map(); // of a model, its images once they are decoded
  let others = []; // models that the left one can be compared with
  let group = null;

  const spriteOf = (model) => {
    if (!sprites.has(model)) {
      const image = new Image();
      image.src = model.sprite;
      sprites.set(model, image.decode().then(() => image));
    }
    return sprites.get(model);
  };
  const chosen = () => [models[left.selectedIndex], others[right.selectedIndex]];
  /** Places of the images that were asked for with the chosen words. */
  const places = () => group.words.flatMap((word, place) => (word === what.selectedOptions[0].textContent ? [place] : []));

  function divide() {
    const [a, b] = chosen();
    over.style.clipPath = `inset(0 0 0 ${slider.value}%)`;
    stage.querySelector(".divide").style.left = `${slider.value}%`;
    slider.setAttribute("aria-valuetext", `${slider.value} % ${a.name}, ${100 - slider.value} % ${b.name}`);
  }

  async function show() {
    const pair = chosen();
    const place = places()[nth.selectedIndex];
    const [width, height] = group.tile;
    const [column, row] = [place % group.columns, Math.floor(place / group.columns)];
    const decoded = await Promise.all(pair.map(spriteOf));
    if (pair.some((model, side) => model !== chosen()[side])) return; // chosen anew meanwhile
    [under, over].forEach((canvas, side) => {
      Object.assign(canvas, { width, height });
      canvas.getContext("2d").drawImage(decoded[side], column * width, row * height, width, height, 0, 0, width, height);
      canvas.setAttribute("aria-label", `${pair[side].name}: ${group.kind} ${group.words[place]}`);
    });
    stage.classList.toggle("pixels", Math.max(width, height) <= 64);
    stage.dataset.place = place;
    byId("compare-says").textContent = `${group.kind}: ${group.words[place]}`;
    byId("compare-sides").replaceChildren(...pair.map(({ name }) => make("span", {}, name)));
    divide();
  }

  function count() {
    options(nth, places().map((_, number) => String(number + 1)));
    nth.parentElement.hidden = nth.length < 2;
    show();
  }

  function choose() {
    const own = models[left.selectedIndex];
    const before = others[right.selectedIndex];
    others = models.filter((model) => model.group === own.group);
    const again = others.indexOf(before);
    options(right, others.map(({ name }) => name), again >= 0 ? again : others.findIndex((model) => model !== own));
    if (group === groups[own.group]) return show();
    group = groups[own.group];
    byId("compare-kind").textContent = group.kind;
    const words = [...new Set(group.words)];
    options(what, words);
    what.parentElement.hidden = words.length < 2;
    return count();
  }

  const drag = ({ clientX }) => {
    const { x, width } = stage.getBoundingClientRect();
    slider.value = Math.round((100 * (clientX - x)) / width);
    divide();
  };
  stage.addEventListener("pointerdown", (event) => {
    stage.setPointerCapture(event.pointerId);
    drag(event);
  });
  stage.addEventListener("pointermove", (event) => stage.hasPointerCapture(event.pointerId) && drag(event));
  slider.addEventListener("input", divide);
  left.addEventListener("change", choose);
  right.addEventListener("change", show);
  what.addEventListener("change", count);
  nth.addEventListener("change", show);
  options(left, models.map(({ name }) => name));
  byId("compare").hidden = false;
  choose();
  const made = others.findIndex((model) => model.chosen); // what the run is about, or else its last model
  right.selectedIndex = made > 0 ? made : others.length - 1;
  show();
}

// ---------------------------------------------------------------- axes

/** Round values between two: 1, 2 or 5 times a power of ten. */
function ticks(low, high, count, log) {
  if (log) {
    const found = [];
    for (let power = Math.floor(Math.log10(low)); power <= Math.log10(high); power++) {
      for (const digit of [1, 2, 5]) found.push(digit * 10 ** power);
    }
    const inside = found.filter((value) => value >= low && value <= high);
    return inside.length > 2 * count ? inside.filter((value) => Number.isInteger(Math.log10(value))) : inside;
  }
  const power = 10 ** Math.floor(Math.log10((high - low) / count));
  const step = [1, 2, 5, 10].map((digit) => digit * power).find((size) => (high - low) / size <= count);
  const from = Math.ceil(low / step);
  return Array.from({ length: Math.floor(high / step) - from + 1 }, (_, place) => (from + place) * step);
}

/** Draw axes for these values; returns where an x and a y are. */
function axes(svg, height, xs, ys, xLabel, yLabel) {
  const width = svg.parentElement.clientWidth;
  const [left, right, top, bottom] = [56, width - 12, 22, height - 40];
  const log = Math.min(...ys) > 0 && Math.max(...ys) > 10 * Math.min(...ys);
  const wide = (values, ratio) => {
    const [low, high] = [Math.min(...values), Math.max(...values)];
    if (ratio) return [low / 1.1, high * 1.1];
    const margin = 0.05 * (high - low) || Math.abs(high) * 0.05 || 1;
    return [low - margin, high + margin];
  };
  const [[x0, x1], [y0, y1]] = [wide(xs, false), wide(ys, log)];
  const along = log ? Math.log : (value) => value;
  const x = (value) => left + ((value - x0) / (x1 - x0)) * (right - left);
  const y = (value) => bottom - ((along(value) - along(y0)) / (along(y1) - along(y0))) * (bottom - top);
  svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
  svg.replaceChildren();
  for (const value of ticks(x0, x1, Math.max(2, Math.floor(width / 90)), false)) {
    svg.append(shape("path", { class: "grid", d: `M${x(value)} ${top}V${bottom}` }));
    svg.append(shape("text", { x: x(value), y: bottom + 16, "text-anchor": "middle" }, inDigits(value)));
  }
  for (const value of ticks(y0, y1, Math.max(2, Math.floor(height / 42)), log)) {
    svg.append(shape("path", { class: "grid", d: `M${left} ${y(value)}H${right}` }));
    svg.append(shape("text", { x: left - 6, y: y(value) + 4, "text-anchor": "end" }, inDigits(value)));
  }
  svg.append(shape("path", { class: "axis", d: `M${left} ${top}V${bottom}H${right}` }));
  svg.append(shape("text", { x: right, y: height - 6, "text-anchor": "end" }, xLabel), shape("text", { x: 4, y: 13 }, yLabel));
  return { x, y, top, bottom, left, right };
}

// ---------------------------------------------------------------- the search

const KINDS = { random: "random search", search: "searched", front: "Pareto front", named: "like the paper's", teacher: "teacher",
  chosen: "chosen student" };
const MARKS = {
  random: "M-4-4L4 4M-4 4L4-4", search: "M-4.5 0A4.5 4.5 0 1 0 4.5 0A4.5 4.5 0 1 0-4.5 0Z", named: "M0-7L7 6H-7Z",
  front: "M-5 0A5 5 0 1 0 5 0A5 5 0 1 0-5 0Z", teacher: "M0-8L7 0L0 8L-7 0Z",
  chosen: "M0-11L2.9-4L10.5-3.4L4.7 1.5L6.5 8.9L0 4.9L-6.5 8.9L-4.7 1.5L-10.5-3.4L-2.9-4Z",
};
const NEAR = 30; // pixels within which a finger means a point

/** A mark of a legend. */
const key = (kind, series) => shape("svg", { viewBox: "-12 -12 24 24", "aria-hidden": "true", class: `series-${series}` },
  shape("g", { class: `mark ${kind}` }, shape("path", { d: MARKS[kind] })));

/** Black or white, whichever is read on a colour. */
function inkOn(colour) {
  const [red, green, blue] = [1, 3, 5].map((place) => parseInt(colour.slice(place, place + 2), 16));
  return 0.3 * red + 0.59 * green + 0.11 * blue > 140 ? "#000" : "#fff";
}

/** Of each option the layers that have it: [option, "0, 2–3 merged"]. */
function layersOf({ strip }) {
  const found = new Map();
  for (const [first, count, option] of strip) {
    const name = count > 1 ? `${first}–${first + count - 1} merged` : String(first);
    found.set(option, [...(found.get(option) ?? []), name]);
  }
  return [...found].sort(([a], [b]) => a - b).map(([option, names]) => [option, names.join(", ")]);
}

/** One plot of the fronts that share its axes; its points are named where they are hovered, tapped or focused. */
function front(box, { y: yLabel, series }) {
  const points = series.flatMap((one, number) => one.points.map((point) => ({ ...point, one, number })));
  points.sort((a, b) => a.x - b.x || a.y - b.y);
  const title = (point) => [point.one.run, point.name || KINDS[point.kind]].filter(Boolean).join(": ");
  const words = (point) => layersOf(point).map(([option, names]) => `${point.one.options[option].label}: ${names}`).join("; ");
  // Of the paper's students that were not evaluated; runs with one latency table have the same ones.
  const lines = [...new Map(series.flatMap((one) => one.lines).map((line) => [line.join(), line])).values()];
  const svg = shape("svg", { role: "listbox", "aria-label":
    `${points.length} genotypes by predicted latency and ${yLabel}; arrow keys go from one to the next.` });
  const facts = make("div", { className: "facts" });
  const kinds = Object.keys(KINDS).filter((kind) => points.some((point) => point.kind === kind));
  const legend = make("ul", { className: "legend" }, ...kinds.map((kind) => make("li", {}, key(kind, 0), KINDS[kind])));
  if (series.length > 1) legend.append(...series.map(({ run }, number) => make("li", {}, key("front", number), run)));
  for (const [name, latency] of lines) {
    legend.append(make("li", {}, `${name}: ${inDigits(latency)} ms (dashed; not evaluated)`));
  }
  box.append(make("div", { className: "plot" }, svg), legend, facts);
  let marks = [];
  let current = Math.max(0, points.findIndex(({ kind }) => kind === "chosen"));
  let places = [];

  function say(number) {
    marks[current]?.setAttribute("aria-selected", "false");
    marks[current]?.setAttribute("tabindex", "-1");
    current = number;
    marks[current].setAttribute("aria-selected", "true");
    marks[current].setAttribute("tabindex", "0");
    const point = points[current];
    const colour = (element, option) => {
      element.style.background = point.one.options[option].colour;
      element.style.color = inkOn(point.one.options[option].colour);
      return element;
    };
    const strip = make("div", { className: "strip" }, ...point.strip.map(([first, count, option]) => {
      const cell = colour(make("span", {}, count > 1 ? `${first}–${first + count - 1}` : String(first)), option);
      cell.style.flexGrow = count;
      return cell;
    }));
    strip.setAttribute("aria-hidden", "true");
    facts.replaceChildren(
      make("strong", {}, title(point)), strip,
      make("ul", {}, ...layersOf(point).map(([option, names]) => make("li", {},
        colour(make("span", { className: "swatch" }), option), `${point.one.options[option].label}: ${names}`))),
      make("dl", {}, ...point.facts.flatMap(([what, value]) => [make("dt", {}, what), make("dd", {}, value)])),
    );
  }

  function draw() {
    const held = svg.contains(document.activeElement);
    const xs = [...points.map(({ x }) => x), ...lines.map(([, latency]) => latency)];
    const at = axes(svg, 360, xs, points.map(({ y }) => y), "predicted latency (ms)", yLabel);
    for (const [name, latency] of lines) {
      const x = at.x(latency);
      svg.append(shape("path", { class: "dashed", d: `M${x} ${at.top}V${at.bottom}` }),
        shape("text", { transform: `translate(${x - 5} ${at.top + 4}) rotate(-90)`, "text-anchor": "end" }, name));
    }
    series.forEach((one, number) => {
      const group = shape("g", { class: `series-${number % 8}` });
      const steps = one.front.map(([x, y], place) => (place ? `H${at.x(x)}V${at.y(y)}` : `M${at.x(x)} ${at.y(y)}`));
      group.append(shape("path", { class: "line front-line", d: steps.join("") }));
      svg.append(group);
    });
    places = points.map(({ x, y }) => [at.x(x), at.y(y)]);
    marks = points.map((point, number) => {
      const mark = shape("g", {
        class: `mark ${point.kind} series-${point.number % 8}`, transform: `translate(${places[number]})`, role: "option", tabindex: -1,
        "aria-selected": "false", "aria-posinset": number + 1, "aria-setsize": points.length,
        "aria-label": `${title(point)}, ${inDigits(point.x)} ms, ${inDigits(point.y)}. ${words(point)}`,
      }, shape("path", { d: MARKS[point.kind] }));
      mark.addEventListener("focus", () => say(number));
      return mark;
    });
    svg.append(...Object.keys(KINDS).flatMap((kind) => marks.filter((_, number) => points[number].kind === kind)));
    say(current);
    if (held) marks[current].focus();
  }

  function nearest({ clientX, clientY }) {
    const { x, y } = svg.getBoundingClientRect();
    const away = places.map(([px, py]) => Math.hypot(px - (clientX - x), py - (clientY - y)));
    const best = away.indexOf(Math.min(...away));
    return away[best] < NEAR ? best : null;
  }
  svg.addEventListener("pointermove", (event) => {
    const number = event.pointerType === "mouse" ? nearest(event) : null;
    if (number !== null && number !== current) say(number);
  });
  svg.addEventListener("click", (event) => {
    const number = nearest(event);
    if (number !== null) marks[number].focus({ preventScroll: true });
  });
  svg.addEventListener("keydown", (event) => {
    const to = { ArrowRight: current + 1, ArrowUp: current + 1, ArrowLeft: current - 1, ArrowDown: current - 1, Home: 0,
      End: points.length - 1 }[event.key];
    if (to === undefined) return;
    event.preventDefault();
    marks[Math.min(Math.max(to, 0), points.length - 1)].focus();
  });
  redraws.push(draw);
  box.parentElement.querySelectorAll("[data-static]").forEach((picture) => (picture.hidden = true));
  draw();
}

// ---------------------------------------------------------------- telemetry

/** One stage: a metric to choose, its curve, and a cursor that the pointer or the arrow keys move. */
function curve(box, { run, name, label, series }) {
  const names = Object.keys(series);
  const select = make("select", {});
  options(select, names);
  const svg = shape("svg", { role: "slider", tabindex: 0, "aria-valuemin": 0 });
  const output = make("output", {});
  const title = [run, name].filter(Boolean).join(": ");
  box.append(make("div", {}, make("h3", {}, title), make("label", {}, `${label}: `, select),
    make("div", { className: "plot series-0" }, svg), output));
  let place = 0;
  let at = null;
  const [cursor, dot] = [shape("path", { class: "cursor" }), shape("circle", { r: 4 })];

  function point(to) {
    const [steps, values] = series[names[select.selectedIndex]];
    place = Math.min(Math.max(to, 0), steps.length - 1);
    const text = `step ${steps[place].toLocaleString("en")}: ${names[select.selectedIndex]} ${inDigits(values[place])}`;
    output.textContent = text;
    svg.setAttribute("aria-valuenow", place);
    svg.setAttribute("aria-valuetext", text);
    cursor.setAttribute("d", `M${at.x(steps[place])} ${at.top}V${at.bottom}`);
    dot.setAttribute("cx", at.x(steps[place]));
    dot.setAttribute("cy", at.y(values[place]));
  }

  function draw() {
    const metric = names[select.selectedIndex];
    const [steps, values] = series[metric];
    at = axes(svg, 190, steps, values, "step", metric);
    svg.setAttribute("aria-label", `${title}, ${metric} by step; arrow keys read the curve`);
    svg.setAttribute("aria-valuemax", steps.length - 1);
    const line = steps.map((step, number) => `${number ? "L" : "M"}${at.x(step)} ${at.y(values[number])}`).join("");
    svg.append(shape("path", { class: "line", d: line }), cursor, dot);
    point(place);
  }

  const follow = ({ clientX }) => {
    const [steps] = series[names[select.selectedIndex]];
    const away = steps.map((step) => Math.abs(at.x(step) - (clientX - svg.getBoundingClientRect().x)));
    point(away.indexOf(Math.min(...away)));
  };
  svg.addEventListener("pointermove", follow);
  svg.addEventListener("pointerdown", follow);
  svg.addEventListener("keydown", (event) => {
    const to = { ArrowRight: place + 1, ArrowUp: place + 1, ArrowLeft: place - 1, ArrowDown: place - 1, PageUp: place + 10,
      PageDown: place - 10, Home: 0, End: Infinity }[event.key];
    if (to === undefined) return;
    event.preventDefault();
    point(to);
  });
  select.addEventListener("change", () => {
    place = Infinity;
    draw();
  });
  redraws.push(draw);
  place = Infinity; // its end
  draw();
}

// ---------------------------------------------------------------- the page

for (const table of document.querySelectorAll("table")) {
  if (table.tHead && table.tBodies[0].rows.length > 1) sortable(table);
}
if (data.compare) comparison(data.compare);
for (const box of document.querySelectorAll("[data-front]")) front(box, data.fronts[box.dataset.front]);
if (data.telemetry?.length) {
  byId("telemetry").hidden = false;
  for (const stage of data.telemetry) curve(byId("stages"), stage);
}
let width = innerWidth;
addEventListener("resize", () => {
  if (innerWidth !== width) redraws.forEach((draw) => draw()); // a phone's address bar changes the height alone
  width = innerWidth;
});
