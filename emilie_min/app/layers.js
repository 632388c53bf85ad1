// The stack's strip: what a card's buttons and slider ask for, and where it is dragged to.
const layers = {
  strip(element, trigger) {
    let from = null;
    const card = e => e.target.closest && e.target.closest('[data-edit]');
    const ask = (edit, change, value) => trigger('select', {state: edit, change, value: String(value ?? 0)});
    element.addEventListener('click', e => {
      const button = e.target.closest('[data-change]');
      if (!button) return;
      ask(card(e).dataset.edit, button.dataset.change, button.dataset.value);
      if (button.dataset.change == 'revise') document.getElementById('go').scrollIntoView({block: 'center'});
    });
    element.addEventListener('change', e => { if (e.target.type == 'range') ask(card(e).dataset.edit, 'strength', e.target.value); });
    element.addEventListener('dragstart', e => {
      if (document.activeElement?.type == 'range' && document.activeElement.matches(':active')) { e.preventDefault(); return; }
      from = card(e)?.dataset.edit;
      e.dataTransfer.setData('text/plain', from);
    });
    element.addEventListener('dragover', e => { if (from && card(e)) e.preventDefault(); });
    element.addEventListener('drop', e => {
      e.preventDefault();
      const to = card(e)?.dataset.edit;
      if (from && to && from != to) ask(from, 'move', to);
      from = null;
    });
  },
};
