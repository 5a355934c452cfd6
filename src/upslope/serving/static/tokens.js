// Every token of a reply with its probability, and on hover or focus what else the model might have written there.
// The probability is told three ways: by the tint, by the kind of line below the token, and as a figure.

import { appendText } from "./markdown.js";
import { el } from "./dom.js";
import { language, t } from "./strings.js";

const BOUNDS = [0.9, 0.5, 0.2, 0.05];

/** Turns the API's logprobs entries into what is stored: [text, logprob, [[text, logprob], ...]]. */
export class TokenReader {
  // A token may hold part of a character only: its text appears at the token that completes it.
  decoder = new TextDecoder("utf-8", { ignoreBOM: true });

  read({ token, bytes, logprob, top_logprobs: top = [] }) {
    const text = bytes ? this.decoder.decode(new Uint8Array(bytes), { stream: true }) : token;
    return [text, rounded(logprob), top.map((other) => [nameOf(other), rounded(other.logprob)])];
  }
}

/** 0 for a likely token to 4 for a surprising one. */
export function level(probability) {
  const found = BOUNDS.findIndex((bound) => probability >= bound);
  return found < 0 ? BOUNDS.length : found;
}

/** A probability as a percentage with as many digits as it takes to tell it from 0 and 100. */
export function percent(probability) {
  const value = probability * 100;
  if (value > 0 && value < 0.01) return "<0.01%";
  if (value > 99.99 && value < 100) return ">99.99%";
  const digits = value < 0.1 || value > 99.9 ? 2 : value < 10 ? 1 : 0;
  return `${value.toLocaleString(language(), { minimumFractionDigits: digits, maximumFractionDigits: digits })}%`;
}

/** exp(-mean log-prob), and the token the model found least likely. */
export function summary(tokens) {
  const total = tokens.reduce((sum, [, logprob]) => sum + logprob, 0);
  const least = tokens.reduce((low, token) => (token[1] < low[1] ? token : low));
  return { perplexity: Math.exp(-total / tokens.length), least };
}

/** Shows the tokens of one reply in `container`: one tab stop, then the arrow keys. */
export class TokenView {
  constructor(container) {
    this.container = container;
    this.tokens = [];
    container.setAttribute("role", "group");
    container.setAttribute("aria-label", t("tokens"));
    container.addEventListener("focusin", (event) => this.focused(event.target));
    container.addEventListener("focusout", () => card.hide());
    container.addEventListener("pointerover", (event) => this.hovered(event));
    container.addEventListener("pointerout", (event) => card.leave(event.relatedTarget));
    container.addEventListener("click", (event) => event.target.closest(".token")?.focus());
    container.addEventListener("keydown", (event) => this.key(event));
  }

  /** Show `tokens`, of which the first ones may be shown already. */
  update(tokens) {
    for (const token of tokens.slice(this.tokens.length)) {
      this.container.append(this.build(token, this.tokens.length));
      this.tokens.push(token);
    }
  }

  build([text, logprob], index) {
    const probability = Math.exp(logprob);
    const span = el("span", {
      class: `token level-${level(probability)}${text ? "" : " part"}`,
      role: "button",
      tabindex: index ? -1 : 0,
      "data-index": index,
      "aria-label": `${named(text)}, ${percent(probability)}`,
      "aria-describedby": "alternatives",
    });
    appendText(span, text ? text.replaceAll("\n", "↵\n") : "·");
    return span;
  }

  focused(target) {
    const span = target.closest(".token");
    if (!span) return;
    for (const other of this.container.querySelectorAll('[tabindex="0"]')) other.tabIndex = -1;
    span.tabIndex = 0;
    card.show(span, this.tokens[span.dataset.index]);
  }

  hovered(event) {
    const span = event.target.closest(".token");
    if (span && event.pointerType !== "touch") card.show(span, this.tokens[span.dataset.index]);
  }

  key(event) {
    const span = event.target.closest(".token");
    if (!span) return;
    const steps = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: 1, ArrowUp: -1 };
    const last = this.tokens.length - 1;
    const now = Number(span.dataset.index);
    let next = null;
    if (event.key in steps) next = Math.min(last, Math.max(0, now + steps[event.key]));
    else if (event.key === "Home") next = 0;
    else if (event.key === "End") next = last;
    if (next === null) return;
    event.preventDefault();
    this.container.children[next].focus();
  }
}

/** What the tints and lines mean. */
export function legend() {
  const list = el("ul", { class: "legend", "aria-label": t("legend") });
  const edges = [1, ...BOUNDS, 0].map((bound) => Math.round(bound * 100));
  for (let i = 0; i < edges.length - 1; i++) {
    const range = i === 0 ? `≥ ${edges[1]}%` : i === BOUNDS.length ? `< ${edges[i]}%` : `${edges[i + 1]}–${edges[i]}%`;
    list.append(el("li", {}, el("span", { class: `level-${i}` }, range)));
  }
  return list;
}

/** A token as it can be read: white space by signs, between quotation marks. */
export function named(text) {
  return `“${signs(text) || "·"}”`;
}

const card = {
  element: null,
  span: null,

  show(span, [text, logprob, others]) {
    this.element = document.getElementById("alternatives");
    const listed = others.some(([other]) => other === text);
    const rank = others.findIndex(([other]) => other === text) + 1;
    const rows = listed ? others : [...others, [text, logprob]];
    const about = el("p", { class: "about" }, el("bdi", { class: "name" }), el("strong", {}, percent(Math.exp(logprob))));
    appendText(about.firstChild, named(text));
    const details = t(listed ? "ranked" : "unranked", { rank, listed: others.length, logprob: logprob.toFixed(3) });
    this.element.replaceChildren(about, el("p", { class: "details" }, details), this.list(rows, text));
    this.element.hidden = false;
    this.span = span;
    this.move(span);
  },

  list(rows, chosen) {
    const list = el("ol");
    for (const [text, logprob] of rows) {
      const probability = Math.exp(logprob);
      const bar = el("span", { class: "bar" });
      bar.style.setProperty("--share", probability);
      const name = el("bdi", { class: "name" });
      appendText(name, signs(text) || "·");
      list.append(el("li", { class: text === chosen ? "chosen" : null }, name, bar, el("span", {}, percent(probability))));
    }
    return list;
  },

  // Below the token's line where there is room, else above it; without a gap, so that the pointer can go there.
  move(span) {
    const [line] = span.getClientRects();
    const box = this.element.getBoundingClientRect();
    const edge = 8;
    const left = Math.max(edge, Math.min(line.left, document.documentElement.clientWidth - box.width - edge));
    const below = line.bottom + box.height + edge <= innerHeight;
    this.element.style.left = `${left}px`;
    this.element.style.top = `${below ? line.bottom : Math.max(edge, line.top - box.height)}px`;
  },

  leave(to) {
    if (!this.element?.contains(to) && !document.activeElement?.classList.contains("token")) this.hide();
  },

  hide() {
    if (this.element) this.element.hidden = true;
  },
};

/** Dismissed by Escape, by scrolling, and by leaving it. To be called once. */
export function startCard() {
  const element = document.getElementById("alternatives");
  addEventListener("keydown", (event) => {
    if (event.key === "Escape" && !element.hidden) {
      event.stopImmediatePropagation();
      card.hide();
    }
  }, { capture: true });
  addEventListener("scroll", () => element.hidden || card.move(card.span), { passive: true });
  element.addEventListener("pointerleave", (event) => {
    if (!event.relatedTarget?.closest?.(".token")) card.hide();
  });
}

function signs(text) {
  return text.replaceAll(" ", "␣").replaceAll("\n", "↵").replaceAll("\t", "⇥").replaceAll("\r", "␍");
}

function nameOf({ token, bytes }) {
  if (!bytes) return token;
  try {
    return new TextDecoder("utf-8", { fatal: true, ignoreBOM: true }).decode(new Uint8Array(bytes));
  } catch {
    return `⟨${bytes.map((byte) => byte.toString(16).toUpperCase().padStart(2, "0")).join(" ")}⟩`;
  }
}

// Log-probs of -Infinity are no JSON; servers write a very small number or null for them.
function rounded(logprob) {
  return Number.isFinite(logprob) ? Math.round(logprob * 1e4) / 1e4 : -9999;
}
