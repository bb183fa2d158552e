// The conversation: what is said, what is sent, and the answer while it comes.

import { ApiError, newRequestId, streamChat } from "./api.js";
import { $ } from "./dom.js";
import { Turn } from "./turn.js";

const ANNOUNCED_SECONDS = 8;

export class Chat {
  #messages = []; // {role, content}, as they are sent
  #running = null; // AbortController of the answer that comes

  /**
   * settings   () => {model, system, temperature, maxTokens}
   * measured   called with (ttft, itl) of each answer
   * unauthorized  called where the server wants a key
   */
  constructor({ settings, measured, unauthorized }) {
    Object.assign(this, { settings, measured, unauthorized });
    this.requestIds = new Set();
    this.input = $("message");
    this.scroll = $("scroll");
    this.following = true;
    $("composer").addEventListener("submit", (event) => { event.preventDefault(); this.#submit(); });
    this.input.addEventListener("keydown", (event) => {
      if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
      event.preventDefault();
      this.#submit();
    });
    this.input.addEventListener("input", () => this.#fit());
    $("stop").addEventListener("click", () => this.stop());
    $("clear").addEventListener("click", () => this.clear());
    document.addEventListener("keydown", (event) => {
      if (event.key === "Escape" && !event.defaultPrevented && !document.querySelector("dialog[open]")) this.stop();
    });
    this.scroll.addEventListener("scroll", () => this.#scrolled());
    $("jump").addEventListener("click", () => { this.following = true; this.#follow(); this.input.focus(); });
    this.#fit();
  }

  /** Puts a text into the box, ready to be sent or changed. */
  suggest(text) {
    this.input.value = text;
    this.#fit();
    this.input.focus();
  }

  stop() {
    this.#running?.abort();
  }

  clear() {
    this.stop();
    this.#messages = [];
    $("log").replaceChildren();
    $("empty").hidden = false;
    $("clear").disabled = true;
    this.#announce("The conversation is cleared.");
    this.input.focus();
  }

  #submit() {
    const text = this.input.value.trim();
    if (!text || this.#running) return;
    this.input.value = "";
    this.#fit();
    $("empty").hidden = true;
    $("clear").disabled = false;
    this.#messages.push({ role: "user", content: text });
    new Turn($("log"), "user", "You").finishText(text);
    this.#answer();
  }

  async #answer() {
    const running = this.#running = new AbortController();
    const messages = this.#messages;
    const { model, ...body } = this.#body();
    const turn = new Turn($("log"), "assistant", model);
    const started = performance.now();
    const arrivals = []; // [milliseconds, tokens so far] of each chunk with new tokens
    const requestId = newRequestId();
    let finish = null;
    let announced = 0;
    this.requestIds.add(requestId);
    this.#setRunning(true);
    this.#announce("The model is answering.");
    turn.onRender = (blocks) => {
      for (; announced < blocks.length - 1; announced += 1) this.#announce(spoken(blocks[announced].source));
      this.#follow();
    };
    this.following = true;
    this.#follow();
    try {
      for await (const chunk of streamChat({ model, ...body }, requestId, running.signal)) {
        const tokens = chunk.usage?.completion_tokens ?? 0;
        if (tokens > (arrivals.at(-1)?.[1] ?? 0)) arrivals.push([performance.now() - started, tokens]);
        const choice = chunk.choices[0];
        if (choice?.delta.reasoning) turn.think(choice.delta.reasoning);
        if (choice?.delta.content) turn.say(choice.delta.content);
        finish = choice?.finish_reason ?? finish;
        turn.progress(arrivals, performance.now() - started);
      }
      turn.end(arrivals, finish);
    } catch (error) {
      if (running.signal.aborted) {
        turn.end(arrivals, "abort");
      } else {
        const known = error instanceof ApiError;
        if (!known) console.error(error);
        turn.fail(known ? error.message : "This page failed; its console says more.", () => this.#again(turn));
        this.#announce(known ? error.message : "The answer failed.");
        if (error.status === 401) this.unauthorized();
      }
    }
    if (this.#running === running) this.#running = null;
    this.#setRunning(false);
    if (turn.text && messages === this.#messages) messages.push({ role: "assistant", content: turn.text });
    if (arrivals.length) this.measured(...intervals(arrivals));
    if (!turn.failed && messages === this.#messages) {
      const rest = turn.blocks.slice(announced).map(({ source }) => spoken(source)).join("\n");
      this.#announce(finish === null ? "Stopped." : `${rest}\nEnd of the answer.`);
    }
    this.#follow();
  }

  /** The last question once more, in place of an answer that failed. */
  #again(turn) {
    if (this.#running) return;
    turn.remove();
    if (this.#messages.at(-1)?.role === "assistant") this.#messages.pop();
    this.input.focus();
    this.#answer();
  }

  #body() {
    const { model, system, temperature, maxTokens } = this.settings();
    const body = {
      model,
      messages: [...(system ? [{ role: "system", content: system }] : []), ...this.#messages],
      stream: true,
      stream_options: { include_usage: true, continuous_usage_stats: true },
    };
    if (temperature !== null) body.temperature = temperature;
    if (maxTokens !== null) body.max_tokens = maxTokens;
    return body;
  }

  #setRunning(running) {
    const hadFocus = document.activeElement === $(running ? "send" : "stop");
    $("send").hidden = running;
    $("stop").hidden = !running;
    if (hadFocus) $(running ? "stop" : "message").focus();
  }

  /** Said by a screen reader when it is free: whole paragraphs, never single words. */
  #announce(text) {
    clearTimeout(this.silence);
    $("announcer").textContent = text;
    this.silence = setTimeout(() => { $("announcer").textContent = ""; }, ANNOUNCED_SECONDS * 1000);
  }

  #fit() {
    this.input.style.height = "auto";
    this.input.style.height = `${this.input.scrollHeight}px`;
  }

  #scrolled() {
    const { scrollHeight, scrollTop, clientHeight } = this.scroll;
    this.following = scrollHeight - scrollTop - clientHeight < 48;
    $("jump").hidden = this.following;
  }

  #follow() {
    if (this.following) this.scroll.scrollTop = this.scroll.scrollHeight;
  }
}

/** Seconds to the first token, and per token between later arrivals. */
function intervals(arrivals) {
  const itl = [];
  for (let i = 1; i < arrivals.length; i += 1) {
    const tokens = arrivals[i][1] - arrivals[i - 1][1];
    itl.push(...Array(tokens).fill((arrivals[i][0] - arrivals[i - 1][0]) / 1000 / tokens));
  }
  return [arrivals[0][0] / 1000, itl];
}

const spoken = (source) => (source.startsWith("```") ? "Code." : source.replace(/[*`#>]/g, ""));
