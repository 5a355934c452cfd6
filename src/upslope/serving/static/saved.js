// What the server has saved for training, and how the blind comparisons stand.

import { json } from "./api.js";
import { el } from "./dom.js";
import { tallyView } from "./duel.js";
import { describe } from "./generate.js";
import { t } from "./strings.js";

/** Ask the server and show the answer in `body`. */
export async function showSaved(body, models) {
  try {
    const { folder, rows, tally } = await json("feedback");
    const files = Object.entries(rows).filter(([name, count]) => count && name !== "votes");
    const lines = files.map(([name, count]) => el("li", {}, t("saved_rows", { count, file: `${folder}/${name}.jsonl` })));
    body.replaceChildren(
      el("p", { class: "hint" }, t("saved_hint")),
      lines.length ? el("ul", {}, ...lines) : el("p", { class: "hint" }, t("nothing_saved")),
      ...[tallyView(tally, models)].filter(Boolean),
    );
  } catch (error) {
    body.replaceChildren(el("p", { class: "problem" }, describe(error)));
  }
}
