// Blind A/B: two replies side by side, in an order shuffled each time, their models named only after the vote.

import { el } from "./dom.js";
import { t } from "./strings.js";
import { parentOf } from "./tree.js";

/** The two models in either order, each as likely as the other. */
export function shuffled([a, b]) {
  return crypto.getRandomValues(new Uint8Array(1))[0] & 1 ? [a, b] : [b, a];
}

/** The two nodes of a duel, left and right. */
export function sidesOf(conversation, node) {
  return parentOf(conversation, node)
    .children.map((id) => conversation.nodes[id])
    .filter((other) => other.duel?.id === node.duel.id);
}

/** The body of POST feedback/vote. winner: 0 left, 1 right, null tie. */
export function voteBody(messages, sides, winner) {
  const [a, b] = sides.map(({ model, content, version }) => ({ model, reply: content, weight_version: version ?? null }));
  return { id: sides[0].duel.id, messages, a, b, winner: winner === null ? "tie" : "ab"[winner] };
}

/** True where a duel is shown side by side: until the vote, and after it while nothing follows. */
export function isOpen(conversation, node) {
  return Boolean(node.duel) && (!node.duel.winner || !sidesOf(conversation, node).some((side) => side.children.length));
}

/** Both replies; the vote once both have ended; then the names. `thread` builds the replies and has the actions. */
export function duelView(thread, conversation, node) {
  const sides = sidesOf(conversation, node);
  if (node.duel.winner) {
    const columns = sides.map((side) => el("article", { class: "turn side", "data-node": side.id }, ...thread.replyParts(side)));
    return el("div", { class: "duel" }, el("div", { class: "sides" }, ...columns), thread.score);
  }
  const running = sides.some((side) => side.state === "streaming");
  const failed = sides.some((side) => side.error);
  const columns = sides.map((side, index) =>
    el(
      "article",
      { class: "turn side", "data-node": side.id, "aria-busy": side.state === "streaming" ? "true" : null },
      el("h2", { class: "who" }, t("reply_number", { number: index + 1 })),
      thread.reply(side),
    ),
  );
  const choose = (name, label, winner) =>
    el("button", { type: "button", "data-do": name, onclick: () => thread.actions.vote(sides, winner) }, label);
  const ballot = el(
    "div",
    { class: "ballot", role: "group", "aria-label": t("vote_question"), "data-node": node.duel.id },
    el("p", {}, t("vote_question")),
    failed ? null : choose("first", t("better", { number: 1 }), 0),
    failed ? null : choose("tie", t("tie"), null),
    failed ? null : choose("second", t("better", { number: 2 }), 1),
    el("button", { type: "button", class: "text", "data-do": "skip", onclick: () => thread.actions.skip(sides) }, t("skip_vote")),
  );
  return el("div", { class: "duel" }, el("div", { class: "sides" }, ...columns), running ? null : ballot);
}

/** The votes so far in one line, as after a vote. */
export function scoreLine(tally, models) {
  const found = pairOf(tally, models);
  const [a, b] = found.models;
  return el("p", { class: "score" }, `${a} ${found.wins[0]} : ${found.wins[1]} ${b}`, found.ties ? ` (${t("ties", found)})` : null);
}

function pairOf(tally, models) {
  return tally.find((pair) => pair.models.every((name) => models.includes(name)));
}

/** The votes on the two served models as bars; null while there is none. */
export function tallyView(tally, models) {
  const found = pairOf(tally, models);
  if (!found) return null;
  const total = found.wins[0] + found.wins[1] + found.ties;
  const rows = found.models.map((name, index) => {
    const bar = el("span", { class: "bar" });
    bar.style.setProperty("--share", total ? found.wins[index] / total : 0);
    const share = `${Math.round((100 * found.wins[index]) / total)}%`;
    return el("li", {}, el("bdi", { class: "name" }, name), bar, el("span", {}, `${found.wins[index]} · ${share}`));
  });
  return el(
    "div",
    { class: "tally" },
    el("h4", {}, t("tally_title")),
    el("ol", {}, ...rows),
    el("p", { class: "hint" }, t("tally_ties", { ties: found.ties, total })),
  );
}
