// Reading /metrics: samples, and quantiles of the histograms' growth between two scrapes.

const SAMPLE = /^([a-zA-Z_:][\w:]*)(?:\{(.*)\})? (\S+)$/;
const LABEL = /([a-zA-Z_]\w*)="((?:[^"\\]|\\.)*)"/g;

/** Exposition text -> Map of metric name -> [{labels, value}]. */
export function parse(text) {
  const found = new Map();
  for (const line of text.split("\n")) {
    const match = line.startsWith("#") ? null : SAMPLE.exec(line);
    if (match === null) continue;
    const labels = {};
    for (const [, name, value] of (match[2] ?? "").matchAll(LABEL)) labels[name] = value.replace(/\\(.)/g, unescaped);
    if (!found.has(match[1])) found.set(match[1], []);
    found.get(match[1]).push({ labels, value: number(match[3]) });
  }
  return found;
}

const unescaped = (_, character) => (character === "n" ? "\n" : character);
const number = (text) => (text === "+Inf" ? Infinity : text === "-Inf" ? -Infinity : Number(text));

/** The sum over the samples of `name` whose labels include `wanted`; undefined where there is none. */
export function total(samples, name, wanted = {}) {
  const fitting = (samples.get(name) ?? []).filter(({ labels }) =>
    Object.entries(wanted).every(([label, value]) => labels[label] === value));
  return fitting.length ? fitting.reduce((sum, { value }) => sum + value, 0) : undefined;
}

/** A histogram as {bounds, counts (cumulative), sum}; null where there is none. Series of several labels are added. */
export function histogram(samples, name) {
  const counts = new Map();
  for (const { labels, value } of samples.get(`${name}_bucket`) ?? []) {
    const bound = number(labels.le);
    counts.set(bound, (counts.get(bound) ?? 0) + value);
  }
  if (counts.size === 0) return null;
  const bounds = [...counts.keys()].sort((a, b) => a - b);
  return { bounds, counts: bounds.map((bound) => counts.get(bound)), sum: total(samples, `${name}_sum`) ?? 0 };
}

/** What was observed after `earlier`. A server that started anew since counts from zero: then all of `later`. */
export function growth(later, earlier) {
  if (later === null || earlier === null) return later;
  const counts = later.counts.map((value, i) => value - earlier.counts[i]);
  if (counts.some((value) => !(value >= 0))) return later;
  return { bounds: later.bounds, counts, sum: later.sum - earlier.sum };
}

export const observations = (found) => (found === null ? 0 : found.counts[found.counts.length - 1]);

/**
 * The q-quantile as {value, bound?}, interpolated within its bucket as Prometheus does; null without observations.
 * In the first and the last bucket only a bound is known: bound is "<" or ">".
 */
export function quantileOf(found, q) {
  const all = observations(found);
  if (!all) return null;
  const rank = q * all;
  const i = found.counts.findIndex((value) => value >= rank);
  if (i === 0) return { value: found.bounds[0], bound: "<" };
  if (found.bounds[i] === Infinity) return { value: found.bounds[i - 1], bound: ">" };
  const below = found.counts[i - 1];
  const share = (rank - below) / (found.counts[i] - below);
  return { value: found.bounds[i - 1] + share * (found.bounds[i] - found.bounds[i - 1]) };
}

/** The q-quantile of plain numbers, as {value}; null without any. */
export function quantileOfValues(values, q) {
  if (values.length === 0) return null;
  const sorted = [...values].sort((a, b) => a - b);
  const at = q * (sorted.length - 1);
  const low = Math.floor(at);
  const high = Math.min(low + 1, sorted.length - 1);
  return { value: sorted[low] + (at - low) * (sorted[high] - sorted[low]) };
}
