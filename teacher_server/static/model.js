// Who answers: the served teacher, as the gateway describes it.

import { copyFrom } from './clipboard.js';
import { getModel } from './gateway.js';

/** The panel that describes the teacher, and the names of its classes for everyone else. */
export class ModelPanel {
  /** `onModel(model)` is called with each teacher that is new; `onError(error)` when there is no description to be had. */
  constructor({ announce, onModel, onError }) {
    this.model = null;
    this._panel = document.getElementById('model');
    this._onModel = onModel;
    this._onError = onError;
    const copy = this._panel.querySelector('.copy-fingerprint');
    copy.addEventListener('click', () => copyFrom(copy, this.model?.fingerprint ?? '', announce));
    const classes = this._panel.querySelector('details');
    classes.addEventListener('toggle', () => classes.open && this._listClasses());
  }

  /** Ask again who is served. */
  async refresh() {
    let model;
    try {
      model = await getModel();
    } catch (error) {
      this._onError(error);
      return;
    }
    if (model.fingerprint === this.model?.fingerprint && model.version === this.model.version) return;
    this.model = model;
    this._show(model);
    this._onModel(model);
  }

  /** Names of the classes of the teacher with this fingerprint; numbers, should it be gone already. */
  async namesOf({ fingerprint, numClasses }) {
    if (this.model?.fingerprint !== fingerprint) await this.refresh();
    if (this.model?.fingerprint === fingerprint) return this.model.class_names;
    return Array.from({ length: numClasses }, (_, k) => `class ${k}`);
  }

  _show(model) {
    const { image_size: size, crop_ratio: ratio } = model.preprocessing;
    const values = {
      name: model.name,
      version: String(model.version),
      fingerprint: model.fingerprint.slice(0, 12),
      size: `${size} × ${size} px`,
      crop: ratio === 1 ? 'the largest square in the middle' : `a square in the middle, ${(100 * ratio).toFixed(1)} % of the shorter side`,
      temperature: String(model.default_temperature),
      classes: String(model.class_names.length),
    };
    for (const [field, value] of Object.entries(values)) this._panel.querySelector(`[data-field=${field}]`).textContent = value;
    this._panel.querySelector('[data-field=fingerprint]').title = model.fingerprint;
    this._panel.classList.add('known');
    const classes = this._panel.querySelector('details');
    classes.querySelector('ol').replaceChildren();
    if (classes.open) this._listClasses();
  }

  /** Filled when first opened: there may be thousands. */
  _listClasses() {
    const list = this._panel.querySelector('details ol');
    if (!this.model || list.childElementCount > 0) return;
    list.append(
      ...this.model.class_names.map((name) => {
        const item = document.createElement('li');
        item.textContent = name;
        return item;
      }),
    );
  }
}
