// How the gateway is doing now: numbers and lines over the last 60 seconds, asked for each second while somebody looks.

import { getStats } from './gateway.js';
import { pollWhileVisible } from './poll.js';
import { sparkline } from './sparkline.js';

const PERIOD_MS = 1_000;
const AWAY_PERIOD_MS = 3_000;
const KEYLESS_PERIOD_MS = 60_000; // a key, when there is one, wakes the polling itself

const count = (value) => String(value);
function milliseconds(value) {
  if (value === null) return '–';
  return value >= 10_000 ? `${(value / 1000).toFixed(0)} s` : `${Number(value.toPrecision(3))} ms`;
}

const rounded = (value) => milliseconds(value === null ? null : Number(value.toPrecision(2)));
const rate = (value) => (value >= 100 ? value.toFixed(0) : String(Number(value.toFixed(1))));

const TILES = [
  { label: 'Images / s', series: 'images', value: (stats) => rate(stats.images_per_s), peak: count },
  { label: 'In flight', series: 'in_flight', value: (stats) => count(stats.in_flight), peak: count },
  { label: 'Queue depth', series: 'queued', value: (stats) => count(stats.queued), peak: count },
  {
    label: 'Errors',
    series: 'errors',
    value: (stats) => count(stats.refused + stats.failed),
    peak: count,
    alarm: (stats) => stats.failed > 0,
  },
  { label: 'Latency p50', series: 'p50_ms', value: (stats) => milliseconds(stats.latency_ms.p50), peak: rounded },
  { label: 'Latency p99', series: 'p99_ms', value: (stats) => milliseconds(stats.latency_ms.p99), peak: rounded },
];

/** Starts the panel. `onUnauthorized()` is called when the gateway wants a key. Returns the polling, to be woken with a new key. */
export function watchLive({ onUnauthorized }) {
  const panel = document.getElementById('live');
  const note = panel.querySelector('.note');
  const tiles = TILES.map((tile) => makeTile(panel.querySelector('.tiles'), tile));

  async function ask() {
    let stats;
    try {
      stats = await getStats();
    } catch (error) {
      panel.classList.add('stale');
      note.textContent = error.status === 401 ? 'Needs an API key.' : error.message;
      if (error.status === 401) {
        onUnauthorized();
        return KEYLESS_PERIOD_MS;
      }
      return Math.max(AWAY_PERIOD_MS, 1000 * (error.retryAfterS ?? 0));
    }
    panel.classList.remove('stale');
    const labelled = `${plural(stats.images, 'image')}, ${plural(stats.requests, 'request')}`;
    note.textContent = `Last ${stats.window_s} s: ${labelled}, ${stats.refused} refused, ${stats.failed} failed.`;
    for (const tile of tiles) tile.show(stats);
    return PERIOD_MS;
  }

  const polling = pollWhileVisible(ask, PERIOD_MS);
  const button = panel.querySelector('.pause');
  button.addEventListener('click', () => {
    const pause = button.getAttribute('aria-pressed') !== 'true';
    button.setAttribute('aria-pressed', String(pause));
    if (pause) polling.pause();
    else polling.resume();
  });
  return polling;
}

function makeTile(parent, { label, series, value, peak, alarm }) {
  const element = document.getElementById('tile').content.firstElementChild.cloneNode(true);
  element.dataset.series = series;
  element.querySelector('.label').textContent = label;
  const number = element.querySelector('.number');
  const highest = element.querySelector('.peak');
  const line = sparkline();
  element.append(line.element);
  parent.append(element);
  return {
    show(stats) {
      number.textContent = value(stats);
      const top = Math.max(...stats.series[series].map((point) => point ?? 0));
      highest.textContent = top > 0 ? `max ${peak(top)}` : '';
      element.classList.toggle('alarm', alarm?.(stats) ?? false);
      line.draw(stats.series[series]);
    },
  };
}

function plural(number, noun) {
  return `${number} ${noun}${number === 1 ? '' : 's'}`;
}
