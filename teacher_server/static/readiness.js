// The dot in the header: does a label really come out of the teacher now?

import { isReady } from './gateway.js';
import { pollWhileVisible } from './poll.js';

// Each question costs the teacher one label, so a ready one is asked seldom.
const READY_PERIOD_MS = 10_000;
const AWAY_PERIOD_MS = 2_000;

const WORDS = { ready: 'Ready', away: 'Teacher away', unreachable: 'Gateway away', unknown: 'Not known' };

/** `onReady()` is called each time the teacher comes back. */
export function watchReadiness({ announce, onReady }) {
  const element = document.getElementById('readiness');
  const word = element.querySelector('.word');
  let state = null;

  async function check() {
    let found;
    try {
      found = (await isReady()) ? 'ready' : 'away';
    } catch (error) {
      found = error.status === 0 ? 'unreachable' : 'unknown';
    }
    if (found !== state) {
      element.dataset.state = found;
      word.textContent = WORDS[found];
      if (state !== null) announce(`${WORDS[found]}.`);
      if (found === 'ready') onReady();
      state = found;
    }
    return found === 'ready' ? READY_PERIOD_MS : AWAY_PERIOD_MS;
  }

  return pollWhileVisible(check, AWAY_PERIOD_MS);
}
