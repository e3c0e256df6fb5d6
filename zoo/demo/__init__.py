"""The parts of the demo (app.py): the HTML of each part of the page, and its events.

    models.py      which models there are, and each loaded once
    pieces.py      badges, percentages, pictures: what every part is made of
    answers.py     one picture, several models beside each other, under any prior
    pictures.py    many pictures or a zip: table, gallery, CSV
    long_tail.py   class sizes, and accuracy against them
    directions.py  the semantic directions of a class
    model_page.py  the card of a model, how to load it, how to cite it
    look.py        the theme; page.css the rest
    space.py       builds the folder of a Hugging Face Space: python -m zoo.demo.space

Nothing here imports torch, and importing `zoo` imports nothing of this.
"""
