// The tables of the last requests and of the precision report.

import { getJson } from "./api.js";
import { $, el, setText } from "./dom.js";
import * as format from "./format.js";

/** GET /requests as rows; `own` holds the request ids of this page. */
export async function showRequests(own, signal) {
  const { data } = await getJson("/requests", signal);
  $("requests").replaceChildren(...data.map((request) => requestRow(request, own)));
  $("no-requests").hidden = data.length > 0;
}

function requestRow(request, own) {
  const ours = own.has(ownId(request.id));
  const later = request.completion_tokens - 1;
  const rate = request.decode_seconds > 0 && later > 0 ? later / request.decode_seconds : null;
  return el("tr", { class: ours && "ours", title: request.id },
    el("th", { scope: "row" }, format.ago(request.ended), ours ? el("span", { class: "visually-hidden" }, ", this page") : null),
    el("td", {}, `${format.count(request.prompt_tokens)} → ${format.count(request.completion_tokens)}`,
      request.cached_tokens ? el("span", { class: "sub" }, `${format.count(request.cached_tokens)} cached`) : null),
    ...[
      format.seconds(request.queue_seconds), format.seconds(request.ttft_seconds), format.rate(rate),
      format.seconds(request.total_seconds),
    ].map((text) => el("td", {}, text)),
    el("td", { class: `finish ${request.finish_reason}` }, format.finish(request.finish_reason)));
}

/** chatcmpl-ui-0123-unique-0 -> ui-0123 */
const ownId = (id) => /^chatcmpl-(ui-[0-9a-f]+)-/.exec(id)?.[1];

/** GET /v1/precision: how each group of layers is stored and run, the head among them, and what the rest runs in. */
export function showPrecision(report) {
  const groups = report.head ? [...report.layers, report.head] : report.layers;
  $("precision").replaceChildren(...groups.flatMap((group) => [
    el("tr", { class: group.reason ? "explained" : null },
      el("th", { scope: "row" }, `${group.count} × ${group.name}`),
      ...[group.stored, group.bits_per_weight.toFixed(2), format.bytes(group.bytes), group.backend, group.numerics]
        .map((text) => el("td", {}, text))),
    group.reason ? el("tr", { class: "reason" }, el("td", { colspan: "6" }, group.reason)) : null,
  ]).filter((row) => row !== null));
  const { totals, kv_cache: cache } = report;
  setText("precision-total", `weights ${format.bytes(totals.weight_bytes)}, ${totals.bits_per_weight.toFixed(2)} bits each`);
  setText("precision-note", `${report.numerics.toUpperCase()}: ${report.numerics_reason}. Activations ${report.activation_dtype}. `
    + `KV cache ${cache.dtype}, ${format.bytes(cache.bytes)} for ${format.count(cache.tokens)} tokens.`);
}
