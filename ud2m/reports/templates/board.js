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
document.querySelectorAll('table').forEach(sortable);
let factor = 4;
const buttons = document.querySelectorAll('[data-zoom]');
const choose = value => {
  factor = value;
  buttons.forEach(b => b.setAttribute('aria-pressed', Number(b.dataset.zoom) === value));
};
buttons.forEach(button => button.addEventListener('click', () => choose(Number(button.dataset.zoom))));
choose(factor);
document.querySelectorAll('.strip').forEach(strip => {
  const images = strip.querySelectorAll('img');
  strip.addEventListener('pointermove', event => {
    const frame = event.target.closest('.frame');
    if (!frame) return;
    const box = frame.getBoundingClientRect();
    const share = (position, start, length) => Math.min(100, Math.max(0, 100 * (position - start) / length));
    const x = share(event.clientX, box.left, box.width), y = share(event.clientY, box.top, box.height);
    images.forEach(image => {
      image.style.transformOrigin = `${x}% ${y}%`;
      image.style.transform = `scale(${factor})`;
    });
  });
  strip.addEventListener('pointerleave', () => images.forEach(image => { image.style.transform = ''; }));
});
