// Requests to this server, and its errors in plain words. Nothing here speaks to another host.

const KEY = "nvfp4-api-key";
const key = () => sessionStorage.getItem(KEY);

export const hasKey = () => key() !== null;
export const setKey = (value) => sessionStorage.setItem(KEY, value);
export const forgetKey = () => sessionStorage.removeItem(KEY);

/** What a header can carry. */
export const isPossibleKey = (value) => /^[\x21-\x7e]+$/.test(value);

/** An answer that is not the one hoped for. `status` 0: there was none. `message` is for people. */
export class ApiError extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

export async function getJson(path, signal) {
  return (await request(path, { signal })).json();
}

export async function getText(path, signal) {
  return (await request(path, { signal })).text();
}

async function request(path, options) {
  const headers = { ...options.headers };
  if (hasKey()) headers.authorization = `Bearer ${key()}`;
  let response;
  try {
    response = await fetch(path, { ...options, headers, cache: "no-store", credentials: "omit", redirect: "error" });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError(0, "The server cannot be reached. It may be stopped, or the network is down.");
  }
  if (!response.ok) throw await failure(response);
  return response;
}

async function failure(response) {
  let said = "";
  try {
    said = (await response.json()).error.message;
  } catch { /* not JSON: its status says enough */ }
  return new ApiError(response.status, inWords(response.status, said, response.headers.get("retry-after")));
}

/** What an HTTP status, or the code of an error event, means for who reads it; the server's own words after it. */
export function inWords(status, said, retryAfter = null) {
  const detail = said ? ` The server says: ${said}` : "";
  if (status === 401) return "The server asks for an API key.";
  if (status === 413) return "The conversation is too long to send. Clear it, or shorten the message.";
  if (status === 429) {
    const wait = retryAfter ? ` Try again in ${retryAfter} s.` : " Try again in a moment.";
    return `The server is full: too many requests are waiting.${wait}`;
  }
  if (status === 503) return `The model is not running.${detail}`;
  if (status === 400 || status === 404) return `The server refused the request.${detail}`;
  if (status >= 500) return `Something went wrong on the server.${detail}`;
  return `The server answered with status ${status}.${detail}`;
}

/**
 * Streams a chat completion: yields the parsed chunks. Throws ApiError for a refusal, an error event, and a stream that
 * ends before it is complete.
 */
export async function* streamChat(body, requestId, signal) {
  const response = await request("/v1/chat/completions", {
    method: "POST",
    headers: { "content-type": "application/json", "x-request-id": requestId },
    body: JSON.stringify(body),
    signal,
  });
  for await (const data of eventData(response.body)) {
    if (data === "[DONE]") return;
    const chunk = JSON.parse(data);
    if (chunk.error) throw new ApiError(chunk.error.code, inWords(chunk.error.code, chunk.error.message));
    yield chunk;
  }
  throw new ApiError(0, "The connection ended in the middle of the answer.");
}

/** The data of each server-sent event; events are separated by an empty line, whatever the packets were. */
export async function* eventData(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      let part;
      try {
        part = await reader.read();
      } catch (error) {
        if (error.name === "AbortError") throw error;
        throw new ApiError(0, "The connection broke in the middle of the answer.");
      }
      if (part.done) return;
      const events = (rest + part.value).split("\n\n");
      rest = events.pop();
      for (const event of events) {
        const lines = event.split("\n").filter((line) => line.startsWith("data:"));
        if (lines.length) yield lines.map((line) => line.slice(5).replace(/^ /, "")).join("\n");
      }
    }
  } finally {
    reader.cancel().catch(() => {}); // of a stream that has failed already: it cannot be cancelled again
  }
}

/** A name for a request that this page will know again in GET /requests. */
export function newRequestId() {
  const bytes = crypto.getRandomValues(new Uint8Array(12));
  return "ui-" + Array.from(bytes, (byte) => byte.toString(16).padStart(2, "0")).join("");
}
