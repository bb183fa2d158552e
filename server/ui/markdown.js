// The little Markdown that models write, as elements made one by one: code, lists, headings, quotes, bold, italic.
// No links, no images, no HTML: whatever else a model writes is shown as the text it is.

import { copyButton, el } from "./dom.js";

const FENCE = /^ {0,3}(`{3,}|~{3,})[ \t]*([^`\s]*)/;
const HEADING = /^ {0,3}(#{1,6})[ \t]+(.*)$/;
const ITEM = /^([ \t]*)(?:[-*+]|(\d{1,9})[.)])[ \t]+(.*)$/;
const RULE = /^ {0,3}(?:(?:-[ \t]*){3,}|(?:\*[ \t]*){3,}|(?:_[ \t]*){3,})$/;
const MAX_DEPTH = 6;

/** The blocks of a text, in order: [{kind, source lines, ...}]. Each depends on its own lines only. */
export function blocksOf(text) {
  const lines = text.split("\n");
  const blocks = [];
  for (let i = 0; i < lines.length;) {
    const start = i;
    const line = lines[i];
    const fence = FENCE.exec(line);
    let kind;
    if (line.trim() === "") { i += 1; continue; }
    if (fence) {
      kind = "code";
      i += 1;
      while (i < lines.length && !closes(lines[i], fence[1])) i += 1;
      i = Math.min(i + 1, lines.length);
    } else if (HEADING.test(line)) {
      kind = "heading";
      i += 1;
    } else if (RULE.test(line)) {
      kind = "rule";
      i += 1;
    } else if (ITEM.test(line)) {
      kind = "list";
      while (i < lines.length && (ITEM.test(lines[i]) || /^[ \t]+\S/.test(lines[i]) || looseItem(lines, i))) i += 1;
    } else if (/^ {0,3}>/.test(line)) {
      kind = "quote";
      while (i < lines.length && /^ {0,3}>/.test(lines[i])) i += 1;
    } else {
      kind = "paragraph";
      i += 1;
      while (i < lines.length && !endsParagraph(lines[i])) i += 1;
    }
    blocks.push({ kind, source: lines.slice(start, i).join("\n") });
  }
  return blocks;
}

const closes = (line, marker) => line.trim().startsWith(marker) && line.trim().replaceAll(marker[0], "") === "";
const looseItem = (lines, i) => lines[i].trim() === "" && i + 1 < lines.length && ITEM.test(lines[i + 1]);
const endsParagraph = (line) =>
  line.trim() === "" || FENCE.test(line) || HEADING.test(line) || ITEM.test(line) || RULE.test(line) || /^ {0,3}>/.test(line);

/** One block as an element. */
export function elementOf({ kind, source }, depth = 0) {
  const lines = source.split("\n");
  if (kind === "code") return codeBlock(source);
  if (kind === "heading") {
    const [, marks, text] = HEADING.exec(source);
    return el("p", { role: "heading", "aria-level": String(Math.min(6, marks.length + 2)), class: "heading" },
      ...inline(text.replace(/[ \t]+#+[ \t]*$/, "")));
  }
  if (kind === "rule") return el("hr");
  if (kind === "list") return list(lines.filter((line) => line.trim() !== ""));
  if (kind === "quote" && depth < MAX_DEPTH) {
    const inner = lines.map((line) => line.replace(/^ {0,3}> ?/, "")).join("\n");
    return el("blockquote", {}, ...blocksOf(inner).map((block) => elementOf(block, depth + 1)));
  }
  return el("p", {}, ...inline(source));
}

function codeBlock(source) {
  const language = FENCE.exec(source)[2].slice(0, 32);
  const code = el("code", {}, codeOf(source));
  return el("div", { class: "code" },
    el("div", { class: "code-head" }, el("span", {}, language), copyButton(() => code.textContent, "Copy the code")),
    el("pre", { tabindex: "0", role: "group", "aria-label": `Code ${language}`.trim() }, code));
}

/** What stands between the fences; the second may not have come yet. */
function codeOf(source) {
  const lines = source.split("\n");
  const closed = lines.length > 1 && closes(lines[lines.length - 1], FENCE.exec(source)[1]);
  return lines.slice(1, closed ? -1 : undefined).join("\n");
}

/** Items by indentation: deeper ones belong to the item before. */
function list(lines) {
  const root = { indent: -1, list: null, item: null };
  const open = [root];
  for (const line of lines) {
    const match = ITEM.exec(line);
    const top = open[open.length - 1];
    if (!match) {
      top.item.append(" ", ...inline(line.trim()));
      continue;
    }
    const indent = match[1].replaceAll("\t", "    ").length;
    while (open.length > 2 && indent < open[open.length - 1].indent) open.pop();
    let level = open[open.length - 1];
    if (level === root || (indent > level.indent + 1 && open.length <= MAX_DEPTH)) {
      const ordered = match[2] !== undefined;
      level = { indent, list: el(ordered ? "ol" : "ul", { start: ordered ? match[2] : null }), item: null };
      (open[open.length - 1].item ?? { append: (made) => { root.list = made; } }).append(level.list);
      open.push(level);
    }
    level.item = el("li", {}, ...inline(match[3]));
    level.list.append(level.item);
  }
  return root.list;
}

/**
 * Code spans, bold and italic of one run of text, as nodes. Linear in its length: a closing mark that was looked for in
 * vain is not looked for again.
 */
export function inline(text, depth = 0) {
  const nodes = [];
  const missing = new Set();
  let plain = "";
  const flush = () => { if (plain) nodes.push(document.createTextNode(plain)); plain = ""; };
  for (let i = 0; i < text.length;) {
    const mark = markAt(text, i);
    const end = mark && !missing.has(mark) && opens(text, i, mark) ? closing(text, i + mark.length, mark) : -1;
    if (mark && end < 0 && opens(text, i, mark)) missing.add(mark);
    if (end < 0 || depth >= MAX_DEPTH) {
      plain += mark || text[i];
      i += mark ? mark.length : 1;
      continue;
    }
    flush();
    const inner = text.slice(i + mark.length, end);
    if (mark[0] === "`") nodes.push(el("code", {}, inner.replace(/^ (.*) $/s, "$1")));
    else nodes.push(el(mark.length === 2 ? "strong" : "em", {}, ...inline(inner, depth + 1)));
    i = end + mark.length;
  }
  flush();
  return nodes;
}

/** The mark that stands at `i`: backticks as many as there are, **, * or nothing. */
function markAt(text, i) {
  if (text[i] === "*") return text[i + 1] === "*" ? "**" : "*";
  if (text[i] !== "`") return "";
  let end = i;
  while (text[end] === "`") end += 1;
  return text.slice(i, end);
}

const opens = (text, i, mark) => mark[0] === "`" || /\S/.test(text[i + mark.length] ?? " ");

function closing(text, from, mark) {
  for (let at = text.indexOf(mark, from); at >= 0; at = text.indexOf(mark, at + 1)) {
    if (mark[0] === "`") {
      if (text[at - 1] !== "`" && text[at + mark.length] !== "`") return at;
    } else if (at > from && /\S/.test(text[at - 1]) && (mark === "**" || (text[at + 1] !== "*" && text[at - 1] !== "*"))) {
      return at;
    }
  }
  return -1;
}

/** A container kept equal to a growing text: blocks whose source has not changed keep their elements. */
export class Rendered {
  #blocks = [];

  constructor(container) {
    this.container = container;
  }

  show(text) {
    const blocks = blocksOf(text);
    blocks.forEach((block, i) => {
      const last = this.#blocks[i];
      const shown = this.container.children[i];
      if (last === undefined) this.container.append(elementOf(block));
      else if (grows(last, block)) shown.querySelector("code").textContent = codeOf(block.source);
      else if (last.kind !== block.kind || last.source !== block.source) shown.replaceWith(elementOf(block));
    });
    while (this.container.children.length > blocks.length) this.container.lastChild.remove();
    this.#blocks = blocks;
    return blocks;
  }
}

/** Code that goes on keeps its element, and with it the reader's place in it. */
const grows = (last, block) =>
  last.kind === "code" && block.kind === "code" && last.source !== block.source
  && last.source.includes("\n") && block.source.startsWith(last.source.split("\n", 1)[0] + "\n");
