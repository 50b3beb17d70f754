// Words in the fields for files; names for screen readers. Both come again whenever gradio draws a field anew.
const PROMPTS = {
  pictures: ['Drop or paste pictures here', 'or click to choose them', 'Choose pictures'],
  folder: ['Drop a folder here', 'or click to choose one', 'Choose a folder'],
};
const name = () => {
  document.querySelectorAll('fieldset:not([aria-label])').forEach((group) =>
    group.setAttribute('aria-label', group.querySelector('[data-testid=block-info]').textContent.trim()));
  for (const [field, [drop, click, touch]] of Object.entries(PROMPTS)) {
    const button = document.querySelector(`#${field} .upload-container`);
    const words = button?.ariaLabel && button.querySelector('.wrap');
    if (!words) continue;
    button.removeAttribute('aria-label');
    words.innerHTML = '<span class="mouse"><b></b><br></span><span class="touch"><b></b></span>';
    button.querySelector('.mouse b').textContent = drop;
    button.querySelector('.mouse').append(` ${click}`);
    button.querySelector('.touch b').textContent = touch;
  }
};
new MutationObserver(name).observe(document.body, { childList: true, subtree: true });
name();
// Files, given to the field as if they had been chosen there.
const input = (field) => document.querySelector(`#${field} input[type=file]`);
const give = (files, to) => {
  const all = new DataTransfer();
  files.forEach((file) => all.items.add(file));
  to.files = all.files;
  to.dispatchEvent(new Event('change', { bubbles: true }));
};
document.addEventListener('paste', (event) => {
  if (!input('pictures') || !event.clipboardData?.files.length) return;
  event.preventDefault();
  give([...event.clipboardData.files], input('pictures'));
});
// gradio sends the names of files without their folders, and takes no dropped folder: each file's path becomes its name.
const rename = (file, path) => path ? Object.defineProperty(file, 'name', { value: path }) : file;
document.addEventListener('change', (event) => {
  if (event.target === input('folder'))
    [...event.target.files].forEach((file) => file.webkitRelativePath && rename(file, file.webkitRelativePath));
}, true);
const below = async (entry) => {
  if (entry.isFile)
    return [rename(await new Promise((done, failed) => entry.file(done, failed)), entry.fullPath.slice(1))];
  const reader = entry.createReader(), files = [];
  for (let more; (more = await new Promise((done, failed) => reader.readEntries(done, failed))).length;)  // 100 at a time
    for (const inner of more) files.push(...await below(inner));
  return files;
};
document.addEventListener('dragover', (event) => event.preventDefault());  // beside a field, a drop would leave the page
document.addEventListener('drop', async (event) => {
  const entries = [...event.dataTransfer.items].map((item) => item.webkitGetAsEntry()).filter(Boolean);
  const field = document.querySelector('#folder')?.checkVisibility() ? 'folder' : 'pictures';
  event.preventDefault();
  if (!entries.length || !input(field)) return;
  event.stopPropagation();
  event.target.dispatchEvent(new DragEvent('dragleave', { bubbles: true }));
  give((await Promise.all(entries.map(below))).flat(), input(field));
}, true);
