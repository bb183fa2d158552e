// One turn of the conversation on the page.

import { copyButton, el } from "./dom.js";
import * as format from "./format.js";
import { Rendered } from "./markdown.js";

export class Turn {
  #frame = 0;
  #cost = 0; // milliseconds that the last rendering took

  constructor(log, role, name) {
    this.text = "";
    this.reasoning = "";
    this.failed = false;
    this.blocks = [];
    this.onRender = () => {};
    this.content = el("div", { class: "content" });
    this.rendered = new Rendered(this.content);
    this.stats = el("p", { class: "stats" });
    this.foot = el("div", { class: "foot" }, this.stats);
    this.article = el("article", { class: `turn ${role}`, "aria-label": role === "user" ? "You" : `Answer of ${name}` },
      el("p", { class: "who" }, name), this.content, this.foot);
    if (role === "assistant") {
      this.waiting = el("p", { class: "waiting" }, el("span", { class: "pulse", "aria-hidden": "true" }), "Waiting for the first token");
      this.content.before(this.waiting);
      this.article.setAttribute("aria-busy", "true");
    }
    log.append(this.article);
  }

  /** What the user said: as it was typed. */
  finishText(text) {
    this.text = text;
    this.content.append(el("p", { class: "typed" }, text));
    this.foot.remove();
  }

  say(text) {
    this.text += text;
    this.#schedule();
  }

  /** Reasoning is shown folded; it is not part of what is sent back. */
  think(text) {
    if (!this.thought) {
      this.thought = el("pre", { class: "thought" });
      this.summary = el("summary", {}, "Thinking");
      this.content.before(el("details", { class: "thinking" }, this.summary, this.thought));
    }
    this.reasoning += text;
    this.#schedule();
  }

  progress(arrivals, milliseconds) {
    if (arrivals.length === 0) return;
    this.waiting?.remove();
    const tokens = arrivals.at(-1)[1];
    this.stats.textContent = `${format.count(tokens)} tokens, ${format.rate(tokensPerSecond(arrivals, milliseconds))} tokens/s`;
  }

  end(arrivals, finish) {
    this.#close();
    const facts = [format.finish(finish)];
    if (arrivals.length) {
      facts.unshift(`${format.count(arrivals.at(-1)[1])} tokens`, `${format.rate(tokensPerSecond(arrivals))} tokens/s`,
        `first after ${format.seconds(arrivals[0][0] / 1000)}`);
    }
    this.stats.textContent = facts.join(" · ");
    if (this.text) this.foot.append(copyButton(() => this.text, "Copy the answer"));
  }

  fail(message, again) {
    this.failed = true;
    this.#close();
    this.stats.remove();
    this.foot.append(el("p", { class: "error" }, message),
      el("button", { type: "button", class: "quiet", click: again }, "Try again"));
  }

  remove() {
    this.article.remove();
  }

  #close() {
    cancelAnimationFrame(this.#frame);
    clearTimeout(this.timer);
    this.#render();
    this.waiting?.remove();
    this.article.removeAttribute("aria-busy");
    if (this.summary) this.summary.textContent = "Thought";
  }

  /** At most once a frame, and no more than a quarter of the time: a long answer must not hold up the page. */
  #schedule() {
    if (this.#frame) return;
    this.#frame = -1;
    this.timer = setTimeout(() => {
      this.#frame = requestAnimationFrame(() => { this.#frame = 0; this.#render(); });
    }, 3 * this.#cost);
  }

  #render() {
    const started = performance.now();
    if (this.thought) this.thought.textContent = this.reasoning;
    this.blocks = this.rendered.show(this.text);
    this.onRender(this.blocks);
    this.#cost = performance.now() - started;
  }
}

/** After the first token, as a model's speed is usually told; null where one token says nothing. */
function tokensPerSecond(arrivals, until = arrivals.at(-1)[0]) {
  const tokens = arrivals.at(-1)[1] - arrivals[0][1];
  return tokens > 0 ? tokens / ((until - arrivals[0][0]) / 1000) : null;
}
