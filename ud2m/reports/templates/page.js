const sortable = table => table.querySelectorAll('thead th').forEach((head, column) => {
  const compare = (a, b) => {
    const [x, y] = [a, b].map(row => row.cells[column].dataset.value);
    if (x === '' || y === '') return (x === '') - (y === '');  // what is missing stays last
    const order = isNaN(x) || isNaN(y) ? x.localeCompare(y) : x - y;
    return head.getAttribute('aria-sort') === 'descending' ? -order : order;
  };
  head.querySelector('button').addEventListener('click', () => {
    const falling = head.getAttribute('aria-sort') === 'ascending';
    table.querySelectorAll('thead th').forEach(other => other.removeAttribute('aria-sort'));
    head.setAttribute('aria-sort', falling ? 'descending' : 'ascending');
    table.tBodies[0].append(...[...table.tBodies[0].rows].sort(compare));
  });
});
document.querySelectorAll('table:has(th button)').forEach(sortable);

let factor = 4;
const buttons = document.querySelectorAll('[data-zoom]');
const choose = value => {
  factor = value;
  buttons.forEach(b => b.setAttribute('aria-pressed', Number(b.dataset.zoom) === value));
};
buttons.forEach(button => button.addEventListener('click', () => choose(Number(button.dataset.zoom))));
choose(factor);
document.querySelectorAll('.zoom').forEach(row => { row.hidden = false; });

const enlarge = (rows, images) => {
  let held = false;
  const look = event => {
    const frame = event.target.closest('.frame:has([data-kind])');
    if (!frame) return;
    const box = frame.getBoundingClientRect();
    const share = (position, start, length) => Math.min(100, Math.max(0, 100 * (position - start) / length));
    const x = share(event.clientX, box.left, box.width), y = share(event.clientY, box.top, box.height);
    images.forEach(image => {
      image.style.transformOrigin = `${x}% ${y}%`;
      image.style.transform = `scale(${factor})`;
    });
  };
  const clear = () => images.forEach(image => { image.style.transform = ''; });
  rows.forEach(row => {
    row.addEventListener('pointermove', event => { if (!held) look(event); });
    row.addEventListener('pointerleave', () => { if (!held) clear(); });
    row.addEventListener('click', event => {
      held = !held;
      if (held) look(event); else clear();
    });
  });
};

const compare = (box, images) => {
  const stage = box.querySelector('.stage'), slider = box.querySelector('input'), play = box.querySelector('button');
  const selects = box.querySelectorAll('select');
  const sides = ['right', 'left'].map((side, k) => [stage.insertBefore(new Image(), slider), selects[1 - k], side]);
  const show = ([shown, select, side]) => {
    const { src, alt, className } = images[select.value];
    Object.assign(shown, { src, alt, className: `${side} ${className}` });
  };
  const cut = () => stage.style.setProperty('--cut', `${slider.value}%`);
  const first = (kind, other) => Math.max(other, images.findIndex(image => image.dataset.kind === kind));
  sides.forEach(side => {
    const [, select, place] = side;
    images.forEach((image, number) => select.add(new Option(image.dataset.name, number)));
    select.value = place === 'left' ? first('observation', 0) : first('sample', 1);
    select.addEventListener('change', () => show(side));
    show(side);
  });
  slider.addEventListener('input', cut);
  cut();
  const samples = [...images.keys()].filter(k => images[k].dataset.kind === 'sample');
  const [, right] = sides[0];
  let timer = 0;
  play.hidden = samples.length < 2;
  play.addEventListener('click', () => {
    clearInterval(timer);
    const playing = play.getAttribute('aria-pressed') === 'true';
    play.setAttribute('aria-pressed', !playing);
    if (playing) return;
    let turn = samples.indexOf(Number(right.value));
    const next = () => {
      turn = (turn + 1) % samples.length;
      right.value = samples[turn];
      show(sides[0]);
    };
    next();
    timer = setInterval(next, 500);
  });
  const [width, height] = ['width', 'height'].map(side => Math.max(...images.map(image => image.getAttribute(side))));
  stage.style.width = `${width * Math.max(1, Math.floor(512 / width))}px`;
  stage.style.aspectRatio = `${width} / ${height}`;
  box.hidden = false;
};

document.querySelectorAll('.strip').forEach(strip => {
  const images = [...strip.querySelectorAll('[data-kind]')];
  enlarge(strip.querySelectorAll('.pictures'), images);
  if (images.length > 1) compare(strip.querySelector('.compare'), images);
});
