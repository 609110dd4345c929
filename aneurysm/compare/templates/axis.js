// Quantities of a variant and where they lie on an axis.

// Every quantity that can be plotted: settings, figures, costs.
function quantities() {
  const stage = page.stage;
  const found = stage.keys.map((key, k) => ({
    id: `key:${key.full}`, name: key.name, numeric: key.numeric, setting: true,
    value: (index) => stage.variants[index].values[k], text: (index) => setting(stage.variants[index].values[k]),
  }));
  for (const metric of stage.metrics.filter((m) => !m.cost))
    found.push({ id: `figure:${metric.name}`, name: metric.name, numeric: true, figure: metric.name, value: (i) => statistics(i, metric.name).mean, text: (i) => number(statistics(i, metric.name).mean) });
  const costs = [["seconds_mean", "seconds", "time of a run", duration], ["peak_memory_mb", "peak_memory_mb", "peak memory", memory], ["peak_gpu_memory_mb", "peak_gpu_memory_mb", "GPU memory", memory]];
  for (const [id, figure, name, show] of costs)
    if (stage.variants.some((v) => v.cost[id] !== null))
      found.push({ id: `cost:${id}`, name, figure, numeric: true, value: (i) => stage.variants[i].cost[id], text: (i) => show(stage.variants[i].cost[id]), show });
  return found;
}

// A scale from the values of a quantity to 0..1, with ticks; `place` gives null for what has no value.
function scaleOf(quantity, padded = false) {
  const values = page.stage.variants.map((_, index) => quantity.value(index)).filter((value) => value !== null);
  const distinct = [...new Set(values)];
  if (!quantity.numeric) {
    const order = distinct.sort((a, b) => String(a).localeCompare(String(b), "en", { numeric: true }));
    const place = (value) => (value === null ? null : (order.indexOf(value) + 0.5) / Math.max(1, order.length));
    return { place, ticks: order.map((value) => [place(value), String(value)]), discrete: true };
  }
  distinct.sort((a, b) => a - b);
  let low = distinct[0] ?? 0, high = distinct.at(-1) ?? 1;
  const logarithmic = quantity.setting && low > 0 && high / low >= 8;
  if (low === high) [low, high] = [low - (Math.abs(low) || 1) * 0.1, high + (Math.abs(high) || 1) * 0.1];
  const bend = logarithmic ? Math.log : (value) => value;
  const margin = padded ? (bend(high) - bend(low)) * 0.08 : 0;
  const from = bend(low) - margin, to = bend(high) + margin;
  const place = (value) => (value === null ? null : (bend(value) - from) / (to - from));
  const ticks = quantity.setting && distinct.length <= 7 ? distinct : logarithmic ? powers(low, high) : round(low, high, 5);
  const show = quantity.setting ? setting : (quantity.show ?? brief(ticks));
  return { place, ticks: ticks.map((value) => [place(value), show(value)]), discrete: quantity.setting && distinct.length <= 7 };
}

const powers = (low, high) => Array.from({ length: 40 }, (_, i) => 10 ** (i - 20)).filter((v) => v >= low * 0.999 && v <= high * 1.001);

// As many digits as the ticks have, the same for all of them.
function brief(ticks) {
  const exact = (digits) => ticks.every((value) => Math.abs(value - Number(value.toFixed(digits))) < 1e-9 * Math.max(1, Math.abs(value)));
  const digits = [0, 1, 2, 3, 4, 5].find(exact) ?? 6;
  return (value) => number(value, digits);
}

// About `count` round numbers between two bounds.
function round(low, high, count) {
  const raw = (high - low) / count, unit = 10 ** Math.floor(Math.log10(raw));
  const step = unit * [1, 2, 2.5, 5, 10].find((factor) => factor * unit >= raw * 0.999);
  const first = Math.ceil(low / step - 1e-9);
  return Array.from({ length: Math.floor(high / step + 1e-9) - first + 1 }, (_, i) => Number(((first + i) * step).toPrecision(12)));
}
