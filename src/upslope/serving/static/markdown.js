// A model's text as elements. The text is hostile until shown otherwise: it only ever becomes text nodes inside a fixed
// set of elements without attributes of its own. There are no links and no images; every pass is linear in the text.

import { el } from "./dom.js";

const FENCE = /^ {0,3}(`{3,}|~{3,})[ \t]*([^`]*)$/;
const HEADING = /^ {0,3}(#{1,6})[ \t]+(.*)$/;
const RULE = /^ {0,3}(?:(?:\*[ \t]*){3,}|(?:-[ \t]*){3,}|(?:_[ \t]*){3,})$/;
const ITEM = /^([ \t]*)([-*+]|\d{1,9}[.)])[ \t]+(\S.*)$/;
const QUOTE = /^ {0,3}>[ \t]?(.*)$/;
const DIRECTION = /([\u202A-\u202E\u2066-\u2069]+)/;
const DEEPEST = 6;

/** Keeps `container` showing a growing text: only blocks that changed are built anew, so a selection stays. */
export class Rendering {
  constructor(container) {
    this.container = container;
    this.blocks = [];
  }

  /** Show `text`. */
  update(text) {
    const next = blocksOf(text);
    let same = 0;
    while (same < next.length && this.blocks[same]?.source === next[same].source) same++;
    for (const block of this.blocks.splice(same)) block.element.remove();
    for (const block of next.slice(same)) {
      block.element = block.build();
      this.container.append(block.element);
      this.blocks.push(block);
    }
  }
}

/** Text nodes of `text`; controls that turn the writing direction are shown by name, so that they turn nothing. */
export function appendText(parent, text) {
  for (const part of text.split(DIRECTION)) {
    if (DIRECTION.test(part)) {
      const code = part.codePointAt(0).toString(16).toUpperCase();
      parent.append(el("span", { class: "control" }, `U+${code}${part.length > 1 ? ` ×${part.length}` : ""}`));
    } else if (part) parent.append(part);
  }
}

function blocksOf(text) {
  const lines = text.replace(/\r\n?/g, "\n").split("\n");
  const blocks = [];
  for (let at = 0; at < lines.length; ) {
    const start = at;
    const [next, build] = blockAt(lines, at);
    at = next;
    if (build) blocks.push({ source: lines.slice(start, at).join("\n"), build });
  }
  return blocks;
}

function blockAt(lines, at) {
  const line = lines[at];
  if (!line.trim()) return [at + 1, null];
  const fence = FENCE.exec(line);
  if (fence) return fenced(lines, at, fence);
  const heading = HEADING.exec(line);
  if (heading) return [at + 1, () => inlined("p", heading[2], "heading")];
  if (RULE.test(line)) return [at + 1, () => el("hr")];
  if (ITEM.test(line)) return listed(lines, at);
  if (QUOTE.test(line)) return quoted(lines, at);
  let end = at + 1;
  while (end < lines.length && lines[end].trim() && !startsBlock(lines[end])) end++;
  const text = lines.slice(at, end).join("\n");
  return [end, () => inlined("p", text)];
}

function startsBlock(line) {
  return FENCE.test(line) || HEADING.test(line) || RULE.test(line) || ITEM.test(line) || QUOTE.test(line);
}

function fenced(lines, at, [, mark, language]) {
  let end = at + 1;
  const closes = (line) => line.trim().startsWith(mark) && !line.trim().replaceAll(mark[0], "");
  while (end < lines.length && !closes(lines[end])) end++;
  const text = lines.slice(at + 1, end).join("\n");
  return [
    Math.min(end + 1, lines.length),
    () => {
      const code = el("code");
      appendText(code, text);
      const label = language.trim().slice(0, 24);
      return el("pre", { tabindex: 0, dir: "ltr" }, label && el("span", { class: "language" }, label), code);
    },
  ];
}

function quoted(lines, at) {
  let end = at;
  while (end < lines.length && QUOTE.test(lines[end])) end++;
  const text = lines.slice(at, end).map((line) => QUOTE.exec(line)[1]).join("\n");
  return [end, () => el("blockquote", {}, inlined("p", text))];
}

// An item's lines: its first, and those after it that are indented and start nothing else.
function listed(lines, at) {
  const items = [];
  let end = at;
  for (; end < lines.length; end++) {
    const item = ITEM.exec(lines[end]);
    if (item) items.push({ indent: item[1].replaceAll("\t", "    ").length, mark: item[2], text: item[3] });
    else if (/^[ \t]+\S/.test(lines[end]) && !FENCE.test(lines[end])) items.at(-1).text += `\n${lines[end].trim()}`;
    else if (lines[end].trim() || !ITEM.test(lines[end + 1] ?? "")) break;
  }
  return [end, () => nested(items)];
}

function nested(items) {
  const listOf = ({ mark }) => (/\d/.test(mark) ? el("ol", { start: parseInt(mark, 10) }) : el("ul"));
  const stack = [{ indent: items[0].indent, list: listOf(items[0]) }];
  const first = stack[0].list;
  for (const item of items) {
    while (stack.length > 1 && item.indent < stack.at(-1).indent) stack.pop();
    const { indent, list } = stack.at(-1);
    if (item.indent >= indent + 2 && list.lastElementChild && stack.length < DEEPEST) {
      const inner = listOf(item);
      list.lastElementChild.append(inner);
      stack.push({ indent: item.indent, list: inner });
    }
    stack.at(-1).list.append(inlined("li", item.text));
  }
  return first;
}

function inlined(tag, text, kind = null) {
  const element = el(tag, { class: kind });
  appendInline(element, text, ["**", "__", "*", "_"]);
  element.dir = "auto"; // only now: with it every child added would be searched for its direction
  return element;
}

/** `code`, **bold**, *emphasis*. `marks` are those still allowed: a mark does not nest in itself. */
function appendInline(parent, text, marks) {
  const special = /[`*_\\]/g;
  const hopeless = new Set(); // marks that are never closed after here
  let plain = 0;
  for (;;) {
    const at = special.exec(text)?.index;
    if (at === undefined) break;
    if (text[at] === "\\" && /[`*_]/.test(text[at + 1] ?? "")) {
      appendText(parent, text.slice(plain, at));
      plain = at + 1;
      special.lastIndex = at + 2;
      continue;
    }
    const span = text[at] === "`" ? codeSpan(text, at, hopeless) : markSpan(text, at, marks, hopeless);
    if (!span.element) {
      special.lastIndex = span.end;
      continue;
    }
    appendText(parent, text.slice(plain, at));
    if (span.inner) appendInline(span.element, span.inner, marks.filter((mark) => mark !== span.mark));
    parent.append(span.element);
    plain = special.lastIndex = span.end;
  }
  appendText(parent, text.slice(plain));
}

function codeSpan(text, at, hopeless) {
  const open = /`+/y;
  open.lastIndex = at;
  const [ticks] = open.exec(text);
  const start = at + ticks.length;
  const runs = /`+/g;
  runs.lastIndex = start;
  for (let run; !hopeless.has(ticks) && (run = runs.exec(text)); ) {
    if (run[0].length !== ticks.length) continue;
    const element = el("code");
    appendText(element, text.slice(start, run.index));
    return { element, end: runs.lastIndex };
  }
  hopeless.add(ticks);
  return { end: start };
}

function markSpan(text, at, marks, hopeless) {
  const mark = text[at] === text[at + 1] ? text[at].repeat(2) : text[at];
  const start = at + mark.length;
  const inWord = mark[0] === "_" && /\w/.test(text[at - 1] ?? "");
  if (!marks.includes(mark) || hopeless.has(mark) || inWord || !/\S/.test(text[start] ?? "")) return { end: start };
  for (let close = text.indexOf(mark, start + 1); close >= 0; close = text.indexOf(mark, close + mark.length)) {
    const single = mark.length === 2 || (text[close - 1] !== mark && text[close + 1] !== mark);
    const wordGoesOn = mark[0] === "_" && /\w/.test(text[close + mark.length] ?? "");
    if (!single || wordGoesOn || /\s/.test(text[close - 1])) continue;
    const element = el(mark.length === 2 ? "strong" : "em");
    return { element, mark, inner: text.slice(start, close), end: close + mark.length };
  }
  hopeless.add(mark);
  return { end: start };
}
