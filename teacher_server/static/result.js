// One image: its thumbnail, the question to the teacher, and what became of it.

import { Bars } from './bars.js';
import { copyFrom, curlCommand } from './clipboard.js';
import { address, apiKey, askLogits, mediaType } from './gateway.js';

const MOST_TRIES = 6;
const LONGEST_WAIT_S = 60;
const SMALL_PX = 64;

/** A card on the page. `page` gives what cards share: the model, the temperatures on display, `announce`, and what to do with a 401. */
export class Result {
  constructor(file, page) {
    this.file = file;
    this.unauthorized = false;
    this._page = page;
    this._aborter = new AbortController();
    this._bars = null;
    this._text = '';
    this.element = document.getElementById('result').content.firstElementChild.cloneNode(true);
    this._message = this._part('.message');
    this._part('.title').textContent = file.name;
    this._part('.title').title = file.name;
    this._part('.facts').textContent = sizeOf(file.size);
    this._part('.remove').setAttribute('aria-label', `Remove ${file.name}`);
    this._showThumbnail();
    this._listen();
    this._state('waiting', 'Waits for its turn …');
  }

  /** Ask the teacher, and again as often as it makes sense. Never throws: the card says what happened. */
  async ask() {
    this.unauthorized = false;
    for (let tries = 1; ; tries++) {
      this._state('waiting', 'Asks the teacher …');
      try {
        const started = performance.now();
        const { text, answer } = await askLogits(this.file, this._aborter.signal);
        await this._show(text, answer, performance.now() - started);
        return;
      } catch (error) {
        if (this._aborter.signal.aborted) return;
        if (error.retryAfterS === null || error.retryAfterS === undefined || tries === MOST_TRIES) {
          this._fail(error);
          return;
        }
        await this._wait(error, Math.min(error.retryAfterS, LONGEST_WAIT_S));
        if (this._aborter.signal.aborted) return;
      }
    }
  }

  /** Draw the bars anew; nothing is asked. */
  redraw() {
    this._bars?.show(this._page.temperatures());
  }

  /** The label in one sentence, '' without one. */
  inWords() {
    return this._bars ? `${this.file.name}: ${this._bars.inWords()}.` : '';
  }

  async _show(text, answer, tookMs) {
    const [item] = answer.items;
    const names = await this._page.model.namesOf({ fingerprint: answer.fingerprint, numClasses: item.values.length });
    this._text = text;
    this._part('.thumbnail img').style.scale = String(1 / (this._page.model.model?.preprocessing.crop_ratio ?? 1));
    this._bars = new Bars(this._part('.distribution'), item.values, names);
    this._part('.facts').textContent += ` · in ${tookMs < 10 ? tookMs.toFixed(1) : tookMs.toFixed(0)} ms`;
    this._state('done', '');
    this.redraw();
    this._page.announce(this.inWords());
  }

  _fail(error) {
    this.unauthorized = error.status === 401;
    this._state('failed', error.message ?? String(error));
    this._page.announce(`${this.file.name}: ${this._message.textContent}`);
    if (this.unauthorized) this._page.keyWanted();
  }

  /** Count the seconds down on the card. */
  async _wait(error, seconds) {
    this._page.announce(`${this.file.name}: ${error.message} Tries again in ${seconds} s.`);
    for (let left = Math.ceil(seconds); left > 0 && !this._aborter.signal.aborted; left--) {
      this._state('waiting', `${error.message} Tries again in ${left} s.`);
      await new Promise((resolve) => setTimeout(resolve, 1000));
    }
  }

  /** waiting, failed or done; the card's look and buttons follow in the style sheet. */
  _state(state, message) {
    this.element.dataset.state = state;
    this.element.setAttribute('aria-busy', String(state === 'waiting'));
    this._message.textContent = message;
    this._part('.retry').hidden = state !== 'failed';
    this._part('.copies').hidden = state !== 'done';
    this._part('.distribution').hidden = state !== 'done';
  }

  _listen() {
    this._part('.retry').addEventListener('click', () => this._page.again(this));
    this._part('.remove').addEventListener('click', () => this._page.remove(this));
    const { announce } = this._page;
    this._part('.copy-json').addEventListener('click', (event) => copyFrom(event.currentTarget, this._text, announce));
    this._part('.copy-curl').addEventListener('click', (event) => copyFrom(event.currentTarget, this._curl(), announce));
  }

  /** One command for each temperature on display. */
  _curl() {
    const { name, class_names: names } = this._page.model.model;
    return this._page
      .temperatures()
      .map((temperature) => {
        const query = new URLSearchParams({ temperature, top_k: Math.min(10, names.length), names: 'true', model: name });
        const url = address(`v1/soft-labels?${query}`);
        return curlCommand({ url, file: this.file.name, mediaType: mediaType(this.file), withKey: apiKey.value !== '' });
      })
      .join('\n');
  }

  /** No more questions for this image. */
  stop() {
    this._aborter.abort();
  }

  /**
   * The square in the middle (`_show` narrows it to what the teacher saw), from a blob URL that is given back as soon as the picture
   * is in.
   */
  _showThumbnail() {
    const image = this._part('.thumbnail img');
    const url = URL.createObjectURL(this.file);
    image.addEventListener('load', () => {
      URL.revokeObjectURL(url);
      image.classList.toggle('small', Math.min(image.naturalWidth, image.naturalHeight) <= SMALL_PX);
      this._part('.facts').textContent = `${image.naturalWidth} × ${image.naturalHeight} px · ${this._part('.facts').textContent}`;
    });
    image.addEventListener('error', () => {
      URL.revokeObjectURL(url);
      image.hidden = true;
    });
    image.src = url;
  }

  _part(selector) {
    return this.element.querySelector(selector);
  }
}

function sizeOf(bytes) {
  if (bytes < 1000) return `${bytes} B`;
  return bytes < 1e6 ? `${(bytes / 1e3).toFixed(0)} kB` : `${(bytes / 1e6).toFixed(1)} MB`;
}
