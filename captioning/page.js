const name = () => document.querySelectorAll('fieldset:not([aria-label])').forEach((group) =>
  group.setAttribute('aria-label', group.querySelector('[data-testid=block-info]').textContent.trim()));
new MutationObserver(name).observe(document.body, { childList: true, subtree: true });
name();
document.addEventListener('paste', (event) => {
  const input = document.querySelector('#pictures input[type=file]');
  if (!input || !event.clipboardData?.files.length) return;
  input.files = event.clipboardData.files;
  input.dispatchEvent(new Event('change', { bubbles: true }));
  event.preventDefault();
});
