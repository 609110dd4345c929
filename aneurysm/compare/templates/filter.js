// Text in a column's filter -> does a value pass.

// Returns a function of (value, shown text), null for an empty filter, or false for one that cannot be read.
function readFilter(text, numeric) {
  const parts = text.split(",").map((part) => part.trim()).filter((part) => part !== "");
  if (parts.length === 0) return null;
  const tests = parts.map((part) => (numeric ? numericTest(part) : textTest(part)));
  if (tests.includes(false)) return false;
  return (value, shown) => tests.some((test) => test(value, shown));
}

function numericTest(part) {
  const plain = part.replaceAll("−", "-");
  const range = plain.match(/^(\S+?)\s*\.\.\s*(\S+)$/);
  if (range) {
    const [low, high] = [Number(range[1]), Number(range[2])];
    return Number.isNaN(low) || Number.isNaN(high) ? false : (value) => typeof value === "number" && value >= low && value <= high;
  }
  const [, sign, rest] = plain.match(/^(<=|>=|!=|<|>|=|!)?\s*(.*)$/);
  if (rest === "–" || rest === "-") return sign?.startsWith("!") ? (value) => value !== null : (value) => value === null;
  const bound = Number(rest);
  if (rest === "" || Number.isNaN(bound)) return textTest(part);
  const same = (value) => typeof value === "number" && Math.abs(value - bound) <= 1e-9 * Math.max(1, Math.abs(bound));
  return {
    "<": (value) => typeof value === "number" && value < bound,
    "<=": (value) => typeof value === "number" && value <= bound,
    ">": (value) => typeof value === "number" && value > bound,
    ">=": (value) => typeof value === "number" && value >= bound,
    "!": (value) => !same(value),
    "!=": (value) => !same(value),
  }[sign] ?? ((value, shown) => same(value) || shown === rest);
}

function textTest(part) {
  if (/^[<>]/.test(part)) return false; // neither a number nor a text to compare with
  const not = part.startsWith("!"), exact = part.replace(/^!/, "").startsWith("=");
  const wanted = part.replace(/^!?=?/, "").trim().toLowerCase();
  return (_, shown) => {
    const is = exact ? shown.toLowerCase() === wanted : shown.toLowerCase().includes(wanted);
    return is !== not;
  };
}

// Variants that pass every filter and every brush, in the order of the table.
function pass(columns, axes) {
  const tests = columns
    .filter((column) => page.filters.has(column.id))
    .map((column) => [column, readFilter(page.filters.get(column.id), column.numeric)])
    .filter(([, test]) => test);
  const brushes = axes.filter((axis) => page.brushes.has(axis.id)).map((axis) => [axis, page.brushes.get(axis.id)]);
  return page.stage.variants
    .map((_, index) => index)
    .filter((index) => tests.every(([column, test]) => test(column.value(index), column.text(index))))
    .filter((index) => brushes.every(([axis, [top, bottom]]) => axis.at(index) >= top && axis.at(index) <= bottom));
}
