"""`python -m export FOLDER` is `metasaug export FOLDER`."""

import sys

from metasaug import main

if __name__ == "__main__":
    sys.exit(main(["export", *sys.argv[1:]]))
