// What the next message is sent with. Kept in memory; numbers that cannot be are not sent.

import { $, el } from "./dom.js";

/** Fills the picker with the served names; adapters say what they adapt. */
export function showModels(cards) {
  const chosen = $("model").value;
  $("model").replaceChildren(...cards.map(({ id, parent }) =>
    el("option", { value: id }, parent ? `${id} (adapter of ${parent})` : id)));
  if (cards.some(({ id }) => id === chosen)) $("model").value = chosen;
}

/** Numbers are null where the field is empty or says what the server would refuse. */
export function settings() {
  return {
    model: $("model").value || undefined,
    system: $("system").value.trim(),
    temperature: number("temperature"),
    maxTokens: number("max-tokens"),
  };
}

function number(id) {
  const field = $(id);
  return field.value !== "" && field.checkValidity() ? field.valueAsNumber : null;
}

export function startSettings() {
  $("settings").addEventListener("submit", (event) => event.preventDefault());
  for (const id of ["temperature", "max-tokens"]) {
    $(id).addEventListener("change", () => $(id).reportValidity());
  }
}
