"""`python -m ministral_jax.cli`: the same as `ministral`."""

import sys

from . import main

sys.exit(main())
