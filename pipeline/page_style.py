"""The looks of a report: light or dark as the reader has it, from a phone to paper."""

STYLE = """
:root { color-scheme: light dark; --paper: #fbfaf7; --card: #fff; --ink: #1d1c1a; --soft: #6a6760; --line: #e3e0d8;
  --grid: #eceae3; --a: #2b62b5; --b: #c8601f; --c: #2f7d4f; --d: #8d4bb8; --e: #b3364f;
  --f: #12808a; --g: #7a6a1f; --h: #5f6470; --good: #2f7d4f; --warn: #9a5b00; --shade: 0 1px 2px #0000000d; }
@media (prefers-color-scheme: dark) { :root { --paper: #151618; --card: #1c1e21; --ink: #e9e7e2; --soft: #9b9a95;
  --line: #2f3237; --grid: #292c30; --a: #7fb0f5; --b: #f0a066; --c: #7fcf9f; --d: #c99bee; --e: #f0879a;
  --f: #62c6d0; --g: #d0bf6a; --h: #aab0bd; --good: #7fcf9f; --warn: #e8b45e; --shade: none; } }
@media print { :root { color-scheme: light; --paper: #fff; --card: #fff; --ink: #000; --soft: #555; --line: #ccc;
  --grid: #e8e8e8; --a: #2b62b5; --b: #c8601f; --c: #2f7d4f; --d: #8d4bb8; --e: #b3364f; --f: #12808a;
  --g: #7a6a1f; --h: #5f6470; --good: #2f7d4f; --warn: #9a5b00; --shade: none; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); line-height: 1.5;
  font-family: system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", "Noto Sans", Arial, sans-serif; }
main { max-width: 76rem; margin: 0 auto; padding: 2.5rem 1.5rem 4rem; }
h1 { margin: 0; font-size: 1.9rem; line-height: 1.2; letter-spacing: -.015em; overflow-wrap: anywhere; }
h2 { margin: 2.6rem 0 .9rem; font-size: 1.1rem; letter-spacing: -.005em; }
.kind { margin: 0 0 .2rem; color: var(--soft); font-size: .85rem; }
.verdict { margin: .5rem 0 0; font-size: 1.05rem; max-width: 60rem; }
.verdict::before { content: ""; display: inline-block; width: .6rem; height: .6rem; border-radius: 50%;
  margin-right: .55rem; background: var(--good); }
.verdict.open::before { background: var(--warn); }
code, pre { font-family: ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace; }
code { font-size: .9em; overflow-wrap: anywhere; }
.facts { display: grid; grid-template-columns: repeat(auto-fit, minmax(9.5rem, 1fr)); gap: .75rem; margin: 1.6rem 0 0; }
.facts div, figure, details { background: var(--card); border: 1px solid var(--line); border-radius: .6rem;
  box-shadow: var(--shade); }
.facts div { padding: .7rem .9rem; }
dt { color: var(--soft); font-size: .8rem; }
.facts dd { margin: 0; font-size: 1.35rem; font-weight: 600; letter-spacing: -.01em; white-space: nowrap;
  font-variant-numeric: tabular-nums; }
.facts small { display: block; color: var(--soft); font-size: .78rem; font-weight: 400; letter-spacing: 0;
  white-space: normal; line-height: 1.35; }
.charts { display: grid; grid-template-columns: repeat(12, 1fr); gap: .75rem; }
figure { margin: 0; padding: .8rem .8rem .5rem; grid-column: span 4; min-width: 0; position: relative; display: flex;
  flex-direction: column; }
figure.wide { grid-column: span 8; } figure.tall { grid-column: span 4; }
figcaption { font-size: .75rem; padding-left: .2rem; }
figcaption b { display: block; font-size: .9rem; font-weight: 600; }
figcaption span { display: flex; flex-wrap: wrap; gap: 0 .8rem; min-height: 1.2rem; }
figcaption .key { display: block; min-height: 0; white-space: nowrap; }
figure p { margin: .1rem 0 .2rem .2rem; font-size: .75rem; color: var(--soft); }
.key::before { content: ""; display: inline-block; width: .95rem; height: .2rem; border-radius: .1rem;
  margin-right: .4rem; vertical-align: middle; background: currentColor; }
.key i { font-style: normal; color: var(--soft); }
.a { --own: var(--a); } .b { --own: var(--b); } .c { --own: var(--c); } .d { --own: var(--d); }
.e { --own: var(--e); } .f { --own: var(--f); } .g { --own: var(--g); } .h { --own: var(--h); }
.key { color: var(--own); }
.key.points::before { width: .38rem; height: .38rem; border-radius: 50%; opacity: .5; }
.key.level::before, .key.dashed::before { height: 0; border-top: 1.5px dashed var(--soft); background: none;
  border-radius: 0; }
.key.dashed::before { border-top: 2px dashed currentColor; }
svg { display: block; width: 100%; height: auto; margin-top: .4rem; overflow: visible; }
svg text { fill: var(--soft); font-size: 11px; font-variant-numeric: tabular-nums; text-anchor: middle; }
svg .tick.y { text-anchor: end; }
svg path { fill: none; stroke-linejoin: round; stroke-linecap: round; vector-effect: non-scaling-stroke; }
.grid { stroke: var(--grid); } .axis { stroke: var(--line); }
path.level { stroke: var(--soft); stroke-dasharray: 4 4; stroke-linecap: butt; }
path.line { stroke-width: 2; } path.points { stroke-width: 4; opacity: .34; }
path.few { stroke-width: 6; opacity: .45; } path.dots { stroke-width: 6.5; }
path.line, path.points, path.dots { stroke: var(--own); }
svg path.dashed { stroke-dasharray: 7 5; stroke-linecap: butt; } svg path.hair { stroke: var(--soft); opacity: .6; }
svg[data-frame] { touch-action: pan-y; }
.readout { position: absolute; right: .6rem; top: .45rem; margin: 0; padding: .1rem .5rem; border-radius: .35rem;
  max-width: calc(100% - 1.2rem); background: var(--ink); color: var(--paper); font-variant-numeric: tabular-nums;
  pointer-events: none; } .readout:empty { display: none; }
.scroll + .scroll { margin-top: .75rem; }
.scroll { overflow-x: auto; width: fit-content; max-width: 100%;
  border: 1px solid var(--line); border-radius: .6rem; background: var(--card);
  box-shadow: var(--shade); }
table { border-collapse: separate; border-spacing: 0; }
.previews th, .previews td { padding: .6rem .45rem; vertical-align: top; text-align: left; }
.previews thead th { font-size: .8rem; font-weight: 600; white-space: nowrap; border-bottom: 1px solid var(--line); }
.previews thead th small, .prompt small { display: block; color: var(--soft); font-weight: 400; font-size: .75rem; }
.previews tbody tr + tr > * { border-top: 1px solid var(--line); }
.previews .prompt { position: sticky; left: 0; z-index: 1; background: var(--card); min-width: 11rem; max-width: 17rem;
  padding-left: .9rem; font-weight: 400; font-size: .88rem; overflow-wrap: anywhere; white-space: pre-line; }
.previews td { min-width: 10.5rem; width: 15rem; }
.previews img { display: block; width: 100%; max-width: 22rem; height: auto; border-radius: .35rem; }
.previews img.small { image-rendering: pixelated; }
.none { display: grid; place-items: center; aspect-ratio: 1; border: 1px dashed var(--line); border-radius: .35rem;
  color: var(--soft); font-size: .8rem; text-align: center; padding: .5rem; }
.compare { margin: 0 0 1rem; padding: .8rem .9rem; border: 1px solid var(--line); border-radius: .6rem;
  background: var(--card); box-shadow: var(--shade); display: grid; gap: 1.4rem;
  grid-template-columns: minmax(0, 38rem) minmax(14rem, 1fr); }
.compare[hidden] { display: none; } .choice { display: grid; gap: .7rem; align-content: start; padding: .3rem .3rem 0 0;
  grid-template-columns: 1fr 1fr; } .choice label:first-child, .choice q, .choice p { grid-column: span 2; }
.choice label { font-size: .8rem; color: var(--soft); min-width: 0; } .choice select { display: block; width: 100%; }
.choice q { font-size: 1.05rem; overflow-wrap: anywhere; white-space: pre-line; max-height: 12em; overflow: auto; }
.choice .hint { margin: 0; font-size: .8rem; }
select { font: inherit; color: var(--ink); background: var(--paper); border: 1px solid var(--line);
  border-radius: .35rem; padding: .2rem .4rem; max-width: 100%; }
.stage { position: relative; width: 100%; align-self: start; grid-area: 1 / 1; border-radius: .4rem; overflow: hidden;
  --at: 50%; }
.stage:focus-within { outline: 3px solid var(--a); outline-offset: 2px; }
.stage img { display: block; width: 100%; height: auto; } .stage img.small { image-rendering: pixelated; }
.stage img + img { position: absolute; inset: 0; height: 100%; clip-path: inset(0 calc(100% - var(--at)) 0 0); }
.stage::after { content: ""; position: absolute; top: 0; bottom: 0; left: var(--at); width: 3px; margin-left: -1.5px;
  background: #fff; box-shadow: 0 0 3px #000c; pointer-events: none; }
.stage span { position: absolute; bottom: .5rem; padding: .05rem .5rem; border-radius: .3rem; font-size: .78rem;
  background: #000a; color: #fff; pointer-events: none; max-width: 46%; }
.stage span:first-of-type { left: .5rem; } .stage span:last-of-type { right: .5rem; }
.stage input { position: absolute; inset: 0; width: 100%; height: 100%; margin: 0; appearance: none; cursor: ew-resize;
  background: none; touch-action: pan-y; outline: none; }
.stage input::-webkit-slider-thumb { appearance: none; width: 2.2rem; height: 2.2rem; border-radius: 50%;
  border: 2px solid #fff; background: #0006; box-shadow: 0 0 3px #000c; }
.stage input::-moz-range-thumb { width: 2.2rem; height: 2.2rem; border-radius: 50%; border: 2px solid #fff;
  background: #0006; }
img.pick { cursor: pointer; }
.counts { margin: 0 0 .6rem; } .buckets, .samples { list-style: none; margin: 0 0 1rem; padding: 0; }
.buckets { display: flex; flex-wrap: wrap; gap: .5rem 1.4rem; }
.buckets li { display: flex; align-items: center; gap: .55rem; font-size: .88rem; font-variant-numeric: tabular-nums; }
.buckets svg { width: 2.4rem; margin: 0; } .buckets rect { fill: none; stroke: var(--a); stroke-width: 1.6; }
.buckets small, .samples small { display: block; color: var(--soft); font-size: .75rem; overflow-wrap: anywhere; }
.samples { display: grid; grid-template-columns: repeat(auto-fill, minmax(11rem, 1fr)); gap: .75rem; }
.samples li { border: 1px solid var(--line); border-radius: .6rem; background: var(--card); box-shadow: var(--shade);
  overflow: hidden; display: flex; flex-direction: column; }
.samples img { display: block; width: 100%; height: 11rem; object-fit: contain; background: var(--grid); }
.samples .none { max-height: 11rem; margin: .5rem; } .samples li div:last-child { padding: .5rem .7rem .6rem; }
.samples p { margin: 0 0 .35rem; font-size: .85rem; line-height: 1.4; overflow-wrap: anywhere; max-height: 7em;
  overflow: auto; white-space: pre-line; }
.table { font-size: .88rem; font-variant-numeric: tabular-nums; } .table th, .table td { padding: .45rem .8rem;
  text-align: left; vertical-align: top; white-space: nowrap; }
.table tr + tr > * { border-top: 1px solid var(--line); }
.table thead th { font-weight: 400; color: var(--soft); border-bottom: 1px solid var(--line); }
.table tbody th { font-weight: 600; }
.table tbody th, .table thead th:first-child { position: sticky; left: 0; background: var(--card); }
 .table td code { white-space: pre-wrap; } .table .number { text-align: right; }
.table td.wrap { white-space: normal; min-width: 8rem; max-width: 22rem; overflow-wrap: anywhere; }
.models { margin-top: 1rem; }
.swatch { display: inline-block; width: .8rem; height: .8rem; border-radius: .2rem; margin-right: .5rem;
  background: var(--own); }
.previews .run th { padding: 1.1rem .9rem .6rem; }
.previews .run span { position: sticky; left: .9rem; display: inline-block; max-width: min(100%, 80vw); }
.previews .which { position: sticky; left: 0; background: var(--card);
  z-index: 1; font-size: .85rem; font-weight: 600; min-width: 8rem; padding-left: .9rem; overflow-wrap: anywhere; }
.hint { margin: 0 0 .9rem; color: var(--soft); }
.scroll + .hint { margin-top: .6rem; font-size: .88rem; }
.about { font-size: .88rem; } .about th { font-weight: 400; color: var(--soft); text-align: left;
  vertical-align: top; padding: .15rem 1.4rem .15rem 0; white-space: nowrap; } .about td { overflow-wrap: anywhere; }
details { margin-top: .75rem; } summary { cursor: pointer; padding: .65rem .9rem; font-size: .92rem; font-weight: 600; }
details pre { margin: 0; padding: .2rem 1rem 1rem; overflow-x: auto; font-size: .8rem; line-height: 1.5; }
@media (max-width: 64rem) { figure, figure.tall { grid-column: span 6; } figure.wide { grid-column: span 12; } }
@media (max-width: 52rem) { .compare { grid-template-columns: minmax(0, 1fr); gap: .8rem; }
  .stage { grid-area: auto; } }
@media (max-width: 40rem) { main { padding: 1.4rem .9rem 3rem; } figure, figure.tall, figure.wide {
  grid-column: span 12; } figure.wide svg text { font-size: 24px; } figure.wide svg .label { display: none; }
  figure.wide svg .tick.x { transform: translateY(8px); }
  .prompt small { display: none; } .table th, .table td { padding: .4rem .55rem; }
  .samples { grid-template-columns: repeat(2, minmax(0, 1fr)); }
  .samples img { height: 8.5rem; } .previews td { min-width: 8.5rem; } .about th { padding-right: .8rem; }
  .previews .prompt { min-width: 8rem; max-width: 9rem; } }
@media print { .compare, .readout { display: none; }
  @page { margin: 14mm; } main { max-width: none; padding: 0; } body { font-size: 10pt; }
  figure { grid-column: span 6; } figure.wide { grid-column: span 12; } figure.tall { grid-column: span 6; }
  .facts { grid-template-columns: repeat(3, 1fr); }
  figure, .facts div, .previews tr { break-inside: avoid; } h2 { break-after: avoid; }
  .scroll { overflow: visible; border: 0; } .previews { table-layout: fixed; width: 100%; }
  .previews td, .previews .prompt { min-width: 0; width: auto; position: static; padding: .35rem .25rem; }
  .previews thead th { white-space: normal; } details pre { white-space: pre-wrap; } }
"""
