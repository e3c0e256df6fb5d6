"""HTML that the demo and report.html share: escaped text, badges of groups, and the colours of both."""

import html
import re

# Colours of groups and marks, as CSS variables, for a light and a dark page. The card's figure uses the light ones.
LIGHT = {"head": "#1d5fa8", "head-soft": "#e3eefa", "medium": "#8a5a00", "medium-soft": "#fbefd5",
         "tail": "#a3246b", "tail-soft": "#fbe4f0", "unknown": "#55504a", "unknown-soft": "#ecebe8",
         "accent": "#0f766e", "plain": "#7a736b"}
DARK = {"head": "#8fc1f5", "head-soft": "#16324f", "medium": "#f0c265", "medium-soft": "#43320f",
        "tail": "#f59bc8", "tail-soft": "#4c1634", "unknown": "#c9c4bd", "unknown-soft": "#3a3632",
        "accent": "#4fd1c1", "plain": "#a8a198"}

# Control characters, lone surrogates and non-characters, which XML does not allow.
_NO_TEXT = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")


def variables(colours: dict[str, str]) -> str:
    """CSS declarations: `--head: #1d5fa8; …`."""
    return " ".join(f"--{name}: {colour};" for name, colour in colours.items())


def escaped(text: object) -> str:
    """Any text, safe between tags and in quoted attributes."""
    return html.escape(_NO_TEXT.sub("\ufffd", str(text)))


def breakable(text: str) -> str:
    """Escaped text in which lines may break after an underscore, as class names are often long_words."""
    return escaped(text).replace("_", "_<wbr/>")


def badge(group: str) -> str:
    return f'<span class="badge {group}">{group}</span>'
