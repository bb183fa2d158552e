// The live panel: /metrics once a second while the page is visible, as figures and charts.

import { getText } from "./api.js";
import { Chart } from "./chart.js";
import { $, setText } from "./dom.js";
import * as format from "./format.js";
import { growth, histogram, observations, parse, quantileOf, quantileOfValues, total } from "./prometheus.js";

const SPAN = 300; // seconds that charts and quantiles look back
const TTFT = "vllm:time_to_first_token_seconds";
const ITL = "vllm:inter_token_latency_seconds";

export class Live {
  #scrapes = []; // {time, counters, ttft, itl}, oldest first, SPAN seconds of them
  #own = []; // {time, ttft, itl: []}: what this page measured on its own requests

  constructor() {
    const chart = (id, options) => new Chart($(id), { span: SPAN, ...options });
    const [a, b] = ["a", "b"];
    this.throughput = chart("chart-throughput", {
      label: "Tokens per second", show: format.rate, series: [{ name: "generated", className: a }],
    });
    this.latency = chart("chart-latency", {
      label: "Mean time between tokens", show: (ms) => format.seconds(ms / 1000), series: [{ name: "mean", className: a }],
    });
    this.kv = chart("chart-kv", {
      label: "KV cache in use", show: (share) => `${Math.round(share)} %`, max: 100, series: [{ name: "in use", className: a }],
    });
    this.load = chart("chart-load", {
      label: "Requests", show: format.rate,
      series: [{ name: "running", className: a }, { name: "waiting", className: b }],
    });
  }

  /** What this page saw of one of its answers: seconds to the first token, and between later ones. */
  measured(ttft, itl) {
    this.#own.push({ time: performance.now() / 1000, ttft, itl });
    this.#showOwn();
  }

  async update(signal) {
    this.show(parse(await getText("/metrics", signal)), performance.now() / 1000);
  }

  show(samples, time) {
    const now = {
      time,
      generation: total(samples, "vllm:generation_tokens_total"),
      prompt: total(samples, "vllm:prompt_tokens_total"),
      ttft: histogram(samples, TTFT),
      itl: histogram(samples, ITL),
    };
    const last = this.#scrapes[this.#scrapes.length - 1];
    this.#scrapes.push(now);
    while (this.#scrapes[0].time < time - SPAN) this.#scrapes.shift();
    this.#showLoad(samples, time);
    this.#showKv(samples, time);
    if (last !== undefined && now.generation >= last.generation && now.prompt >= last.prompt) {
      const perSecond = (name) => (now[name] - last[name]) / (time - last.time);
      setText("rate-generation", format.rate(perSecond("generation")));
      setText("rate-prompt", format.rate(perSecond("prompt")));
      this.throughput.add(time, [perSecond("generation")]);
      const between = growth(now.itl, last.itl);
      const seen = observations(between);
      this.latency.add(time, [seen > 0 ? between.sum / seen * 1000 : null]);
    }
    const [first] = this.#scrapes;
    for (const name of ["ttft", "itl"]) {
      const grown = growth(now[name], first === now ? null : first[name]);
      setText(`${name}-50`, format.quantile(quantileOf(grown, 0.5)));
      setText(`${name}-95`, format.quantile(quantileOf(grown, 0.95)));
    }
    this.#showOwn();
  }

  /** A moment without an answer is a gap in every chart. */
  gap() {
    const time = performance.now() / 1000;
    this.load.add(time, [null, null]);
    for (const chart of [this.throughput, this.latency, this.kv]) chart.add(time, [null]);
    for (const id of ["rate-generation", "rate-prompt", "running", "waiting"]) setText(id, "–");
  }

  #showLoad(samples, time) {
    const running = total(samples, "vllm:num_requests_running");
    const waiting = total(samples, "vllm:num_requests_waiting");
    setText("running", format.count(running));
    setText("waiting", format.count(waiting));
    setText("preempted", format.count(total(samples, "vllm:num_preemptions_total")));
    this.load.add(time, [running, waiting]);
  }

  #showKv(samples, time) {
    const used = total(samples, "nvfp4_kv_cache_used_blocks");
    const blocks = total(samples, "nvfp4_kv_cache_blocks");
    const share = blocks ? used / blocks * 100 : 0;
    const facts = (samples.get("vllm:cache_config_info") ?? [{ labels: {} }])[0].labels;
    const size = Number(facts.block_size);
    setText("kv-facts", `${format.bytes(total(samples, "nvfp4_kv_cache_bytes"))}, ${facts.cache_dtype}`);
    setText("kv-text", `${format.count(used * size)} of ${format.count(blocks * size)} tokens`);
    const asked = total(samples, "vllm:prefix_cache_queries_total");
    const hits = total(samples, "vllm:prefix_cache_hits_total");
    setText("kv-hits", asked ? `prefix hits ${Math.round(hits / asked * 100)} %` : "");
    const meter = $("kv-meter");
    meter.setAttribute("aria-valuenow", Math.round(share));
    meter.setAttribute("aria-valuetext", `${Math.round(share)} %, ${$("kv-text").textContent}`);
    $("kv-fill").style.width = `${share}%`;
    this.kv.add(time, [share]);
  }

  #showOwn() {
    const since = performance.now() / 1000 - SPAN;
    this.#own = this.#own.filter(({ time }) => time >= since);
    const measures = { ttft: this.#own.map(({ ttft }) => ttft), itl: this.#own.flatMap(({ itl }) => itl) };
    for (const [name, values] of Object.entries(measures)) {
      setText(`own-${name}-50`, format.quantile(quantileOfValues(values, 0.5)));
      setText(`own-${name}-95`, format.quantile(quantileOfValues(values, 0.95)));
    }
  }
}
