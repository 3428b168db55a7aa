// Copying text, with a way out where the browser does not let a page copy (any origin that is neither https nor this machine).

/** Copy `text` and say so on the button; where that is not allowed, show the text, selected. */
export async function copyFrom(button, text, announce) {
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    showForCopying(text);
    return;
  }
  announce('Copied.');
  flash(button);
}

/** The button says "Copied" for a moment. Its width stays, so nothing jumps. */
function flash(button) {
  if (button.dataset.label === undefined) button.dataset.label = button.textContent;
  button.style.minInlineSize = `${button.offsetWidth}px`;
  button.textContent = 'Copied';
  setTimeout(() => {
    button.textContent = button.dataset.label;
  }, 1500);
}

function showForCopying(text) {
  const dialog = document.getElementById('copy-dialog');
  const area = dialog.querySelector('textarea');
  area.value = text;
  dialog.showModal();
  area.select();
}

/**
 * The command that asks for the probabilities that are on display.
 * `withKey` adds the header that carries the key; the key itself stays out of the clipboard.
 */
export function curlCommand({ url, file, mediaType, withKey }) {
  const lines = [`curl ${quoted(url)}`, `-H ${quoted(`Content-Type: ${mediaType}`)}`];
  if (withKey) lines.push('-H "Authorization: Bearer $DISTILL_API_KEY"');
  lines.push(`--data-binary ${quoted(`@./${file}`)}`);
  return lines.join(' \\\n  ');
}

/** One word for a POSIX shell, whatever is in it. */
function quoted(text) {
  return `'${text.replaceAll("'", "'\\''")}'`;
}
