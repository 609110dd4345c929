// Scatter: any quantity against any other; a dot per variant, a mote per repeat, a whisker per interval.

const WIDE = 640, HIGH = 384, SIDE = 62, UNDER = 46, OVER = 26; // pixels: the plot, left of it, below and above

function scatterChoices() {
  const all = quantities(), ids = all.map((q) => q.id);
  const first = all.find((q) => q.setting && q.numeric) ?? all.find((q) => q.setting) ?? all.find((q) => q.id === "cost:seconds_mean") ?? all[0];
  const figure = all.find((q) => q.figure === page.metric) ?? all.at(-1);
  for (const [id, wanted] of [["scatter-x", first], ["scatter-y", figure]]) {
    const list = find(id), before = list.value;
    list.replaceChildren(...all.map((q) => make("option", { value: q.id }, q.name)));
    list.value = page.freshScatter || !ids.includes(before) ? wanted?.id ?? "" : before;
  }
  page.freshScatter = false;
}

function buildScatter() {
  stands.delete("dots");
  const all = quantities(), x = all.find((q) => q.id === find("scatter-x").value), y = all.find((q) => q.id === find("scatter-y").value);
  if (!x || !y || !page.visible.length) return find("scatter").replaceChildren(make("p", { class: "none" }, "Nothing to draw."));
  const [across, up] = [scaleOf(x, true), withRepeats(y)];
  const inner = WIDE - SIDE - 14, tall = HIGH - UNDER - OVER, flat = (share) => SIDE + share * inner, level = (share) => OVER + (1 - share) * tall;
  const picture = draw("svg", { viewBox: `0 0 ${WIDE} ${HIGH}`, role: "group", "aria-label": `${y.name} against ${x.name}` });
  for (const [share, text] of up.ticks) {
    picture.append(draw("line", { x1: SIDE, x2: WIDE - 14, y1: level(share), y2: level(share), class: "tick" }), words(SIDE - 9, level(share) + 4, text, "end"));
  }
  for (const [share, text] of across.ticks) {
    picture.append(draw("line", { x1: flat(share), x2: flat(share), y1: OVER, y2: OVER + tall, class: "tick" }), words(flat(share), HIGH - UNDER + 20, text.length > 16 ? `${text.slice(0, 15)}…` : text, "middle"));
  }
  picture.append(words(SIDE + inner / 2, HIGH - 6, x.name, "middle", "name"));
  picture.append(words(SIDE, 12, `${y.name}${y.figure && metricOf(y.figure) ? (metricOf(y.figure).higher ? ", higher is better" : ", lower is better") : ""}`, "start", "name"));
  const shift = sideBySide(x, across, inner), few = page.visible.length <= 120;
  let missing = 0;
  for (const index of [...page.visible].reverse()) {
    const [a, b] = [across.place(x.value(index)), up.place(y.value(index))];
    if (a === null || b === null) { missing += 1; continue; }
    const left = flat(a) + shift(index), shade = `color: ${colour(goodness(index))}`, group = draw("g", { style: shade, "data-dot": index });
    if (few && y.figure && x.setting)
      for (const value of repeatsOf(index, y.figure)) group.append(draw("circle", { cx: left, cy: level(up.place(value)), r: 2.6, fill: "currentColor", class: "mote" }));
    const one = y.figure ? statistics(index, y.figure) : null;
    if (few && one && one.sd !== null) group.append(draw("line", { x1: left, x2: left, y1: level(Math.max(0, up.place(one.mean - one.sd))), y2: level(Math.min(1, up.place(one.mean + one.sd))), stroke: "currentColor", "stroke-width": 1.6, opacity: 0.5 }));
    const dot = draw("circle", { cx: left, cy: level(b), r: few ? 6.5 : 4.5, fill: "currentColor", class: "dot", "data-index": index });
    register("dots", index, dot);
    group.append(alive(dot, index));
    picture.append(group);
  }
  const said = [few && y.figure && x.setting ? "Small dots: single folds and seeds. Line: ± sd." : "", missing ? `${missing} without a value are not drawn.` : ""].filter(Boolean).join(" ");
  find("scatter").replaceChildren(picture, make("p", { class: "soft small" }, said));
}

function words(x, y, text, anchor, kind = "") {
  const node = draw("text", { x, y, "text-anchor": anchor, class: kind });
  node.textContent = text;
  return node;
}

// The scale of a figure has room for its single repeats too.
function withRepeats(quantity) {
  if (!quantity.figure) return scaleOf(quantity, true);
  const values = page.visible.flatMap((index) => [quantity.value(index), ...repeatsOf(index, quantity.figure)]).filter((v) => v !== null && v !== undefined);
  let low = Math.min(...values), high = Math.max(...values);
  if (!(high > low)) [low, high] = [low - (Math.abs(low) || 1) * 0.1, high + (Math.abs(high) || 1) * 0.1];
  const margin = (high - low) * 0.06, from = low - margin, to = high + margin;
  const place = (value) => (value === null ? null : (value - from) / (to - from));
  const ticks = round(from, to, 7), show = quantity.show ?? brief(ticks);
  return { place, ticks: ticks.map((value) => [place(value), show(value)]) };
}

const repeatsOf = (index, figure) => page.stage.runs.filter((run) => run.v === index && run.state === "finished" && run.figures[figure] !== undefined).map((run) => run.figures[figure]);

// Variants at the same place of a discrete axis stand beside each other.
function sideBySide(x, across, inner) {
  if (!across.discrete) return () => 0;
  const groups = new Map();
  for (const index of page.visible) {
    const value = x.value(index);
    groups.set(value, [...(groups.get(value) ?? []), index]);
  }
  const places = across.ticks.map(([share]) => share).sort((a, b) => a - b);
  const nearest = Math.min(1, ...places.slice(1).map((share, k) => share - places[k])) * inner;
  return (index) => {
    const group = groups.get(x.value(index));
    const room = Math.min(16, (nearest * 0.62) / Math.max(1, group.length - 1));
    return (group.indexOf(index) - (group.length - 1) / 2) * room;
  };
}
