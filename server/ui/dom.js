// The only way this page makes elements: by name, with text as text. Nothing here, or anywhere, parses markup.

export const $ = (id) => document.getElementById(id);

/** An element with attributes and children; strings become text nodes. */
export function el(name, attributes = {}, ...children) {
  return filled(document.createElement(name), attributes, children);
}

export function svg(name, attributes = {}, ...children) {
  return filled(document.createElementNS("http://www.w3.org/2000/svg", name), attributes, children);
}

function filled(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (typeof value === "function") element.addEventListener(name, value);
    else if (value === true) element.setAttribute(name, "");
    else if (value !== false && value != null) element.setAttribute(name, value);
  }
  element.append(...children.filter((child) => child != null));
  return element;
}

/** Sets text only where it differs, so that selections and live regions are left alone. */
export function setText(id, text) {
  const element = $(id);
  if (element.textContent !== text) element.textContent = text;
}

/** A button that copies what `text()` gives, and says for a moment whether it could. */
export function copyButton(text, label) {
  const button = el("button", { type: "button", class: "quiet copy", "aria-label": label }, "Copy");
  button.addEventListener("click", async () => {
    button.textContent = (await copy(text())) ? "Copied" : "Not allowed";
    setTimeout(() => { button.textContent = "Copy"; }, 1500);
  });
  return button;
}

async function copy(text) {
  if (navigator.clipboard) { // only on https and localhost
    try {
      await navigator.clipboard.writeText(text);
      return true;
    } catch { return false; }
  }
  const area = el("textarea", { class: "visually-hidden", readonly: true });
  area.value = text;
  document.body.append(area);
  area.select();
  const done = document.execCommand("copy");
  area.remove();
  return done;
}
