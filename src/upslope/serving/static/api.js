// The server's HTTP API: JSON requests, streamed replies, and the key that a 401 asks for.

import { apiKey, setApiKey } from "./store.js";

/** An answer that is no success. `status` 0: no answer at all. */
export class ApiFailure extends Error {
  constructor(status, message, retryAfter = null) {
    super(message);
    this.status = status;
    this.retryAfter = retryAfter;
  }
}

let askForKey = async () => null;

/** Set what to do on 401: a function (wrong: boolean) => Promise of a key, or of null when the reader gives none. */
export function onUnauthorized(ask) {
  askForKey = ask;
}

/** The body of a GET, or of a POST when `body` is given. */
export async function json(path, body) {
  return (await send(path, body)).json();
}

/** One reply: `started(headers)` at the first byte, then `chunk(object)` for each event until the server says it is done. */
export async function stream(path, body, { signal, started, chunk }) {
  const response = await send(path, { ...body, stream: true }, signal);
  started(response.headers);
  let done = false;
  for await (const data of events(response.body)) {
    if (data === "[DONE]") {
      done = true;
      continue;
    }
    const value = JSON.parse(data);
    if (value.error) throw new ApiFailure(500, value.error.message ?? "");
    chunk(value);
  }
  if (!done) throw new ApiFailure(0, "the connection ended before the reply did");
}

async function send(path, body, signal) {
  for (let wrong = false; ; wrong = true) {
    const key = apiKey();
    const response = await request(path, body, signal, key);
    if (response.ok) return response;
    if (response.status !== 401) throw await failure(response);
    // Another request may have been given a key meanwhile.
    const next = apiKey() === key ? await askForKey(wrong || key !== null) : apiKey();
    if (next === null) throw await failure(response);
    setApiKey(next);
  }
}

async function request(path, body, signal, key) {
  const headers = {};
  if (key !== null) headers.Authorization = `Bearer ${key}`;
  if (body !== undefined) headers["Content-Type"] = "application/json";
  try {
    return await fetch(path, {
      method: body === undefined ? "GET" : "POST",
      headers,
      body: body === undefined ? undefined : JSON.stringify(body, wellFormed),
      signal,
      credentials: "same-origin",
      cache: "no-store",
    });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiFailure(0, error.message);
  }
}

// Half a surrogate pair (a cut emoji) is no text that a tokenizer takes.
function wellFormed(_, value) {
  return typeof value === "string" && value.toWellFormed ? value.toWellFormed() : value;
}

async function failure(response) {
  let message = `${response.status} ${response.statusText}`;
  try {
    message = (await response.json()).error.message ?? message;
  } catch {
    // a proxy's page, not the server's JSON: the status says enough
  }
  return new ApiFailure(response.status, message, response.headers.get("Retry-After"));
}

/** The data of every server-sent event in a body of UTF-8 bytes, however the network cuts it. */
export async function* events(body) {
  const decoder = new TextDecoder();
  const reader = body.getReader();
  let rest = "";
  let data = [];
  try {
    for (;;) {
      const { value, done } = await reader.read();
      rest += done ? `${decoder.decode()}\n\n` : decoder.decode(value, { stream: true });
      const lines = rest.split("\n");
      rest = lines.pop();
      for (const raw of lines) {
        const line = raw.endsWith("\r") ? raw.slice(0, -1) : raw;
        if (line.startsWith("data:")) data.push(line.slice(line[5] === " " ? 6 : 5));
        else if (line === "" && data.length) {
          yield data.join("\n");
          data = [];
        }
      }
      if (done) return;
    }
  } finally {
    await reader.cancel().catch(() => {});
  }
}
