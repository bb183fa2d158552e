// Puts the page together: who asks what of the server, and when.

import { ApiError, getJson, getText } from "./api.js";
import { Chat } from "./chat.js";
import { $, el, setText } from "./dom.js";
import { startKeyDialog } from "./key.js";
import { Live } from "./live.js";
import { settings, showModels, startSettings } from "./settings.js";
import { showPrecision, showRequests } from "./tables.js";
import { startTabs } from "./tabs.js";

const EVERY_MILLISECONDS = 1000;
const SUGGESTIONS = [
  "Explain in three sentences how a KV cache works.",
  "Write a Python function that merges two sorted lists.",
  "Give me five names for a small sailing boat.",
];

let described = false; // the model's facts are on the page
let refused = false; // a key is needed; asked for once, then only on what the user does
let view = "live";

const live = new Live();
const ask = startKeyDialog(() => { described = refused = false; void tick(); });
const chat = new Chat({ settings, measured: (ttft, itl) => live.measured(ttft, itl), unauthorized: ask });

async function describe() {
  const [{ data }, version, precision] = await Promise.all(["/v1/models", "/version", "/v1/precision"].map((path) => getJson(path)));
  const [card] = data;
  showModels(data);
  showPrecision(precision);
  const kernels = [...new Set(card.quantization.map(({ kernel }) => kernel))].join(" + ");
  const runs = kernels ? `${kernels} kernels on ${version.device}` : version.device;
  const facts = [card.numerics.toUpperCase(), runs, `context ${card.max_model_len}`];
  setText("model-name", card.id);
  setText("empty-model", card.id);
  setText("model-facts", facts.join(" · "));
  document.title = `${card.id} · nvfp4`;
  described = true;
}

/** One look at the server. Health needs no key, so a server that wants one is not taken for a dead one. */
async function tick() {
  try {
    await getText("/health");
    setHealth("ready", "Ready");
    if (refused) return setHealth("locked", "Needs a key");
    if (!described) await describe();
    await live.update();
    if (view === "requests") await showRequests(chat.requestIds);
  } catch (error) {
    if (!(error instanceof ApiError)) throw error;
    live.gap();
    if (error.status === 401) {
      refused = true;
      setHealth("locked", "Needs a key");
      ask();
    } else if (error.status === 0) {
      described = false; // what comes back may be another server
      setHealth("down", "Not reachable");
    } else {
      setHealth("down", /shutting down/.test(error.message) ? "Shutting down" : "Not running");
      $("health").title = error.message;
    }
  }
}

function setHealth(state, text) {
  $("health").dataset.state = state;
  $("health").removeAttribute("title");
  setText("health-text", text);
}

async function watch() {
  for (;;) {
    if (!document.hidden) await tick();
    await new Promise((resolve) => { setTimeout(resolve, EVERY_MILLISECONDS); });
  }
}

startSettings();
startTabs((name) => {
  view = name;
  if (name === "requests" && described) void tick();
});
$("suggestions").replaceChildren(...SUGGESTIONS.map((text) =>
  el("li", {}, el("button", { type: "button", click: () => chat.suggest(text) }, text))));
if (matchMedia("(pointer: fine)").matches) $("message").focus();
void watch();
