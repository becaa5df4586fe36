"""python -m elijah."""

import sys

from elijah.cli import main

if __name__ == "__main__":
    sys.exit(main())
