// One distribution, or two of the same logits at different temperatures, as horizontal bars: the top classes, and the rest summed.

import { entropyBits, percent, restOf, softmax, topClasses, totalVariation } from './distribution.js';

const TOP = 10;

/** A table of bars for one image. Its rows are made once; a new temperature only changes widths and numbers. */
export class Bars {
  /** `logits` of all K classes, their `names`, and the `figure` element made from the page's template. */
  constructor(figure, logits, names) {
    this._figure = figure;
    this._logits = logits;
    const num = logits.length;
    this._ids = topClasses(logits, num <= TOP + 1 ? num : TOP); // a rest of a single class has a name of its own
    this._rows = this._ids.map((k) => this._addRow(names[k]));
    this._restRow = this._ids.length < num ? this._addRow(`${num - this._ids.length} others`, 'rest') : null;
    this._topName = names[this._ids[0]];
  }

  /** Show the distribution at each of one or two temperatures. */
  show(temperatures) {
    const all = temperatures.map((temperature) => softmax(this._logits, temperature));
    this._figure.classList.toggle('comparing', all.length > 1);
    this._rows.forEach((row, i) => fill(row, all.map((probs) => probs[this._ids[i]])));
    if (this._restRow) fill(this._restRow, all.map((probs) => restOf(probs, this._ids)));
    const num = this._logits.length;
    this._fact('entropy', all.map((probs) => [entropyBits(probs), (bits) => `${bits.toFixed(2)} bits`]));
    this._fact('top', all.map((probs) => [probs[this._ids[0]], percent]));
    this._fact('like', all.map((probs) => [2 ** entropyBits(probs), (number) => `${Number(number.toPrecision(3))} of ${num}`]));
    this._fact('variation', all.length > 1 ? [[totalVariation(...all), (distance) => distance.toFixed(3)]] : []);
    const most = `At most ${Math.log2(num).toFixed(2)} bits, for ${num} equally likely classes`;
    this._figure.querySelector('[data-fact=entropy]').title = most;
    this._top = all.map((probs) => probs[this._ids[0]]);
  }

  /** The most likely class and its probability, or two of them. */
  inWords() {
    return `${this._topName} ${this._top.map(percent).join(' against ')}`;
  }

  _addRow(name, kind = 'class') {
    const row = document.getElementById('bar-row').content.firstElementChild.cloneNode(true);
    row.classList.add(kind);
    const title = row.querySelector('.name');
    title.firstElementChild.textContent = name;
    title.title = name;
    this._figure.querySelector('tbody').append(row);
    return row;
  }

  /** Values beside a caption; `<data>` keeps the exact number beside the rounded words. */
  _fact(name, values) {
    const element = this._figure.querySelector(`[data-fact=${name}]`);
    element.hidden = values.length === 0;
    element.querySelectorAll('data').forEach((data, i) => {
      data.hidden = i >= values.length;
      if (data.hidden) return;
      const [value, format] = values[i];
      data.value = String(value);
      data.textContent = format(value);
    });
  }
}

/** One row's bars and numbers, for one or two probabilities. */
function fill(row, probs) {
  const bars = row.querySelectorAll('.bar');
  const numbers = row.querySelectorAll('data');
  bars.forEach((bar, i) => {
    bar.hidden = numbers[i].hidden = i >= probs.length;
    if (bar.hidden) return;
    bar.firstElementChild.style.inlineSize = `${100 * probs[i]}%`;
    numbers[i].value = String(probs[i]);
    numbers[i].textContent = percent(probs[i]);
  });
}
