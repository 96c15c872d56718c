"""A module for each suite, with ``run(session)``."""
