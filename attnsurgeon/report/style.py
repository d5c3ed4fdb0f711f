"""The looks of the results page."""

STYLE = """
:root { color-scheme: light dark; --ink: #1d2430; --dim: #5c6675; --line: #d7dce3; --page: #fff;
  --card: #f5f7fa; --base: #8a94a3; --own: #0b66c3; --slow: #b3361b; --fast: #1a7f43; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ee; --dim: #9aa4b2; --line: #39414d;
  --page: #14181e; --card: #1c222a; --base: #7b8695; --own: #5aa9f7; --slow: #f08a6c;
  --fast: #63c98a; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
main { max-width: 64rem; margin: 0 auto; padding: 1.5rem 1rem 4rem; }
h1 { font-size: 1.6rem; margin: 0; }
h2 { font-size: 1.15rem; margin: 2.2rem 0 .6rem; overflow-wrap: anywhere; }
h3 { font-size: 1rem; margin: 1.2rem 0 .3rem; font-weight: 600; overflow-wrap: anywhere; }
.where, .axis, .label small, .legend { color: var(--dim); font-size: .875rem; }
.where { margin: .2rem 0 1rem; }
pre { background: var(--card); padding: .6rem .8rem; border-radius: .4rem; margin: 0;
  white-space: pre-wrap; overflow-wrap: anywhere; font-size: .875rem; }
.row { display: grid; grid-template-columns: minmax(0, 19rem) 1fr; gap: .1rem 1rem;
  align-items: center; padding: .35rem 0; border-top: 1px solid var(--line); }
.label { overflow-wrap: anywhere; line-height: 1.3; }
.label small { display: block; }
.track { position: relative; height: 1.5rem; }
.zero { position: absolute; top: 0; bottom: 0; border-left: 1px dashed var(--base); }
.span, .dot { position: absolute; top: 50%; border-radius: 1rem; }
.span { height: .3rem; margin-top: -.15rem; min-width: 2px; opacity: .55; }
.dot { width: .7rem; height: .7rem; margin: -.35rem 0 0 -.35rem; }
.slow { background: var(--slow); } .fast { background: var(--fast); }
.same { background: var(--base); }
.axis { display: flex; justify-content: space-between; }
.plot { display: block; width: 100%; height: 7.5rem; background: var(--card);
  border-radius: .3rem; }
.legend i { display: inline-block; width: .8rem; height: .8rem; margin: 0 .35rem -.08rem 0;
  border-radius: .2rem; opacity: .75; }
.legend span { display: inline-block; max-width: 100%; margin-right: 1.2rem;
  overflow-wrap: anywhere; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .875rem; white-space: nowrap; }
th, td { text-align: left; padding: .3rem .8rem .3rem 0; border-bottom: 1px solid var(--line); }
th:first-child, td:first-child { position: sticky; left: 0; background: var(--page);
  white-space: normal; min-width: 14rem; max-width: 16rem; overflow-wrap: anywhere; }
.figure { text-align: right; font-variant-numeric: tabular-nums; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .1rem 1rem; font-size: .875rem; }
dt { color: var(--dim); } dd { margin: 0; overflow-wrap: anywhere; }
p, li { overflow-wrap: anywhere; }
ul { padding-left: 1.2rem; }
.doubt { color: var(--slow); }
@media (max-width: 40rem) { .row { grid-template-columns: 1fr; } main { padding-top: 1rem; }
  th:first-child, td:first-child { min-width: 9rem; max-width: 9rem; }
  th:nth-child(2), td:nth-child(2) { white-space: normal; min-width: 5rem; } }
"""
"""One column below 40 rem; colours follow the reader's light or dark."""
