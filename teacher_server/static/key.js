// The field for the API key: it appears when the gateway answers 401, and keeps the key for this tab only.

import { apiKey } from './gateway.js';

/** `onKey()` is called when there is a new key to try, or none any more. */
export class KeyPanel {
  constructor({ announce, onKey }) {
    this._panel = document.getElementById('key-panel');
    this._field = document.getElementById('key-field');
    this._note = document.getElementById('key-note');
    this._toggle = document.getElementById('key-toggle');
    this._announce = announce;
    this._onKey = onKey;
    this._panel.addEventListener('submit', (event) => {
      event.preventDefault();
      this._submit(this._field.value.trim());
    });
    document.getElementById('key-forget').addEventListener('click', () => this._use(''));
    this._toggle.addEventListener('click', () => this._show(this._panel.hidden));
    this._toggle.hidden = !apiKey.value;
  }

  /** A question was answered with 401. */
  wanted() {
    if (!this._panel.hidden) return;
    this._note.textContent = apiKey.value ? 'The server does not know this key.' : 'This server answers only with an API key.';
    this._toggle.hidden = false;
    this._show(true);
    this._announce(`${this._note.textContent} The field for it is at the top of the page.`);
  }

  /** What no HTTP header can carry is no key: the browser would not even send the question. */
  _submit(key) {
    if (/^[\x21-\x7e]*$/.test(key)) {
      this._use(key);
      return;
    }
    this._note.textContent = 'This is no API key: it holds characters that no key has.';
    this._announce(this._note.textContent);
  }

  _use(key) {
    apiKey.set(key);
    this._field.value = '';
    this._toggle.hidden = !key;
    this._show(false);
    this._announce(key ? 'The key is used from now on.' : 'The key is forgotten.');
    this._onKey();
  }

  _show(visible) {
    if (visible && !this._note.textContent) this._note.textContent = 'A key is in use in this tab.';
    this._panel.hidden = !visible;
    this._toggle.setAttribute('aria-expanded', String(visible));
    if (!visible) this._note.textContent = '';
  }
}
