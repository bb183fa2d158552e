// Numbers for people. "–" where there is none.

const NONE = "–";

export function seconds(value) {
  if (value == null || !Number.isFinite(value)) return NONE;
  if (value < 0.0005) return "< 1 ms";
  if (value < 0.01) return `${(value * 1000).toFixed(1)} ms`;
  if (value < 1) return `${Math.round(value * 1000)} ms`;
  if (value < 60) return `${value.toFixed(value < 10 ? 2 : 1)} s`;
  return `${Math.floor(value / 60)} min ${Math.round(value % 60)} s`;
}

/** A quantile that is only known to lie below a histogram's first bound says so. */
export function quantile(found) {
  if (found == null) return NONE;
  return (found.bound ?? "") + (found.bound ? " " : "") + seconds(found.value);
}

export function count(value) {
  return value == null || !Number.isFinite(value) ? NONE : Math.round(value).toLocaleString("en");
}

export function rate(value) {
  if (value == null || !Number.isFinite(value)) return NONE;
  return value >= 100 || value === 0 ? count(value) : value.toFixed(1);
}

export function bytes(value) {
  if (value == null || !Number.isFinite(value)) return NONE;
  return value >= 1e9 ? `${(value / 1e9).toFixed(2)} GB` : `${(value / 1e6).toFixed(1)} MB`;
}

export function ago(then, now = Date.now() / 1000) {
  const age = Math.max(0, now - then);
  if (age < 60) return `${Math.floor(age)} s ago`;
  return age < 3600 ? `${Math.floor(age / 60)} min ago` : `${Math.floor(age / 3600)} h ago`;
}

const FINISHES = { stop: "complete", length: "length limit", abort: "stopped", error: "error", tool_calls: "tool call" };

export const finish = (reason) => FINISHES[reason] ?? String(reason ?? NONE);
