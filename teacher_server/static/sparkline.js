// A line over the last 60 seconds, as SVG: no axes, just the shape.

const SVG = 'http://www.w3.org/2000/svg';
const WIDTH = 120;
const HEIGHT = 30;
const MARGIN = 2;

/** An SVG element whose `draw(values)` shows a new series; null is a second without a value. */
export function sparkline() {
  const svg = document.createElementNS(SVG, 'svg');
  svg.setAttribute('class', 'sparkline');
  svg.setAttribute('viewBox', `0 0 ${WIDTH} ${HEIGHT}`);
  svg.setAttribute('preserveAspectRatio', 'none');
  svg.setAttribute('aria-hidden', 'true');
  const area = svg.appendChild(document.createElementNS(SVG, 'path'));
  area.setAttribute('class', 'area');
  const line = svg.appendChild(document.createElementNS(SVG, 'path'));
  line.setAttribute('class', 'line');

  function draw(values) {
    const points = pointsOf(values);
    line.setAttribute('d', pathOf(points));
    area.setAttribute('d', areaOf(points));
  }
  return { element: svg, draw };
}

/** [x, y] for each value, null for none; the scale starts at 0 and never divides by nothing. */
function pointsOf(values) {
  const largest = Math.max(...values.map((value) => value ?? 0)) || 1;
  const step = WIDTH / Math.max(1, values.length - 1);
  return values.map((value, i) => (value === null ? null : [i * step, HEIGHT - MARGIN - (value / largest) * (HEIGHT - 2 * MARGIN)]));
}

/** Connected where values follow one another. A lonely one is a line of no length, which its round caps make a dot. */
function pathOf(points) {
  return runsOf(points)
    .map((run) => `M${run.map(([x, y]) => `${x.toFixed(1)} ${y.toFixed(1)}`).join('L')}${run.length === 1 ? 'h0.01' : ''}`)
    .join('');
}

function areaOf(points) {
  return runsOf(points)
    .filter((run) => run.length > 1)
    .map((run) => `M${run[0][0].toFixed(1)} ${HEIGHT}L${run.map(([x, y]) => `${x.toFixed(1)} ${y.toFixed(1)}`).join('L')}V${HEIGHT}Z`)
    .join('');
}

function runsOf(points) {
  const runs = [[]];
  for (const point of points) {
    if (point === null) runs.push([]);
    else runs.at(-1).push(point);
  }
  return runs.filter((run) => run.length > 0);
}
