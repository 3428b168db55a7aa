// The page: connects its parts. Each image is sent once, for its logits; every temperature after that is computed here.

import { KeyPanel } from './key.js';
import { watchLive } from './live.js';
import { ModelPanel } from './model.js';
import { watchReadiness } from './readiness.js';
import { Results } from './results.js';
import { TemperatureControl } from './temperature.js';

const announcer = document.getElementById('announcer');
const announce = (text) => {
  announcer.textContent = text;
};

const compare = document.getElementById('compare');
const first = new TemperatureControl(document.getElementById('temperature-a'), temperatureMoved);
const second = new TemperatureControl(document.getElementById('temperature-b'), temperatureMoved);
second.set(4);
const temperatures = () => (compare.checked ? [first.value, second.value] : [first.value]);

compare.addEventListener('change', () => {
  document.getElementById('temperature-b').hidden = !compare.checked;
  document.body.classList.toggle('comparing', compare.checked);
  results.redraw();
});

const model = new ModelPanel({
  announce,
  onModel({ name, default_temperature: temperature }) {
    document.getElementById('model-name').textContent = name;
    if (first.touched) return;
    first.set(temperature);
    if (!second.touched) second.set(4 * temperature <= 20 ? 4 * temperature : 1);
    results.redraw();
  },
  onError: (error) => error.status === 401 && key.wanted(),
});

const key = new KeyPanel({
  announce,
  onKey() {
    model.refresh();
    live.now();
    results.retryUnauthorized();
  },
});

const results = new Results({ model, temperatures, announce, keyWanted: () => key.wanted() });
const live = watchLive({ onUnauthorized: () => key.wanted() });
watchReadiness({ announce, onReady: () => model.refresh() });
model.refresh();

takeFiles();

let saidLater;

/** The bars follow at once; the words for a screen reader when the slider has come to rest. */
function temperatureMoved() {
  results.redraw();
  clearTimeout(saidLater);
  saidLater = setTimeout(() => announce(results.inWords()), 700);
}

/** Chosen, dropped anywhere on the page, or pasted. */
function takeFiles() {
  const field = document.getElementById('files');
  field.addEventListener('change', () => {
    take([...field.files]);
    field.value = ''; // so that the same file can be chosen again
  });

  let depth = 0; // a drag over a child leaves its parent
  const dragging = (change) => {
    depth = Math.max(0, depth + change);
    document.body.classList.toggle('dragging', depth > 0);
  };
  addEventListener('dragenter', () => dragging(1));
  addEventListener('dragleave', () => dragging(-1));
  addEventListener('dragover', (event) => event.preventDefault());
  addEventListener('drop', (event) => {
    event.preventDefault(); // without this the browser would open the image instead of the page
    dragging(-depth);
    take([...event.dataTransfer.files]);
  });
  addEventListener('paste', (event) => {
    if (event.clipboardData.files.length > 0) take([...event.clipboardData.files]);
  });
}

function take(files) {
  if (files.length === 0) {
    announce('There was no file in that. Save the image first, then drop the file.');
    return;
  }
  const left = results.add(files);
  if (left > 0) announce(`${left} images were left out: the page shows 48 at once. For many images use the client.`);
}
