"""`python -m training RECIPE …` is `metasaug train RECIPE …`."""

import sys

from metasaug import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
