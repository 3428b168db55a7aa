// All images on the page: they are taken in, asked for a few at a time, and leave again.

import { Result } from './result.js';

const MOST_CARDS = 48;
const MOST_AT_ONCE = 3;
const MOST_SPOKEN = 2;

/** The list of cards. `shared` is what every card gets as its `page`, but for what this class adds itself. */
export class Results {
  constructor(shared) {
    this._list = document.getElementById('results');
    this._cards = [];
    this._waiting = [];
    this._asking = new Set();
    this._announce = shared.announce;
    this._page = { ...shared, again: (card) => this._enqueue([card]), remove: (card) => this._remove(card) };
    document.getElementById('clear').addEventListener('click', () => this._removeAll());
  }

  /** Files that a person chose, dropped or pasted; the newest come first. Returns how many did not fit. */
  add(files) {
    const taken = files.slice(0, MOST_CARDS);
    const cards = taken.map((file) => new Result(file, this._page));
    this._list.prepend(...cards.map((card) => card.element));
    this._cards = [...cards, ...this._cards];
    for (const card of this._cards.splice(MOST_CARDS)) this._drop(card);
    this._enqueue(cards);
    this._changed();
    return files.length - taken.length;
  }

  /** Another temperature: everything on display follows, nothing is asked. */
  redraw() {
    for (const card of this._cards) card.redraw();
  }

  /** The newest labels, for those who listen. */
  inWords() {
    const sentences = this._cards.map((card) => card.inWords()).filter(Boolean);
    return sentences.slice(0, MOST_SPOKEN).join(' ');
  }

  /** A new key: those that were turned away for want of it ask again. */
  retryUnauthorized() {
    this._enqueue(this._cards.filter((card) => card.unauthorized));
  }

  _enqueue(cards) {
    // "Try again" twice, or while a new key makes everything ask again: still one question.
    this._waiting.push(...cards.filter((card) => !this._waiting.includes(card) && !this._asking.has(card)));
    while (this._asking.size < MOST_AT_ONCE && this._waiting.length > 0) this._ask(this._waiting.shift());
  }

  async _ask(card) {
    this._asking.add(card);
    try {
      await card.ask();
    } finally {
      this._asking.delete(card);
      this._enqueue([]);
    }
  }

  _remove(card) {
    const index = this._cards.indexOf(card);
    this._cards.splice(index, 1);
    this._drop(card);
    this._changed();
    // The focus goes to the neighbour, not to the top of the page.
    const neighbour = this._cards[Math.min(index, this._cards.length - 1)];
    (neighbour?.element.querySelector('.remove') ?? document.getElementById('files')).focus();
    this._announce(`${card.file.name} removed.`);
  }

  _removeAll() {
    for (const card of this._cards.splice(0)) this._drop(card);
    this._changed();
    document.getElementById('files').focus();
    this._announce('All images removed.');
  }

  _drop(card) {
    card.stop();
    card.element.remove();
    this._waiting = this._waiting.filter((other) => other !== card);
  }

  _changed() {
    const { length } = this._cards;
    document.body.classList.toggle('has-results', length > 0);
    document.getElementById('count').textContent = length === 1 ? '1 image' : `${length} images`;
  }
}
