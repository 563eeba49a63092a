"""The style sheet of a report's page, light and dark."""

from __future__ import annotations


# After Okabe and Ito: told apart by colour-blind readers too. The first is the baseline's; lighter on dark pages.
_LIGHT = ("#6b7280", "#0072b2", "#d55e00", "#009e73", "#b4528c", "#b87a00", "#2a8fc4", "#8c564b")
_DARK = ("#9ca3af", "#56a8e0", "#f08a4b", "#33c79c", "#e08fbd", "#e6b422", "#7cc7ef", "#c49c94")
COLOURS = len(_LIGHT)


def colour_of(place: int) -> str:
    """The colour of a model by its place in the report, as a CSS value."""
    return f"var(--m{place if place < COLOURS else 1 + (place - 1) % (COLOURS - 1)})"


def _colours(values: tuple[str, ...]) -> str:
    return "".join(f"--m{place}:{value};" for place, value in enumerate(values))


_LIGHT_PAGE = (
    "--page:#f6f7f9;--card:#fff;--ink:#1b1f24;--soft:#5b6470;--line:#dfe3e8;--good:#0b7a4b;--bad:#b3261e;"
    f"--heat:#0072b2;--on-heat:#fff;{_colours(_LIGHT)}"
)
_DARK_PAGE = (
    "--page:#14171b;--card:#1c2026;--ink:#e8eaed;--soft:#a2abb6;--line:#343a43;--good:#4cd194;--bad:#ff8a80;"
    f"--heat:#3d9be0;--on-heat:#fff;{_colours(_DARK)}"
)

STYLE = f"""
:root{{color-scheme:light dark;{_LIGHT_PAGE}}}
@media (prefers-color-scheme:dark){{:root{{{_DARK_PAGE}}}}}
*{{box-sizing:border-box}}
body{{margin:0;background:var(--page);color:var(--ink);
font:15px/1.5 system-ui,"Segoe UI",Roboto,"DejaVu Sans",sans-serif}}
main{{max-width:1120px;margin:0 auto;padding:32px 20px 64px}}
h1{{font-size:1.75rem;line-height:1.2;margin:0 0 6px;text-wrap:balance;overflow-wrap:anywhere}}
h2{{font-size:1.15rem;margin:44px 0 4px}}
h3{{font-size:1rem;margin:0;overflow-wrap:anywhere}}
p{{margin:4px 0 12px}}
a{{color:inherit}}
.soft,figcaption,th{{color:var(--soft)}}
.soft{{font-size:.9rem}}
.cards{{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,320px),1fr));gap:16px;margin:20px 0}}
.card,figure{{background:var(--card);border:1px solid var(--line);border-radius:10px;padding:16px 18px;margin:0;
min-width:0}}
.card{{border-top:4px solid var(--own)}}
.figures{{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,400px),1fr));gap:16px}}
.figures figure{{max-width:560px;width:100%}}
figcaption{{font-size:.9rem;margin-bottom:6px}}
.tiles{{display:grid;grid-template-columns:repeat(3,1fr);gap:10px;margin:12px 0}}
.tile b{{display:block;font-size:1.4rem;line-height:1.2;font-variant-numeric:tabular-nums;white-space:nowrap}}
.tile span{{font-size:.8rem;color:var(--soft)}}
.good{{color:var(--good)}}.bad{{color:var(--bad)}}
.card ul{{margin:0;padding-left:1.1em;font-size:.9rem;overflow-wrap:anywhere}}
.wide{{overflow-x:auto;background:var(--card);border:1px solid var(--line);border-radius:10px;margin:10px 0 16px}}
table{{border-collapse:collapse;width:100%;font-size:.92rem}}
th{{font-weight:600;font-size:.82rem;vertical-align:bottom}}
th,td{{padding:7px 12px;text-align:right;border-bottom:1px solid var(--line);font-variant-numeric:tabular-nums;
white-space:nowrap}}
th:first-child,td:first-child,.words td,.words th{{text-align:left}}
.words td{{white-space:normal;min-width:8em}}
.classes th,.classes td{{padding:7px 8px}}
.classes th,.classes td:first-child{{white-space:normal;overflow-wrap:anywhere}}
.classes td:first-child{{min-width:6em}}
tr:last-child td{{border-bottom:0}}
tr.base td{{background:color-mix(in srgb,var(--soft) 9%,transparent)}}
.dot{{display:inline-block;width:.7em;height:.7em;border-radius:50%;background:var(--own);margin-right:.5em}}
.tag{{font-size:.75rem;color:var(--soft);border:1px solid var(--line);border-radius:99px;padding:0 .6em;
margin-left:.5em}}
.bar{{background:linear-gradient(to right,color-mix(in srgb,var(--own) 26%,transparent) var(--part),transparent 0)
no-repeat}}
.heat td{{text-align:center;min-width:4.2em}}
.heat td.cell{{background:color-mix(in srgb,var(--heat) calc(100% * var(--part)),transparent)}}
.heat td.full{{color:var(--on-heat)}}
.text{{line-height:2.7;margin:10px 0}}
.word{{display:inline-block;line-height:1.15;padding:2px 5px;margin:0 2px;border-radius:5px;vertical-align:middle;
text-align:center;background:color-mix(in srgb,var(--own) calc(45% * var(--part)),transparent);max-width:100%;
overflow-wrap:anywhere}}
.word.gone{{color:var(--soft)}}
.word small{{display:block;font-size:.68rem;color:var(--soft)}}
.model{{margin:18px 0 0}}
ol.steps{{margin:4px 0 0;padding-left:1.3em;font-size:.92rem}}
ol.steps li{{margin-bottom:6px;overflow-wrap:anywhere}}
code{{font:.88em ui-monospace,"DejaVu Sans Mono",monospace}}
pre{{white-space:pre-wrap;overflow-wrap:anywhere;background:var(--card);border:1px solid var(--line);
border-radius:10px;padding:12px 16px;margin:10px 0}}
dl{{display:grid;grid-template-columns:max-content 1fr;gap:4px 18px;margin:10px 0;font-size:.92rem}}
dt{{color:var(--soft)}}dd{{margin:0;overflow-wrap:anywhere;min-width:0}}
svg{{display:block;width:100%;height:auto;font-size:12px}}
svg text{{fill:var(--ink)}}svg .tick,svg .axis{{fill:var(--soft)}}
svg line,svg path{{stroke:var(--line);fill:none}}
svg .name{{paint-order:stroke;stroke:var(--card);stroke-width:4px;stroke-linejoin:round}}
svg .front{{stroke:var(--soft);stroke-dasharray:5 4;stroke-width:1.5}}
svg .own{{fill:var(--own);stroke:var(--card);stroke-width:1.5}}
svg circle{{fill-opacity:.8}}
.legend{{display:flex;flex-wrap:wrap;gap:4px 18px;font-size:.88rem;margin:8px 0}}
.legend span{{overflow-wrap:anywhere}}
footer{{margin-top:44px;font-size:.85rem;color:var(--soft)}}
@media (max-width:560px){{main{{padding:20px 12px 40px}}dl{{grid-template-columns:1fr;gap:0}}dd{{margin-bottom:8px}}
.tile b{{font-size:1.15rem}}}}
@media print{{.card,figure,.wide{{break-inside:avoid}}}}
"""
