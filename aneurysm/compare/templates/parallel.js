// Parallel coordinates: one line per variant through all its settings, its figure and its cost.

const TALL = 240, TOP = 46, GONE = 30; // pixels: of an axis, above it, below it for what has no value

function parallelAxes() {
  const chosen = quantities().filter((q) => q.setting || q.id === "cost:seconds_mean" || q.figure === page.metric);
  const axes = [...chosen.filter((q) => q.setting), ...chosen.filter((q) => q.id.startsWith("cost:") && q.figure !== page.metric), ...chosen.filter((q) => q.figure === page.metric)];
  const order = sortedByGoodness(), rank = new Map(order.map((index, k) => [index, order.length > 1 ? k / (order.length - 1) - 0.5 : 0]));
  return axes.map((quantity) => {
    const scale = scaleOf(quantity), gap = scale.discrete ? Math.min(26, TALL / Math.max(2, scale.ticks.length) / 2) : 0;
    const flipped = quantity.figure && !metricOf(quantity.figure)?.higher; // up is always better
    // Lines through the same value lie side by side, the best on top, so that they can be told apart.
    const at = (index) => {
      const share = scale.place(quantity.value(index));
      if (share === null) return TALL + GONE;
      const nudge = rank.get(index) * gap;
      return Math.min(TALL, Math.max(0, (flipped ? share : 1 - share) * TALL + nudge));
    };
    return { ...quantity, scale, flipped, at };
  });
}

const sortedByGoodness = () => page.stage.variants.map((_, i) => i).sort((a, b) => (goodness(b) ?? -1) - (goodness(a) ?? -1));

function buildParallel() {
  stands.delete("lines");
  find("parallel-section").hidden = page.axes.length < 2 || page.stage.variants.length < 2;
  const axes = page.axes, width = Math.max(720, axes.length * 110, find("parallel").clientWidth);
  const below = axes.some((axis) => page.stage.variants.some((_, index) => axis.value(index) === null)) ? GONE : 0;
    const left = 70, right = 90, step = axes.length > 1 ? (width - left - right) / (axes.length - 1) : 0;
  const picture = draw("svg", { viewBox: `0 0 ${width} ${TOP + TALL + below + 14}`, role: "group", "aria-label": "Parallel coordinates of the variants" });
  const lines = draw("g", { transform: `translate(0 ${TOP})`, class: "lines" });
  for (const index of [...sortedByGoodness()].reverse()) {
    const path = axes.map((axis, k) => {
      const x = left + k * step, y = axis.at(index);
      if (k === 0) return `M${x} ${y.toFixed(1)}`;
      const before = axes[k - 1].at(index), middle = x - step / 2;
      return `C${middle} ${before.toFixed(1)} ${middle} ${y.toFixed(1)} ${x} ${y.toFixed(1)}`;
    }).join("");
    const line = draw("path", { d: path, class: "line", style: `stroke: ${colour(goodness(index))}` });
    const grab = alive(draw("path", { d: path, class: "grab", "data-index": index }), index);
    register("lines", index, line);
    lines.append(draw("g", { "data-line": index }, line, grab));
  }
  picture.append(lines);
  axes.forEach((axis, k) => picture.append(drawAxis(axis, left + k * step, k === axes.length - 1)));
  find("parallel").replaceChildren(picture);
  picture.style.minWidth = `${Math.min(width, Math.max(720, axes.length * 110))}px`;
}

function drawAxis(axis, x, last) {
  const group = draw("g", { transform: `translate(${x} ${TOP})`, "data-axis": axis.id });
  const name = draw("text", { y: -24, "text-anchor": "middle", class: "name" });
  name.textContent = axis.name.length > 24 ? `${axis.name.slice(0, 23)}…` : axis.name;
  group.append(name);
  if (axis.figure) {
    const hint = draw("text", { y: -9, "text-anchor": "middle" });
    hint.textContent = "better ↑";
    group.append(hint);
  }
  group.append(draw("line", { y1: 0, y2: TALL, class: "axis" }));
  for (const [share, text] of axis.scale.ticks) {
    const y = (axis.flipped ? share : 1 - share) * TALL;
    const label = draw("text", { x: last ? 11 : -9, y: y + 4, "text-anchor": last ? "start" : "end", style: "paint-order: stroke; stroke: var(--card); stroke-width: 4px" });
    label.textContent = text.length > 20 ? `${text.slice(0, 19)}…` : text;
    group.append(draw("line", { x1: -4, x2: 4, y1: y, y2: y, class: "axis" }), label);
  }
  if (page.stage.variants.some((_, index) => axis.value(index) === null)) {
    const label = draw("text", { x: last ? 11 : -9, y: TALL + GONE + 4, "text-anchor": last ? "start" : "end" });
    label.textContent = "none";
    group.append(label);
  }
  group.append(...brushOf(axis));
  return group;
}

function brushOf(axis) {
  const area = draw("rect", { x: -15, y: -6, width: 30, height: TALL + 12, class: "brush-area", "data-brush": axis.id });
  const band = draw("rect", { x: -9, width: 18, y: 0, height: 0, rx: 3, class: "brush" });
  let from = null;
  const where = (event) => {
    const point = new DOMPoint(event.clientX, event.clientY).matrixTransform(area.getScreenCTM().inverse());
    return Math.min(TALL + 1, Math.max(-1, point.y));
  };
  const show = () => {
    const [top, bottom] = page.brushes.get(axis.id) ?? [0, 0];
    band.setAttribute("y", top);
    band.setAttribute("height", bottom - top);
  };
  area.addEventListener("pointerdown", (event) => {
    from = where(event);
    area.setPointerCapture(event.pointerId);
  });
  area.addEventListener("pointermove", (event) => {
    if (from === null) return;
    const to = where(event);
    if (Math.abs(to - from) < 4) return;
    page.brushes.set(axis.id, [Math.min(from, to), Math.max(from, to)]);
    show();
    update();
  });
  area.addEventListener("pointerup", (event) => {
    if (from !== null && Math.abs(where(event) - from) < 4) page.brushes.delete(axis.id);
    from = null;
    show();
    update();
  });
  show();
  return [area, band];
}

function showLines() {
  const shown = new Set(page.visible);
  document.querySelectorAll("#parallel [data-line]").forEach((node) => node.classList.toggle("off", !shown.has(Number(node.dataset.line))));
}
