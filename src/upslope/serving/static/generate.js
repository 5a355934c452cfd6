// One reply: asked of the server with the sampling settings, read as it comes, written into its node.

import { ApiFailure, stream } from "./api.js";
import { randomSeed } from "./dom.js";
import { t } from "./strings.js";
import { TokenReader } from "./tokens.js";
import { messagesTo, parentOf, place } from "./tree.js";

export const ALTERNATIVES = 5;

/**
 * Stream a reply into `node`. Resolves when it has ended: whole, stopped through `signal`, or failed (node.error).
 * `touched()` is called whenever something was added.
 */
export async function generate(conversation, node, settings, { signal, touched }) {
  const above = parentOf(conversation, node);
  // A fixed seed would give the same reply again: an alternative takes the next one.
  const seed = settings.seed === null ? randomSeed() : (settings.seed + place(conversation, node).index) % 2 ** 31;
  Object.assign(node, { state: "streaming", seed, system: settings.system, content: "", tokens: [] });
  const body = { model: node.model, messages: messagesTo(conversation, above, settings.system), seed };
  for (const name of ["temperature", "top_p", "top_k", "min_p", "max_tokens"]) {
    if (settings[name] !== null) body[name] = settings[name];
  }
  body.stream_options = { include_usage: true };
  if (settings.logprobs) Object.assign(body, { logprobs: true, top_logprobs: ALTERNATIVES });
  const reader = new TokenReader();
  let first = null;
  try {
    await stream("v1/chat/completions", body, {
      signal,
      started: (headers) => version(node, headers.get("X-Weight-Version")),
      chunk: (chunk) => {
        first ??= performance.now();
        read(node, chunk, reader);
        touched();
      },
    });
  } catch (error) {
    if (error.name === "AbortError") node.finish = "cancelled";
    else node.error = describe(error);
  }
  const seconds = (performance.now() - first) / 1000;
  if (first !== null && node.count > 1 && seconds > 0) node.rate = (node.count - 1) / seconds;
  if (!node.tokens.length) delete node.tokens;
  delete node.state;
}

function read(node, chunk, reader) {
  version(node, /@(\d+)$/.exec(chunk.system_fingerprint ?? "")?.[1]);
  if (chunk.usage) node.count = chunk.usage.completion_tokens;
  const [choice] = chunk.choices;
  if (!choice) return;
  node.content += choice.delta?.content ?? "";
  for (const entry of choice.logprobs?.content ?? []) node.tokens.push(reader.read(entry));
  if (choice.finish_reason) node.finish = choice.finish_reason;
}

function version(node, text) {
  if (text) node.version = Number(text);
}

/** What to tell the reader about a failure. */
export function describe(error) {
  if (!(error instanceof ApiFailure)) return String(error.message);
  if (error.status === 0) return t("no_server", { message: error.message });
  if (error.retryAfter) return t("retry_after", { message: `${error.message}.`, seconds: error.retryAfter });
  return error.message;
}
