const LOW = [8, 10, 30, 204], HIGH = [255, 236, 150, 64];  // colour and opacity where attention is low and high
function show(word) {
  const card = word.closest('.card'), canvas = card.querySelector('canvas'), look = card.querySelector('.look');
  const heat = Uint8Array.from(atob(word.dataset.heat), (c) => c.charCodeAt(0)), side = Math.sqrt(heat.length);
  const picture = new ImageData(side, side);
  heat.forEach((h, i) => {  // blend the two so that, over any picture, more heat looks lighter
    const high = h / 255 * HIGH[3], low = (1 - h / 255) * LOW[3], opacity = low + high;
    picture.data.set([0, 1, 2].map((k) => (low * LOW[k] + high * HIGH[k]) / opacity).concat(opacity), 4 * i);
  });
  canvas.width = canvas.height = side;
  canvas.getContext('2d').putImageData(picture, 0, 0);
  card.querySelectorAll('.words .lit').forEach((other) => other.classList.remove('lit'));
  word.classList.add('lit');
  canvas.parentElement.classList.add('lit');
  look.textContent = `“${word.textContent}”${word.ariaLabel.slice(word.textContent.length)}.`;
}
function reset(card) {  // show the word that was clicked, or the bare picture
  const pressed = card.querySelector('[aria-pressed=true]');
  if (pressed) return show(pressed);
  card.querySelectorAll('.lit').forEach((lit) => lit.classList.remove('lit'));
  card.querySelector('.look').textContent = '';
}
const wordOf = (event) => event.target.closest?.('.words button');
for (const kind of ['mouseover', 'focusin'])
  element.addEventListener(kind, (event) => wordOf(event) && show(wordOf(event)));
for (const kind of ['mouseout', 'focusout'])
  element.addEventListener(kind, (event) => wordOf(event) && reset(wordOf(event).closest('.card')));
async function copy(button) {
  const text = button.dataset.text, label = button.firstChild;
  try {
    await navigator.clipboard.writeText(text);
  } catch {  // without https, except on this machine, browsers offer only the old way
    const field = document.body.appendChild(document.createElement('textarea'));
    field.value = text;
    field.select();
    document.execCommand('copy');
    field.remove();
    button.focus();
  }
  label.data = announced.textContent = 'Copied';
  setTimeout(() => label.data = 'Copy', 1500);
}
element.addEventListener('click', (event) => {
  const button = event.target.closest?.('.copy');
  if (button) copy(button);
  const word = wordOf(event);
  if (!word) return;
  const pressed = word.getAttribute('aria-pressed') === 'true';
  word.closest('.card').querySelectorAll('[aria-pressed=true]').forEach((w) => w.setAttribute('aria-pressed', false));
  word.setAttribute('aria-pressed', !pressed);
  pressed ? reset(word.closest('.card')) : show(word);
});
element.addEventListener('keydown', (event) => {
  const word = wordOf(event);
  if (!word) return;
  const words = [...word.parentElement.querySelectorAll('button')], at = words.indexOf(word);
  const to = { ArrowRight: at + 1, ArrowLeft: at - 1, Home: 0, End: words.length - 1 }[event.key];
  if (event.key === 'Escape') {
    word.setAttribute('aria-pressed', false);
    word.blur();
  }
  if (!words[to]) return;
  event.preventDefault();
  word.tabIndex = -1;
  words[to].tabIndex = 0;
  words[to].focus();
});
const announced = document.body.appendChild(document.createElement('p'));
announced.className = 'unseen';
announced.setAttribute('role', 'status');
watch('value', () => {
  const cards = [...element.querySelectorAll('.card')];
  announced.textContent = cards.map((card) => `${card.ariaLabel}: ${card.querySelector('img').alt}`).join('. ');
  cards[0]?.querySelector('img').decode().catch(() => {})  // before that it has no height
    .then(() => cards[0].scrollIntoView({ block: 'nearest' }));
});
