'use strict';
// What the page does beyond being read: colours, values under the pointer, switches of runs, pictures at full size; and
// when it is served by `dblaunch watch`, news. All listeners are on the document, since news replaces sections.
(() => {
  const root = document.documentElement;
  const all = (selector, within = document) => [...within.querySelectorAll(selector)];

  // Colours.
  const showTheme = () => all('[data-theme-value]').forEach(button =>
    button.setAttribute('aria-pressed', String(button.dataset.themeValue === (root.dataset.theme || ''))));
  const setTheme = theme => {
    root.dataset.theme = theme;
    // A file opened from disk may have no storage.
    try { localStorage.setItem('dblaunch-theme', theme); } catch {}
    showTheme();
  };

  // Values under the pointer, or where arrow keys have gone.
  const data = new WeakMap();
  const dataOf = plot => {
    if (!data.has(plot)) data.set(plot, JSON.parse(plot.parentElement.querySelector('script').textContent));
    return data.get(plot);
  };
  const format = value => {
    const size = Math.abs(value);
    if (size !== 0 && (size < 1e-3 || size >= 1e6)) return value.toExponential(3).replace(/\.?0+e/, 'e').replace('e+', 'e').replace(/-/g, '−');
    return Number(value.toPrecision(4)).toLocaleString('en', { maximumFractionDigits: 8 }).replace('-', '−');
  };
  const nearest = (steps, step) => {
    let low = 0, high = steps.length - 1;
    while (high - low > 1) {
      const middle = (low + high) >> 1;
      if (steps[middle] < step) low = middle; else high = middle;
    }
    return Math.abs(steps[low] - step) <= Math.abs(steps[high] - step) ? low : high;
  };
  const isOff = run => document.body.classList.contains('off-' + run);
  const shownLines = plot => dataOf(plot).lines.filter(line => line.at.length && !isOff(line.run));
  let pointed = null; // { chart: id, step }
  const clear = () => { all('.cursor, .tip').forEach(element => element.remove()); };
  const element = (name, className, text) => {
    const made = document.createElement(name);
    if (className) made.className = className;
    if (text !== undefined) made.textContent = text;
    return made;
  };
  const point = (plot, step) => {
    clear();
    const lines = shownLines(plot);
    if (!lines.length) return;
    const { x } = dataOf(plot);
    // The nearest step that any line has a value at; then every line's nearest value to it.
    const steps = lines.map(line => line.at[nearest(line.at, step)]);
    const at = steps.reduce((best, found) => Math.abs(found - step) < Math.abs(best - step) ? found : best);
    pointed = { chart: plot.parentElement.id, step: at };
    const place = (at - x[0]) / (x[1] - x[0]);
    const cursor = element('div', 'cursor');
    cursor.style.left = 100 * place + '%';
    const tip = element('div', 'tip');
    tip.setAttribute('role', 'status');
    tip.append(element('b', '', 'step ' + at.toLocaleString('en')));
    const several = new Set(lines.map(line => line.run)).size > 1;
    const kinds = new Set(lines.map(line => line.kind)).size > 1;
    for (const line of lines.toSorted((a, b) => a.run - b.run)) {
      const i = nearest(line.at, at);
      // A run that had ended by then, or an entry that thinning left out nearby, is not given another step's value.
      if (at > line.at[line.at.length - 1] || at < line.at[0]) continue;
      const row = element('div');
      const name = element('span', 'name');
      name.append(element('span', 'swatch c' + line.run % 8));
      name.append([several ? line.name : '', kinds ? (line.kind === 'raw' ? 'value' : 'average') : ''].filter(Boolean).join(', '));
      const off = line.at[i] === at ? '' : ' (step ' + line.at[i].toLocaleString('en') + ')';
      row.append(name, element('span', 'value', format(line.is[i]) + off));
      tip.append(row);
    }
    plot.append(cursor, tip);
    if (place < .5) tip.style.left = `calc(${100 * place}% + 10px)`;
    else tip.style.right = `calc(${100 * (1 - place)}% + 10px)`;
  };
  const stepUnder = (plot, event) => {
    const box = plot.getBoundingClientRect();
    const { x } = dataOf(plot);
    const place = Math.min(1, Math.max(0, (event.clientX - box.left) / box.width));
    return x[0] + place * (x[1] - x[0]);
  };
  const move = (plot, by) => {
    const lines = shownLines(plot);
    if (!lines.length) return;
    const steps = lines.reduce((longest, line) => line.at.length > longest.length ? line.at : longest, []);
    const here = pointed && pointed.chart === plot.parentElement.id ? nearest(steps, pointed.step) : by > 0 ? -1 : steps.length;
    point(plot, steps[Math.min(steps.length - 1, Math.max(0, here + by))]);
  };
  document.addEventListener('pointermove', event => {
    const plot = event.target.closest?.('.plot');
    if (plot) point(plot, stepUnder(plot, event));
    else if (pointed && !document.activeElement?.matches('.plot')) { clear(); pointed = null; }
  });
  document.addEventListener('pointerdown', event => {
    const plot = event.target.closest?.('.plot');
    if (plot) point(plot, stepUnder(plot, event));
  });
  document.addEventListener('focusout', event => {
    if (event.target.matches?.('.plot')) { clear(); pointed = null; }
  });

  // Switches of runs.
  const showSwitches = () => all('.run-switch').forEach(button =>
    button.setAttribute('aria-pressed', String(!isOff(button.dataset.run))));

  // Pictures at full size, with earlier and later ones of the same row.
  const viewer = document.getElementById('viewer');
  let row = [], shown = 0;
  const show = i => {
    shown = i;
    const from = row[i].querySelector('img'), to = viewer.querySelector('img');
    for (const name of ['src', 'width', 'height', 'alt']) to.setAttribute(name, from.getAttribute(name));
    to.className = from.className;
    to.hidden = false;
    viewer.querySelector('.caption').textContent = row[i].dataset.caption;
    viewer.querySelector('[data-move="-1"]').disabled = i === 0;
    viewer.querySelector('[data-move="1"]').disabled = i === row.length - 1;
  };
  const go = by => { if (row[shown + by]) show(shown + by); };

  document.addEventListener('click', event => {
    const button = event.target.closest?.('button');
    if (event.target === viewer) viewer.close();
    if (!button) return;
    if (button.dataset.themeValue !== undefined) setTheme(button.dataset.themeValue);
    else if (button.dataset.run !== undefined) {
      document.body.classList.toggle('off-' + button.dataset.run);
      showSwitches();
    } else if (button.dataset.caption !== undefined) {
      row = all('button', button.closest('[data-row]'));
      show(row.indexOf(button));
      viewer.showModal();
    } else if (button.dataset.move === '0') viewer.close();
    else if (button.dataset.move) go(Number(button.dataset.move));
  });
  document.addEventListener('keydown', event => {
    const by = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (!by || event.ctrlKey || event.altKey || event.metaKey) return;
    if (viewer.open) { go(by); event.preventDefault(); }
    else if (event.target.matches?.('.plot')) { move(event.target, by * (event.shiftKey ? 10 : 1)); event.preventDefault(); }
  });

  // News: the page is fetched anew and the sections that differ are replaced, as the reader left them.
  const parts = within => all('main > section[id], #title', within);
  const follow = () => {
    const had = new Map(parts(document).map(part => [part.id, part.outerHTML]));
    let version = null, asked = 0;
    const live = (lost, why = '') => {
      const mark = document.getElementById('live');
      if (!mark) return;
      mark.classList.toggle('lost', Boolean(lost));
      mark.textContent = lost || 'Live';
      mark.title = why;
    };
    const ages = () => all('time[data-at]').forEach(time => {
      const seconds = Math.max(0, Math.round(Date.now() / 1000 - time.dataset.at));
      const [count, unit] = seconds < 100 ? [seconds, 's'] : seconds < 6000 ? [Math.round(seconds / 60), 'min'] : [Math.round(seconds / 3600), 'h'];
      time.textContent = count + ' ' + unit + ' ago';
    });
    const replace = (old, fresh) => {
      const open = all('details', old).map(details => details.open);
      const scrolled = all('.strip, .scroll', old).map(box => [box.id, box.scrollLeft, box.scrollLeft + box.clientWidth >= box.scrollWidth - 4 && box.scrollLeft > 0]);
      const focused = all('button, .plot, .strip, .scroll, summary', old).indexOf(document.activeElement);
      old.replaceWith(fresh);
      all('details', fresh).forEach((details, i) => { details.open = Boolean(open[i]); });
      all('.strip, .scroll', fresh).forEach((box, i) => {
        if (scrolled[i]) box.scrollLeft = scrolled[i][2] ? box.scrollWidth : scrolled[i][1];
      });
      if (focused >= 0) all('button, .plot, .strip, .scroll, summary', fresh)[focused]?.focus({ preventScroll: true });
    };
    // What is uppermost in the window stays where it is.
    const place = () => {
      const top = all('main > section[id], .chart').findLast(part => part.getBoundingClientRect().top <= 40);
      return top && scrollY > 0 ? { id: top.id, top: top.getBoundingClientRect().top } : null;
    };
    const stay = was => {
      const top = was && document.getElementById(was.id);
      if (top) scrollBy({ top: top.getBoundingClientRect().top - was.top, behavior: 'instant' });
    };
    const take = html => {
      const was = place();
      const fresh = parts(new DOMParser().parseFromString(html, 'text/html'));
      const at = pointed;
      const gone = new Set(had.keys());
      let before = null;
      for (const part of fresh) {
        gone.delete(part.id);
        const old = document.getElementById(part.id);
        if (!old) before ? before.after(part) : document.querySelector('main').prepend(part);
        else if (had.get(part.id) !== part.outerHTML) { had.set(part.id, part.outerHTML); replace(old, part); }
        had.set(part.id, had.get(part.id) ?? part.outerHTML);
        if (part.id !== 'title') before = document.getElementById(part.id);
      }
      gone.forEach(id => { had.delete(id); document.getElementById(id)?.remove(); });
      document.title = new DOMParser().parseFromString(html, 'text/html').title;
      showSwitches();
      stay(was);
      const plot = at && document.getElementById(at.chart)?.querySelector('.plot');
      if (plot) point(plot, at.step);
    };
    const ask = async () => {
      if (document.hidden) return;
      const turn = ++asked;
      try {
        const answer = await fetch('/', { cache: 'no-cache' });
        const text = await answer.text();
        if (turn !== asked) return;
        if (!answer.ok) throw new Error(text.trim());
        live('');
        if (answer.headers.get('etag') !== version) { version = answer.headers.get('etag'); take(text); }
      } catch (error) {
        error instanceof TypeError ? live('Connection lost') : live('Not readable', error.message);
      }
    };
    ages();
    setInterval(ages, 1000);
    const again = () => ask().finally(() => { ages(); setTimeout(again, 2000); });
    setTimeout(again, 2000);
    document.addEventListener('visibilitychange', ask);
  };

  showTheme();
  if (root.dataset.live !== undefined) follow();
})();
