// Asking again and again, but only while somebody looks.

/**
 * Run `task` now and `periodMs` after each end, or after the number of ms that it returns. A hidden tab asks nothing; when it is seen
 * again it asks at once. `pause()` and `resume()` do the same by hand, `now()` does not wait.
 */
export function pollWhileVisible(task, periodMs) {
  let timer = null;
  let running = false;
  let paused = false;

  const idle = () => paused || document.hidden;

  async function tick() {
    clearTimeout(timer);
    timer = null;
    if (running || idle()) return;
    running = true;
    let next = periodMs;
    try {
      next = (await task()) ?? periodMs;
    } finally {
      running = false;
      if (!idle()) timer = setTimeout(tick, next);
    }
  }

  document.addEventListener('visibilitychange', tick);
  tick();
  return {
    now: tick,
    pause() {
      paused = true;
      clearTimeout(timer);
    },
    resume() {
      paused = false;
      tick();
    },
  };
}
