"""Reads a report's page back: which elements hold what, and whether their numbers are those of report.json."""

import json
import re
from dataclasses import dataclass, field
from html.parser import HTMLParser


UNITS = {"T": 1e12, "G": 1e9, "M": 1e6, "k": 1e3}
NUMBER = re.compile(r"([+-]?\d+(?:\.\d+)?(?:e-?\d+)?)\s?(T|G|M|k|%|MB|x)?")
# Of quantities.
NAMES = re.compile(r"\bp(50|95)\b|\bF1\b")
# Elements that have no end in HTML.
VOID = {"meta", "link", "br", "wbr"}


@dataclass
class Element:
    tag: str
    attributes: dict
    text: str = ""
    within: "Element | None" = None
    own: list = field(default_factory=list)

    def has(self, attribute):
        return attribute in self.attributes or (self.within is not None and self.within.has(attribute))

    def is_in(self, *tags):
        return self.tag in tags or (self.within is not None and self.within.is_in(*tags))

    def classes(self):
        return set((self.attributes.get("class") or "").split())


class Page(HTMLParser):
    """The elements of a page, each with the text in it."""

    def __init__(self, text):
        super().__init__()
        self.elements, self._open = [], []
        self.feed(text)
        assert not self._open, [element.tag for element in self._open]

    def handle_starttag(self, tag, attrs):
        element = Element(tag, dict(attrs), within=self._open[-1] if self._open else None)
        self.elements.append(element)
        if tag not in VOID:
            self._open.append(element)

    def handle_startendtag(self, tag, attrs):
        self.elements.append(Element(tag, dict(attrs), within=self._open[-1]))

    def handle_endtag(self, tag):
        assert self._open.pop().tag == tag

    def handle_data(self, data):
        if self._open:
            self._open[-1].own.append(data)
        for element in self._open:
            element.text += data

    def embedded(self):
        return json.loads(next(e.text for e in self.elements if e.attributes.get("id") == "report"))


def at(report, place):
    for part in place.split("."):
        report = report[int(part)] if isinstance(report, list) else report[part]
    return report


def says(text, value, place):
    """Whether a text is a value of report.json as a person writes it: equal, or equal to its digits."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return text == str(value)
    found = NUMBER.fullmatch(text)
    if not found:
        return False
    digits, unit = found.groups()
    scale = {"%": 0.01, "MB": 1e6, "x": 1.0, None: 1.0, **UNITS}[unit]
    if place.rpartition(".")[2] in ("p50", "p95"):
        scale *= 1e-3
    # Half of the last digit that is shown; large counts show three digits.
    last = 10.0 ** -len(digits.partition(".")[2])
    return abs(float(digits) * scale - value) <= (0.5 + 1e-6) * last * scale


def untraced(page, report):
    """What the page says that does not stand in report.json: numbers without a place, and values that differ."""
    wrong = []
    for element in page.elements:
        places = (element.attributes.get("data-from") or "").split()
        values = [at(report, place) for place in places]
        one = element.tag == "data" and len(places) == 1 and not isinstance(values[0], dict)
        if one and not (element.attributes["value"] == repr(values[0]) and says(element.text, values[0], places[0])):
            wrong.append((places[0], element.text, values[0]))
        free = element.has("data-from") or element.is_in("style", "script", "a", "title", "code")
        said = "".join(element.own)
        if not free and "tick" not in element.classes() and re.search(r"\d", NAMES.sub("", said)):
            wrong.append((element.tag, said))
    return wrong
