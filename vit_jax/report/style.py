"""The look of a page, on a wide screen and on a phone, by day and by night."""

STYLE = """
:root { color-scheme: light dark; --back: #fff; --text: #1b1e23; --quiet: #596270; --rule: #d8dce2; --card: #f4f6f8;
  --l0: #2563c9; --l1: #c95414; --l2: #13795b; --l3: #7d3bb0; --l4: #8a6a00; --l5: #b0225f; }
@media (prefers-color-scheme: dark) { :root { --back: #14171b; --text: #e7eaee; --quiet: #9aa4b2; --rule: #333a43;
  --card: #1e2329; --l0: #6ea2f5; --l1: #f08a4b; --l2: #4cc39a; --l3: #bd8cf0; --l4: #d8b23c; --l5: #f07aa9; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 20px 16px 60px; max-width: 1160px; background: var(--back); color: var(--text);
  font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 26px; line-height: 1.2; margin: 0 0 8px; overflow-wrap: anywhere; }
h2 { font-size: 20px; margin: 0 0 6px; } h3 { font-size: 15px; margin: 0 0 6px; }
section { margin-top: 36px; } p { margin: 0 0 12px; max-width: 75ch; color: var(--quiet); } p b { color: var(--text); }
a { color: var(--l0); } nav { margin-top: 14px; display: flex; flex-wrap: wrap; gap: 4px 16px; }
dl { margin: 0; } dl div { display: grid; grid-template-columns: minmax(110px, 220px) 1fr; gap: 12px; padding: 2px 0; }
header dl div { grid-template-columns: 70px 1fr; }
dt { color: var(--quiet); overflow-wrap: anywhere; } dd { margin: 0; overflow-wrap: anywhere; }
details { margin-top: 10px; } summary { cursor: pointer; color: var(--l0); }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(220px, 1fr)); gap: 12px; max-width: 640px; }
.card { background: var(--card); border-radius: 8px; padding: 12px 14px; }
.card b { display: block; font-size: 28px; line-height: 1.2; } .card span { color: var(--quiet); font-size: 13px; }
figure { margin: 0; min-width: 0; } figcaption { font-size: 12px; line-height: 1.35; overflow-wrap: anywhere; }
.curves { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 330px), 1fr)); gap: 20px; }
.curves h3, .curves figcaption { padding-left: 14%; } .key { display: inline-block; margin-right: 12px; }
.key i { display: inline-block; width: 14px; height: 3px; margin-right: 5px; vertical-align: middle; }
svg { display: block; width: 100%; height: auto; } svg text { font-size: 11px; fill: var(--quiet); }
.grid { stroke: var(--rule); stroke-width: 1; } .line { fill: none; stroke-width: 1.8; stroke-linejoin: round; }
.l0 { --c: var(--l0); } .l1 { --c: var(--l1); } .l2 { --c: var(--l2); } .l3 { --c: var(--l3); } .l4 { --c: var(--l4); }
.l5 { --c: var(--l5); } .line { stroke: var(--c); } .dot { fill: var(--c); } .key i { background: var(--c); }
.column { fill: var(--l0); } .ideal { stroke: var(--text); stroke-dasharray: 4 4; }
.beside figure { max-width: 440px; } .beside figcaption { text-align: center; }
.beside { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 420px), 1fr)); gap: 24px;
  align-items: start; }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-size: 14px; }
th { text-align: left; font-weight: 600; } th, td { padding: 3px 12px 3px 0; vertical-align: middle; }
tr + tr { border-top: 1px solid var(--rule); }
.n { text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums; }
.matrix tr { border: 0; } .matrix td { min-width: 34px; height: 30px; padding: 2px 4px; text-align: center; font-size: 13px; }
.matrix th { padding: 2px 8px 2px 0; font-weight: 400; color: var(--quiet); max-width: 150px; overflow: hidden;
  text-overflow: ellipsis; white-space: nowrap; position: sticky; left: 0; background: var(--back); }
.matrix th[scope=col] { position: static; padding: 4px 0; vertical-align: bottom; text-align: center; }
.matrix th[scope=col] span { writing-mode: vertical-rl; transform: rotate(180deg); max-height: 130px; overflow: hidden; }
.right { background: color-mix(in srgb, var(--l0) calc(var(--v) * 50%), transparent); }
.wrong { background: color-mix(in srgb, var(--l1) calc(var(--v) * 60%), transparent); }
.heat { width: 100%; max-width: 520px; aspect-ratio: 1; image-rendering: pixelated; border: 1px solid var(--rule); }
.interval { display: block; position: relative; width: 180px; height: 12px; background: var(--card); border-radius: 3px; }
.interval i { position: absolute; top: 4px; height: 4px; background: var(--l0); opacity: .45; border-radius: 2px;
  min-width: 2px; }
.interval b { position: absolute; top: 1px; width: 3px; height: 10px; margin-left: -1px; background: var(--l0); }
.gallery { display: grid; grid-template-columns: repeat(auto-fill, minmax(128px, 1fr)); gap: 16px 12px; }
.gallery img, .samples img { display: block; width: 100%; background: var(--card); border-radius: 4px; margin-bottom: 4px; }
.gallery img { aspect-ratio: 1; object-fit: contain; } .pixels { image-rendering: pixelated; }
small { display: block; color: var(--quiet); font-size: 11px; }
.samples { display: grid; grid-template-columns: repeat(var(--n), minmax(72px, 150px)); gap: 10px; }
@media (max-width: 600px) { body { font-size: 14px; } .interval, .scale { display: none; }
  .matrix td { min-width: 28px; padding: 2px; font-size: 12px; } .matrix th { max-width: 90px; } th, td { padding-right: 8px; }
  .gallery { grid-template-columns: repeat(auto-fill, minmax(96px, 1fr)); }
  main dl div { grid-template-columns: 110px 1fr; } }
"""
