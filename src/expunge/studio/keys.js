// Arrow keys in tabs and in choices of one, as WAI-ARIA's patterns have them: Gradio gives every radio
// button a group of its own and its tabs no arrow keys, so that each is one more stop of the Tab key.

// The radio buttons of a choice in one group: the browser itself then moves among them by arrow keys.
function groupRadios() {
  for (const choice of document.querySelectorAll('fieldset[id]'))
    for (const radio of choice.querySelectorAll('input[type=radio]'))
      if (radio.name !== choice.id) radio.name = choice.id;
}
// Gradio writes a button's own name anew when it is chosen.
new MutationObserver(groupRadios)
  .observe(document, {childList: true, subtree: true, attributes: true, attributeFilter: ['name']});

// Left, right, Home and End go to another tab and show it.
document.addEventListener('keydown', event => {
  const tab = event.target.closest?.('[role=tab]');
  const tabs = [...(tab?.closest('[role=tablist]')?.querySelectorAll('[role=tab]') ?? [])]
    .filter(one => one.ariaDisabled !== 'true' && one.offsetParent);
  const last = tabs.length - 1, place = tabs.indexOf(tab);
  const next = {
    ArrowRight: place < last ? place + 1 : 0, ArrowLeft: place > 0 ? place - 1 : last, Home: 0, End: last,
  }[event.key];
  if (place < 0 || next === undefined || event.altKey || event.ctrlKey || event.metaKey) return;
  event.preventDefault();
  tabs[next].focus();
  tabs[next].click();
});
