"""What moves on a report: the slider over two pictures, values under the pointer, reloading while a run goes on.

Without it a page says the same; nothing is asked for, and text from outside only ever becomes text.
"""

SCRIPT = """
"use strict";

// Two pictures, one over the other: those of the page that say which row and which name they have.
for (const box of document.querySelectorAll(".compare")) {
  const pictures = [...document.querySelectorAll("img[data-row]")];
  const rows = [...new Set(pictures.map(picture => picture.dataset.row))]
    .filter(row => namesIn(row).length > 1);
  if (!rows.length) continue;
  const [row, left, right] = box.querySelectorAll("select"), said = box.querySelector("q");
  const stage = box.querySelector(".stage"), range = stage.querySelector("input");
  const [under, over] = [new Image(), new Image()], names = stage.querySelectorAll("span");
  stage.prepend(under, over);

  // Columns by their number: a page may show some of them twice, in another order.
  function namesIn(wanted) {
    return [...new Set(inRow(wanted).sort((one, other) => one.dataset.order - other.dataset.order)
      .map(picture => picture.dataset.name))];
  }

  function inRow(wanted) { return pictures.filter(picture => picture.dataset.row === wanted); }

  function offer(select, values, value) {
    select.replaceChildren(...values.map(text => new Option(text, text)));
    select.value = values.includes(value) ? value : values[0];
  }

  function offerNames(first, last) {
    const found = namesIn(row.value);
    offer(left, found, found.includes(first) ? first : found[0]);
    offer(right, found, found.includes(last) ? last : found.at(-1));
  }

  function show(image, select, name) {
    const picture = inRow(row.value).find(one => one.dataset.name === select.value);
    image.src = picture.src;
    image.alt = picture.alt;
    image.width = picture.getAttribute("width");
    image.height = picture.getAttribute("height");
    image.className = picture.className;
    name.textContent = select.value;
    said.textContent = row.value;
  }

  function update() {
    show(under, right, names[1]);
    show(over, left, names[0]);
    slide();
  }

  function slide() {
    stage.style.setProperty("--at", range.value + "%");
    range.setAttribute("aria-valuetext", `${range.value} % ${left.value}, the rest ${right.value}`);
  }

  offer(row, rows, rows[0]);
  offerNames(box.dataset.left, box.dataset.right);
  row.onchange = () => { offerNames(left.value, right.value); update(); };
  left.onchange = right.onchange = update;
  range.oninput = slide;
  for (const picture of pictures) {
    if (!rows.includes(picture.dataset.row)) continue;
    picture.classList.add("pick");
    picture.title = "Show in the slider";
    picture.addEventListener("click", () => {
      row.value = picture.dataset.row;
      offerNames(left.value, picture.dataset.name);
      update();
      box.scrollIntoView({block: "nearest"});
    });
  }
  update();
  box.hidden = false;
}

// The values of a chart at the pointer, read back off its paths.
for (const svg of document.querySelectorAll("svg[data-frame]")) {
  const [x0, x1, y0, y1, left, right, top, bottom] = svg.dataset.frame.split(" ").map(Number);
  const lines = [...svg.querySelectorAll("path[data-name]")].map(path => ({
    name: path.dataset.name,
    points: path.getAttribute("d").slice(1).replaceAll("h0", "").split(/[ML]/)
      .map(point => point.split(" ").map(Number)),
  }));
  const note = document.createElement("p"), hair = document.createElementNS("http://www.w3.org/2000/svg", "path");
  note.className = "readout";
  hair.setAttribute("class", "hair");
  svg.append(hair);
  svg.parentNode.append(note);

  svg.onpointermove = event => {
    const box = svg.getBoundingClientRect();
    const at = Math.min(right, Math.max(left, (event.clientX - box.left) / box.width * svg.viewBox.baseVal.width));
    const nearer = (one, other) => Math.abs(one.point[0] - at) < Math.abs(other.point[0] - at) ? one : other;
    const near = lines.map(({name, points}) => points.map(point => ({name, point})).reduce(nearer));
    const x = near.reduce(nearer).point[0];
    const said = near.filter(one => Math.abs(one.point[0] - x) < 8)
      .map(one => `${one.name} ${short(y0 + (bottom - one.point[1]) / (bottom - top) * (y1 - y0))}`);
    const value = x0 + (x - left) / (right - left) * (x1 - x0), label = svg.dataset.x.split(" ")[0];
    note.textContent = `${label} ${label === "step" ? Math.round(value) : short(value)}: ${said.join(", ")}`;
    hair.setAttribute("d", `M${x} ${top}V${bottom}`);
  };
  svg.onpointerleave = () => { note.textContent = ""; hair.removeAttribute("d"); };
}

function short(value) { return String(Number(value.toPrecision(3))); }

// While a run goes on: read the page again, unless somebody is busy with it.
if ("live" in document.body.dataset) {
  let touched = 0;
  for (const kind of ["pointerdown", "keydown", "wheel", "change"]) {
    addEventListener(kind, () => { touched = performance.now(); }, {passive: true});
  }
  setInterval(() => { if (performance.now() - touched > 60000) location.reload(); }, 60000);
}
"""
