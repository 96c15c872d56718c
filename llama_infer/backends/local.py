"""Our own engine in this process."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..engine.engine import Assembly, LocalEngine


class LocalBackend:
    """Runs every combination of parts on the loaded transformers model."""

    name = "local"

    def __init__(self) -> None:
        self._idle: LocalEngine | None = None
        self._lock = threading.Lock()

    def unsupported(self, assembly: Assembly) -> Sequence[str]:
        """Why this pipeline cannot be run here, reason by reason: no cache, or an attention that cannot be packed."""
        from ..models.attention import own_state, refusal, takes_cache

        model = assembly.loaded.model
        if not takes_cache(model):
            return [f"the forward of {type(model).__name__} takes no past_key_values, where the engine keeps its state"]
        state = own_state(model)
        if state is not None:
            return [f"{type(model).__name__} keeps {state} in its modules, where rows would share it, not in the cache"]
        reason = refusal(model) if getattr(assembly.cache(), "packed", False) else None
        return [f"{reason}: use cache='plain'"] if reason else []

    def open(self, assembly: Assembly) -> LocalEngine:
        """An engine; on a GPU one that was closed is used again, with what it has recorded and its memory."""
        from ..engine.engine import LocalEngine

        with self._lock:
            engine = self._idle
            if engine is not None and engine.assembly is assembly:
                self._idle = None
            else:
                engine = LocalEngine(assembly)
        engine.closed = self._keep if assembly.loaded.device.type == "cuda" else None
        return engine

    def _keep(self, engine: LocalEngine) -> None:
        with self._lock:
            self._idle = engine  # the last one only: each holds memory
