"""The loop: admit, forward, step, advance, settle."""
