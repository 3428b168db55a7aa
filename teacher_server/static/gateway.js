// The page as a client of the gateway: one function a question, one error class for everything that is not an answer.

const TIMEOUT_MS = 60_000;
const STORED_KEY = 'distill.api-key';

/** A question without an answer. `status` 0: the gateway was not reached. `retryAfterS` is null where asking again is of no use. */
export class GatewayError extends Error {
  constructor(status, message, retryAfterS = null) {
    super(message);
    this.status = status;
    this.retryAfterS = retryAfterS;
  }
}

/** The API key: for this tab only, gone with it, never in a cookie or a URL. */
export const apiKey = {
  value: readStored(),
  set(key) {
    this.value = key;
    try {
      if (key) sessionStorage.setItem(STORED_KEY, key);
      else sessionStorage.removeItem(STORED_KEY);
    } catch {
      // Storage is switched off in this browser; the key lives until the page is reloaded.
    }
  },
};

/** Where an endpoint is, also behind a proxy that puts the gateway under a prefix. */
export function address(path) {
  return new URL(path, document.baseURI).href;
}

export async function getStats() {
  return (await ask('v1/stats')).json();
}

/** The teacher that is served. */
export async function getModel() {
  return (await (await ask('v1/models')).json()).models[0];
}

/** Whether a label really comes out now. Throws a GatewayError only when the gateway itself is away. */
export async function isReady() {
  try {
    await ask('readyz');
    return true;
  } catch (error) {
    if (error.status === 503) return false;
    throw error;
  }
}

/** The logits of one image file, as the gateway wrote them (`text`) and as an object (`answer`). */
export async function askLogits(file, signal) {
  const body = await readFile(file);
  const headers = { 'Content-Type': mediaType(file) };
  const response = await ask('v1/soft-labels?return=logits', { method: 'POST', body, headers, signal });
  const text = await response.text();
  return { text, answer: JSON.parse(text) };
}

/** What the file is sent as. Without a type the gateway says which ones it takes. */
export function mediaType(file) {
  return file.type || 'application/octet-stream';
}

async function readFile(file) {
  try {
    return await file.arrayBuffer();
  } catch {
    throw new GatewayError(-1, 'The browser cannot read this file. Is it a folder, or was it moved?');
  }
}

async function ask(path, options = {}) {
  const { signal } = options;
  const timeout = AbortSignal.timeout(TIMEOUT_MS);
  const key = apiKey.value;
  let response;
  try {
    response = await fetch(address(path), {
      ...options,
      headers: { ...options.headers, ...(key && { Authorization: `Bearer ${key}` }) },
      signal: signal ? AbortSignal.any([signal, timeout]) : timeout,
      cache: 'no-store',
      credentials: 'same-origin',
      redirect: 'error',
    });
  } catch (error) {
    if (signal?.aborted) throw error;
    throw new GatewayError(0, 'The gateway cannot be reached.', 2);
  }
  // Another key was entered meanwhile: this answer says nothing about it.
  if (response.status === 401 && key !== apiKey.value) return ask(path, options);
  if (!response.ok) throw await errorOf(response);
  return response;
}

/** What a refusal means for the person in front of the page; the gateway's own words follow where they help. */
async function errorOf(response) {
  const { status } = response;
  const said = await saidBy(response);
  const wait = Math.max(1, Number(response.headers.get('Retry-After')) || 1);
  const meanings = {
    401: ['This server wants an API key. Enter it at the top of the page.'],
    403: [`This API key may not do that. ${said}`],
    408: [`The image did not arrive in time. ${said}`],
    413: [`The file is larger than this server takes. ${said}`],
    415: [`This kind of file is not read here. Send JPEG, PNG or WebP. ${said}`],
    422: [said || 'The server refused this image.'],
    429: [`The server has enough to do for now, or your quota is used up. ${said}`, wait],
    503: [`The teacher does not answer now. ${said}`, wait],
    504: [`The answer took too long. ${said}`],
  };
  const [message, retryAfterS] = meanings[status] ?? [`The server answered ${status}. ${said}`];
  return new GatewayError(status, message.trim(), retryAfterS ?? null);
}

async function saidBy(response) {
  try {
    const { message } = (await response.json()).error;
    return message ? `${message[0].toUpperCase()}${message.slice(1)}.`.replace(/([.!?])\.$/, '$1') : '';
  } catch {
    return '';
  }
}

function readStored() {
  try {
    return sessionStorage.getItem(STORED_KEY) ?? '';
  } catch {
    return '';
  }
}
