"""The parts of the demo (app.py): the HTML of each part of the page, and its events.

    models.py      the models on offer, each loaded once
    html.py        badges, percentages, pictures: what every part is made of
    answers.py     one picture, several models side by side, under any prior
    pictures.py    many pictures or a zip: table, gallery, CSV
    long_tail.py   class sizes, and accuracy against them
    directions.py  the semantic directions of a class
    model_page.py  the card of a model, and how to load it
    theme.py       the theme, and the scripts of the page; page.css has the rest of the style
    server.py      the web server, with its limits
    gate.py        the checks of each request before Gradio gets it
    uploads.py     the folder of uploads, and its quota
    space.py       builds the folder of a Hugging Face Space: python -m zoo.demo.space

Nothing here imports torch, and `import zoo` imports nothing from here.
"""
