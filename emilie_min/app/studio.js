// What the studio's page does in the browser: the board to paint on, clicks in the tree of edits, and what an edit sends.
const studio = {
  // The picture's element: tools, and a canvas of the picture's own size over it, opaque where to edit.
  board(element, trigger) {
    const canvas = () => element.querySelector('canvas');
    const clear = () => { if (canvas()) { canvas().width = canvas().width; delete canvas().dataset.touched; } };
    let size = 14, last = null, before = null, made = '';  // size of the brush in percent of the longer side
    element.dataset.using = 'brush';

    const place = e => {
      const box = e.target.getBoundingClientRect();
      return [(e.clientX - box.left) * e.target.width / box.width, (e.clientY - box.top) * e.target.height / box.height];
    };
    const draw = e => {
      const pen = e.target.getContext('2d'), [x, y] = place(e), tool = element.dataset.using;
      e.target.dataset.touched = 1;
      pen.globalCompositeOperation = tool == 'erase' ? 'destination-out' : 'source-over';
      pen.strokeStyle = pen.fillStyle = 'rgb(255, 0, 120)';
      if (tool == 'box') {
        const [x0, y0, x1, y1] = [...last, x, y].map(Math.round);
        pen.putImageData(before, 0, 0);
        pen.fillRect(x0, y0, x1 - x0, y1 - y0);
      } else {
        pen.lineCap = 'round';
        pen.lineWidth = size / 100 * Math.max(e.target.width, e.target.height);
        pen.beginPath();
        pen.moveTo(...last);
        pen.lineTo(x, y);
        pen.stroke();
        last = [x, y];
      }
    };
    element.addEventListener('pointerdown', e => {
      if (e.target.tagName != 'CANVAS' || e.button) return;
      e.target.setPointerCapture(e.pointerId);
      last = place(e);
      before = e.target.getContext('2d').getImageData(0, 0, e.target.width, e.target.height);
      draw(e);
    });
    element.addEventListener('pointermove', e => { if (last && e.target.tagName == 'CANVAS') draw(e); });
    for (const end of ['pointerup', 'pointercancel']) element.addEventListener(end, () => { last = null; });
    element.addEventListener('input', e => {
      if ('compare' in e.target.dataset) element.querySelector('.before').style.clipPath = `inset(0 ${100 - e.target.value}% 0 0)`;
      else size = e.target.value;
    });

    const choose = studio.files(element, trigger);
    element.addEventListener('click', e => {
      const tool = e.target.dataset.tool, place = e.target.closest('[data-place]');
      if (place) trigger('click', {state: place.dataset.place});
      else if (tool == 'open' || e.target.className == 'empty') choose('select');
      else if (tool == 'clear') clear();
      else if (tool) {
        element.dataset.using = tool;
        element.querySelector('.places')?.remove();  // which would be in the way
      }
    });

    new MutationObserver(() => {  // a new picture: no paint on it but the mask of an edit that was undone
      const {made: now, paint} = element.querySelector('.board')?.dataset || {};
      if (!now || now == made) return;
      made = now;
      clear();
      if (!paint) return;
      const mask = new Image();
      mask.onload = () => { canvas().getContext('2d').drawImage(mask, 0, 0); canvas().dataset.touched = 1; };
      mask.src = paint;
    }).observe(element, {subtree: true, childList: true, attributeFilter: ['data-made']});
  },

  // A file that is chosen or dropped goes to the session by its key; what became of it the server tells.
  files(element, trigger) {
    const input = () => element.querySelector('input[type=file]');
    let event = 'select';
    const send = async (file, event) => {
      if (!file) return;
      const key = document.querySelector('[data-key]').dataset.key;
      await fetch(`open/${key}?name=${encodeURIComponent(file.name)}`, {method: 'POST', body: file}).catch(() => null);
      trigger(event);
    };
    element.addEventListener('change', e => { if (e.target == input()) { send(e.target.files[0], event); e.target.value = ''; } });
    element.addEventListener('dragover', e => e.preventDefault());
    element.addEventListener('drop', e => { e.preventDefault(); send(e.dataTransfer.files[0], 'select'); });
    return what => { event = what; input().click(); };
  },

  // The inset's element: two files, the inset ('select') and its mask ('upload').
  inset(element, trigger) {
    const choose = studio.files(element, trigger);
    element.addEventListener('click', e => {
      if (e.target.dataset.file) choose(e.target.dataset.file);
      else if (e.target.className == 'none') choose('select');
    });
  },

  // The tree's element: a click on a state goes there; the current one is kept in view.
  tree(element, trigger) {
    element.addEventListener('click', e => {
      const state = e.target.closest('[data-state]');
      if (state) trigger('select', {state: state.dataset.state});
    });
    new MutationObserver(() => {
      const all = element.querySelector('.tree'), here = element.querySelector('.here');
      if (here) all.scrollLeft = here.offsetLeft - all.clientWidth / 2;
    }).observe(element, {subtree: true, childList: true, attributeFilter: ['class']});
    window.addEventListener('beforeunload', e => {  // ask before edits are lost
      if (element.querySelectorAll('[data-state]').length > 1) e.preventDefault();
    });
  },

  // Ctrl+Enter edits, Ctrl+Z undoes and Ctrl+Shift+Z or Ctrl+Y redoes, but for a text that is being typed.
  keys() {
    document.addEventListener('keydown', e => {
      if (!(e.ctrlKey || e.metaKey) || e.altKey) return;
      const key = e.key.toLowerCase(), typing = e.target.value && /^(TEXTAREA|INPUT)$/.test(e.target.tagName);
      const name = e.key == 'Enter' ? 'go' : typing ? '' : key == 'y' || key == 'z' && e.shiftKey ? 'redo' : key == 'z' ? 'undo' : '';
      const button = name && document.getElementById(name);
      if (!button) return;
      e.preventDefault();
      e.stopPropagation();
      if (!button.disabled) button.click();
    }, true);
  },

  // Past the queue, which may be full.
  stop() { fetch(`stop/${document.querySelector('[data-key]').dataset.key}`, {method: 'POST'}); },

  // An edit's inputs, with the paint put in as a PNG, or '' where the board was not touched.
  inputs(session, text, _, ...settings) {
    const canvas = document.querySelector('#picture canvas');
    return [session, text, canvas?.dataset.touched ? canvas.toDataURL() : '', ...settings];
  },
};
studio.keys();
