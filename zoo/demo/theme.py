"""The style of the page, and the JavaScript that runs in the browser."""

from pathlib import Path

import gradio as gr

from zoo.markup import DARK, LIGHT, variables

FONT = ("system-ui", "-apple-system", "Segoe UI", "Roboto", "Noto Sans", "Liberation Sans", "sans-serif")
MONO = ("ui-monospace", "SF Mono", "Menlo", "Consolas", "Liberation Mono", "monospace")

CSS = (f":root {{ {variables(LIGHT)} }}\n.dark {{ {variables(DARK)} }}\n"
       + (Path(__file__).parent / "page.css").read_text(encoding="utf-8"))

HEAD = """<script>
// A picture pasted anywhere on the page goes where a dropped one would.
addEventListener('paste', (event) => {
  const file = [...(event.clipboardData?.files ?? [])].find((f) => f.type.startsWith('image/'));
  const picture = document.querySelector('#picture');
  if (!file || !picture?.checkVisibility()) return;
  const give = () => {
    const input = picture.querySelector('input[type=file]');
    if (!input) return false;
    const carrier = new DataTransfer();
    carrier.items.add(file);
    input.files = carrier.files;
    input.dispatchEvent(new Event('change', {bubbles: true}));
    return true;
  };
  if (give()) return;
  picture.querySelector('button[aria-label=Clear], button[aria-label="Remove Image"]')?.click();
  let tries = 200;
  const again = setInterval(() => { if (give() || !tries--) clearInterval(again); }, 50);
});
</script>"""

# Screen readers read the answer out. On a phone it is below the picture, so the page scrolls to it.
ANNOUNCE = """
element.setAttribute('aria-live', 'polite');
let answered = false;
watch('value', () => {
  const now = !!element.querySelector('.best, .notice');
  if (innerWidth < 780 && now && !answered) element.scrollIntoView({block: 'start'});
  answered = now;
});
"""

CHOOSE = """
element.addEventListener('click', (event) => {
  const button = event.target.closest('button[data-example]');
  if (button) trigger('click', {index: Number(button.dataset.example)});
});
"""

# Buttons inside the table of many pictures; the last one used keeps the focus when the page is drawn again.
ACT = """
let last = null;
element.addEventListener('click', (event) => {
  const button = event.target.closest('button[data-act]');
  if (!button || button.disabled) return;
  last = button.dataset.act;
  trigger('click', {act: last});
});
watch('value', () => {
  if (last === null) return;
  const again = element.querySelector(`[data-act="${last}"]:not([disabled])`);
  if (again) again.focus({preventScroll: true});
});
"""


def theme() -> gr.themes.Base:
    return gr.themes.Base(
        primary_hue="teal", secondary_hue="teal", neutral_hue="stone", radius_size="lg", text_size="md", font=FONT,
        font_mono=MONO,
    ).set(
        body_background_fill="#faf9f7", body_background_fill_dark="#161514",
        color_accent="#0f766e", color_accent_soft="#d9f2ee", color_accent_soft_dark="#12443e",
        body_text_color="#1f1d1b", body_text_color_dark="#f0eeea",
        body_text_color_subdued="#5f5a54", body_text_color_subdued_dark="#b3ada5",
        block_background_fill="#ffffff", block_background_fill_dark="#201e1c",
        block_border_color="#e4e0da", block_border_color_dark="#3a3632",
        border_color_primary="#e4e0da", border_color_primary_dark="#3a3632",
        block_shadow="none", block_label_background_fill="#ffffff", block_label_background_fill_dark="#201e1c",
        block_label_text_color="#5f5a54", block_label_text_color_dark="#b3ada5",
        block_info_text_color="#5f5a54", block_info_text_color_dark="#b3ada5",
        button_primary_background_fill="#0f766e", button_primary_background_fill_hover="#0b5c56",
        button_primary_background_fill_dark="#0f766e", button_primary_background_fill_hover_dark="#0b5c56",
        link_text_color="#0f766e", link_text_color_dark="#4fd1c1", link_text_color_visited="#0f766e",
        link_text_color_visited_dark="#4fd1c1", link_text_color_hover="#0b5c56", link_text_color_hover_dark="#8fe3d8",
        block_title_text_color="#5f5a54", block_title_text_color_dark="#b3ada5",
        slider_color="#0f766e", slider_color_dark="#4fd1c1",
    )  # fmt: skip
