"""``python -m llama_infer`` is ``llama-infer``."""

from __future__ import annotations

import sys

from .cli import main

sys.exit(main())
