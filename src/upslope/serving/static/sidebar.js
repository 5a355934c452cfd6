// The list of conversations, and the file that one is exported as.

import { el, iconButton } from "./dom.js";
import { t } from "./strings.js";
import { messagesTo, path, titleOf } from "./tree.js";

/** Show `conversations` in `list`, the open one marked. */
export function showList(list, conversations, current, { open, remove }) {
  const rows = conversations.map((conversation) => {
    const title = titleOf(conversation) || t("untitled");
    const row = el(
      "button",
      { type: "button", class: "row", "aria-current": conversation.id === current ? "true" : null, onclick: () => open(conversation) },
      el("bdi", {}, title),
    );
    return el("li", {}, row, iconButton("trash", t("delete_conversation", { title }), () => remove(conversation)));
  });
  list.replaceChildren(...rows);
}

/** Let the browser save the conversation: `messages` is the shown branch, `tree` everything. */
export function download(conversation, system) {
  const last = path(conversation).at(-1) ?? conversation.nodes.root;
  const content = { messages: messagesTo(conversation, last, last.system ?? system), tree: conversation };
  const url = URL.createObjectURL(new Blob([JSON.stringify(content, null, 1)], { type: "application/json" }));
  el("a", { href: url, download: `conversation-${new Date().toISOString().slice(0, 19).replaceAll(":", "")}.json` }).click();
  setTimeout(() => URL.revokeObjectURL(url));
}
