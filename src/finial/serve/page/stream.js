// The server's API as the page uses it: the model's facts, and one answer as a stream of events.
// Knows HTTP, server-sent events and what failures mean; nothing of the document.
//
//   for await (const event of answer(request, key, signal)) …   // {thought} {text} {usage} {reason}

/** A failure in words for a person; `kind` is "key", "busy", "refused", "lost" or "server". */
export class Failure extends Error {
  constructor(kind, message) {
    super(message);
    this.kind = kind;
  }
}

async function ask(path, key, options = {}) {
  // With a key of the page's own, the browser's is left out: it would ask for another one when this is refused.
  const credentials = key ? "omit" : "same-origin";
  const headers = { ...options.headers, ...(key ? { Authorization: `Bearer ${key}` } : {}) };
  let response;
  try {
    response = await fetch(path, { cache: "no-store", redirect: "error", ...options, credentials, headers });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Failure("lost", "The server cannot be reached.");
  }
  if (!response.ok) throw await failure(response);
  return response;
}

async function failure(response) {
  let said = "";
  try {
    said = (await response.json()).error?.message ?? "";
  } catch {
    // not one of the server's own answers: the status alone has to do
  }
  const { status } = response;
  if (status === 401 || status === 403) return new Failure("key", said || "This server asks for an API key.");
  if (status === 429 || status === 503) {
    const wait = Number(response.headers.get("Retry-After"));
    const again = wait > 0 ? ` Try again in ${wait} s.` : "";
    return new Failure("busy", (said || (status === 429 ? "The server is busy." : "The server is not ready.")) + again);
  }
  return new Failure(status < 500 ? "refused" : "server", said || `The server answered ${status}.`);
}

/** The first model that the server names, with what finial says about it. */
export async function model(key) {
  const response = await ask("/v1/models", key);
  const first = (await response.json()).data?.[0];
  if (!first) throw new Failure("server", "The server names no model.");
  return first;
}

/** The events of one answer; throws a Failure, or AbortError when `signal` ended it. */
export async function* answer(request, key, signal) {
  const response = await ask("/v1/chat/completions", key, {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify({ ...request, stream: true, stream_options: { include_usage: true, continuous_usage_stats: true } }),
    signal,
  });
  for await (const data of events(response.body)) {
    if (data === "[DONE]") return;
    const chunk = JSON.parse(data);
    if (chunk.error) throw new Failure("server", chunk.error.message || "The answer failed.");
    if (chunk.usage) yield { usage: chunk.usage };
    const choice = chunk.choices?.[0];
    if (choice) {
      const thought = choice.delta?.reasoning_content;
      const text = choice.delta?.content;
      if (thought) yield { thought };
      if (text) yield { text };
      if (choice.finish_reason) yield { reason: choice.finish_reason };
    }
  }
  throw new Failure("lost", "The connection ended in the middle of the answer.");
}

/** The data of each server-sent event (HTML standard, 9.2.6: lines end with CR, LF or both). */
async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  let data = [];
  try {
    for (;;) {
      let part;
      try {
        part = await reader.read();
      } catch (error) {
        if (error.name === "AbortError") throw error;
        return; // cut off: whoever reads misses the end
      }
      if (part.done) return;
      held += part.value;
      const keep = held.endsWith("\r") ? 1 : 0; // perhaps half of CR LF
      const lines = held.slice(0, held.length - keep).split(/\r\n|\n|\r/);
      held = lines.pop() + held.slice(held.length - keep);
      for (const line of lines) {
        if (line.startsWith("data:")) data.push(line.slice(line[5] === " " ? 6 : 5));
        else if (line === "" && data.length) {
          yield data.join("\n");
          data = [];
        }
      }
    }
  } finally {
    reader.cancel().catch(() => {}); // a reader that has failed has nothing left to cancel
  }
}
