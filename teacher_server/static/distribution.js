// The arithmetic of the page: from logits to what is drawn. Pure functions of arrays of numbers, no DOM.

/** softmax(logits / temperature). The largest logit is subtracted first, so nothing overflows at a small temperature. */
export function softmax(logits, temperature) {
  let largest = -Infinity;
  for (const logit of logits) largest = Math.max(largest, logit);
  const probs = Float64Array.from(logits, (logit) => Math.exp((logit - largest) / temperature));
  let sum = 0;
  for (const prob of probs) sum += prob;
  return probs.map((prob) => prob / sum);
}

/** Entropy in bits: 0 for certainty, log2(K) for K equally likely classes. */
export function entropyBits(probs) {
  let bits = 0;
  for (const prob of probs) if (prob > 0) bits -= prob * Math.log2(prob);
  return bits;
}

/** Total variation: the largest difference that two distributions give to any set of classes; 0 to 1. */
export function totalVariation(first, second) {
  let sum = 0;
  for (let k = 0; k < first.length; k++) sum += Math.abs(first[k] - second[k]);
  return sum / 2;
}

/** Class ids of the `count` largest logits, largest first; the same at every temperature. Of equal ones the smaller id comes first. */
export function topClasses(logits, count) {
  const ids = Array.from(logits.keys());
  return ids.sort((a, b) => logits[b] - logits[a] || a - b).slice(0, count);
}

/** What the classes outside `ids` have together: summed, not 1 minus the others, which would lose small numbers. */
export function restOf(probs, ids) {
  const shown = new Set(ids);
  let sum = 0;
  for (let k = 0; k < probs.length; k++) if (!shown.has(k)) sum += probs[k];
  return sum;
}

/** A probability for a person. */
export function percent(prob) {
  const value = 100 * prob;
  if (value === 0 || value === 100) return `${value} %`;
  if (value >= 99.95) return '> 99.9 %'; // rounding would claim certainty
  if (value < 0.01) return '< 0.01 %';
  return `${value.toFixed(value < 1 ? 2 : 1)} %`;
}
