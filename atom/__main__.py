"""`python -m atom` is the command `atom`."""

import sys

from .cli import main

sys.exit(main())
