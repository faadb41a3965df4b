"""The fixed parts of the timeline's page: style and behaviour, nothing from elsewhere."""

STYLE = """
:root { color-scheme: light dark; --line: #8884; --lane: #8881; --ink: #222; --paper: #fff;
  --queue: #b9c0c8; --served: #8fb3d9; --prefill: #f0a54a; --transfer: #b48ad6;
  --decode: #5cb85c; --fence: #d9807a; --bad: #d00020; }
@media (prefers-color-scheme: dark) { :root { --ink: #ddd; --paper: #16181b; } }
* { box-sizing: border-box; }
body { font: 13px/1.45 system-ui, sans-serif; margin: 0; color: var(--ink);
  background: var(--paper); }
header { padding: 12px 16px; }
h1 { font-size: 17px; margin: 0 0 4px; }
p { margin: 4px 0; }
code { font: 12px ui-monospace, monospace; }
.findings { max-height: 34vh; overflow: auto; margin: 8px 0; padding: 0 0 0 22px; }
.findings li { margin: 3px 0; }
.findings a { color: var(--bad); }
.good { color: #2e7d32; font-weight: 600; }
.bad { color: var(--bad); font-weight: 600; }
.tools { display: flex; gap: 16px; align-items: center; flex-wrap: wrap; margin-top: 6px; }
.key { display: inline-block; width: 12px; height: 12px; margin: 0 4px 0 10px;
  vertical-align: -1px; border-radius: 2px; }
#view { overflow-x: auto; border-top: 1px solid var(--line); position: relative; }
#sheet { position: relative; min-width: 100%; padding: 0 24px 24px; }
.axis, .lane { position: relative; }
.axis { height: 22px; }
.axis span { position: absolute; top: 2px; padding-left: 3px; border-left: 1px solid var(--line);
  height: 18px; color: #888; font-size: 11px; white-space: nowrap; }
.lane { margin-top: 4px; background: var(--lane); border-radius: 3px; }
.name { position: sticky; left: 8px; display: inline-block; font-weight: 600; padding: 1px 6px;
  z-index: 3; background: var(--paper); border-radius: 3px; opacity: .92; }
.rows { position: relative; }
.bar, .tick, .mark, .spot { position: absolute; }
.bar { height: 11px; min-width: 2px; border-radius: 2px; cursor: pointer; }
.queue { background: var(--queue); } .served { background: var(--served); }
.prefill { background: var(--prefill); } .transfer { background: var(--transfer); }
.decode { background: var(--decode); } .fence { background: var(--fence); }
.tick { width: 1px; height: 11px; background: #0003; cursor: pointer; }
.tick.abort, .tick.terminal, .tick.resume { width: 3px; height: 13px; margin: -1px 0 0 -1px; }
.tick.abort { background: #d00020; } .tick.terminal { background: #111; }
.tick.resume { background: #e06c00; }
.mark { top: 0; bottom: 0; width: 0; border-left: 2px dotted #888; z-index: 2; }
.mark b { position: absolute; bottom: 0; left: 3px; font-size: 10px; font-weight: 500;
  color: #888; white-space: nowrap; }
.mark.link_down, .mark.fault { border-left: 2px solid var(--bad); }
.mark.link_down b, .mark.fault b { color: var(--bad); }
.spot { width: 9px; height: 9px; margin: -4px 0 0 -4px; top: 10px; background: var(--bad);
  transform: rotate(45deg); z-index: 4; }
:target { outline: 3px solid var(--bad); outline-offset: 3px; }
.picking [data-r] { opacity: .12; } .picking [data-r].picked { opacity: 1; }
"""

SCRIPT = """
const sheet = document.getElementById('sheet'), view = document.getElementById('view');
const zoom = document.getElementById('zoom'), find = document.getElementById('find');
zoom.addEventListener('input', () => {
  const middle = (view.scrollLeft + view.clientWidth / 2) / sheet.clientWidth;
  sheet.style.width = 100 * 2 ** zoom.value + '%';
  view.scrollLeft = middle * sheet.clientWidth - view.clientWidth / 2;
});
function pick(text) {
  find.value = text;
  document.body.classList.toggle('picking', text !== '');
  for (const each of document.querySelectorAll('[data-r]'))
    each.classList.toggle('picked', text !== '' && each.dataset.r.startsWith(text));
}
find.addEventListener('input', () => pick(find.value.trim()));
sheet.addEventListener('click', event => {
  const request = event.target.dataset.r;
  pick(request && request !== find.value ? request : '');
});
for (const link of document.querySelectorAll('.findings a'))
  link.addEventListener('click', () => pick(link.dataset.of || ''));
"""

LAYOUT = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<header>
<h1>{title}</h1>
<p>{summary}</p>
{verdict}
<div class="tools">
<label>zoom <input id="zoom" type="range" min="0" max="12" step="0.25" value="0"></label>
<label>request <input id="find" size="34" placeholder="id, or click a bar"></label>
<span>{legend}</span>
</div>
{note}
</header>
<div id="view"><div id="sheet">
{sheet}
</div></div>
<script>{script}</script>
</body>
</html>
"""
