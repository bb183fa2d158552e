// Tabs by the ARIA pattern: arrow keys move, the chosen one alone is in the tab order. On a narrow screen the chat is one.

import { $ } from "./dom.js";

const NARROW = matchMedia("(max-width: 56rem)");

/** `changed(name)` is called with the view that is shown beside the chat, or "chat". */
export function startTabs(changed) {
  const tabs = [...document.querySelectorAll("[role=tab]")];
  let chosen = null;

  const usable = () => tabs.filter((tab) => NARROW.matches || tab.id !== "tab-chat");
  function choose(tab, focus = false) {
    chosen = tab;
    for (const each of tabs) {
      const selected = each === tab;
      each.setAttribute("aria-selected", String(selected));
      each.tabIndex = selected ? 0 : -1;
      if (each.id !== "tab-chat") $(each.getAttribute("aria-controls")).hidden = !selected;
    }
    document.body.dataset.view = tab.id.slice("tab-".length);
    if (focus) tab.focus();
    changed(document.body.dataset.view);
  }
  for (const tab of tabs) tab.addEventListener("click", () => choose(tab));
  document.querySelector("[role=tablist]").addEventListener("keydown", (event) => {
    const all = usable();
    const at = all.indexOf(chosen);
    const next = { ArrowRight: at + 1, ArrowLeft: at - 1 + all.length, Home: 0, End: all.length - 1 }[event.key];
    if (next === undefined) return;
    event.preventDefault();
    choose(all[next % all.length], true);
  });
  const fit = () => {
    if (chosen === null) choose($(NARROW.matches ? "tab-chat" : "tab-live"));
    else if (!NARROW.matches && chosen.id === "tab-chat") choose($("tab-live"));
  };
  NARROW.addEventListener("change", fit);
  fit();
}
