"""`python -m luthier`: the command line, where no `luthier` is on the PATH."""

from luthier.cli import main

if __name__ == "__main__":
    main()
