// One temperature: a slider on a logarithmic scale and a number box that say the same.

const LOWEST = 0.01;
const HIGHEST = 100; // what the gateway takes
const TICKS = [0.1, 0.2, 0.5, 1, 2, 5, 10, 20];
const FIRST_EXPONENT = -1;
const LAST_EXPONENT = 1.3;
const STEP = 0.02; // in powers of ten, so 4.7 %: 1 and 10 are among the stops

/** Fills `element` (made of slider, number box and ticks) with life. `onChange(temperature)` follows every move, key and digit. */
export class TemperatureControl {
  constructor(element, onChange) {
    this.value = 1;
    this.touched = false;
    this._onChange = onChange;
    this._slider = element.querySelector('input[type=range]');
    this._number = element.querySelector('input[type=number]');
    this._hint = element.querySelector('.hint');
    Object.assign(this._slider, { min: FIRST_EXPONENT, max: LAST_EXPONENT, step: STEP });
    Object.assign(this._number, { min: LOWEST, max: HIGHEST, step: 'any' });
    this._slider.addEventListener('input', () => this._moved());
    this._number.addEventListener('input', () => this._typed());
    this._number.addEventListener('change', () => this.set(this.value)); // what was not a temperature is taken back
    drawTicks(element.querySelector('.ticks'));
    this.set(this.value);
  }

  /** Show a temperature without telling anyone. */
  set(value) {
    this.value = value;
    this._showInNumber();
    this._showInSlider();
    this._complain(false);
  }

  _moved() {
    this.touched = true;
    this.value = Number((10 ** Number(this._slider.value)).toPrecision(3));
    this._showInNumber();
    this._slider.setAttribute('aria-valuetext', String(this.value));
    this._complain(false);
    this._onChange();
  }

  _typed() {
    const value = this._number.valueAsNumber;
    const usable = value >= LOWEST && value <= HIGHEST; // false for NaN, too
    this._complain(!usable);
    if (!usable) return;
    this.touched = true;
    this.value = value;
    this._showInSlider();
    this._onChange();
  }

  _showInNumber() {
    this._number.value = String(this.value);
  }

  _showInSlider() {
    this._slider.value = String(Math.log10(this.value)); // beyond its ends it rests at the end
    this._slider.setAttribute('aria-valuetext', String(this.value));
  }

  _complain(wrong) {
    this._number.setAttribute('aria-invalid', String(wrong));
    this._hint.textContent = wrong ? `A number from ${LOWEST} to ${HIGHEST}, please.` : '';
  }
}

/** The scale below a slider. A thumb's middle stops half its width before the ends, and so do the ticks. */
function drawTicks(element) {
  for (const tick of TICKS) {
    const mark = element.appendChild(document.createElement('span'));
    mark.textContent = String(tick);
    mark.style.setProperty('--at', (Math.log10(tick) - FIRST_EXPONENT) / (LAST_EXPONENT - FIRST_EXPONENT));
  }
}
