"""Whether a part that works on windows (see :mod:`llama_infer.candidates`) gives there what its plain call gives."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from ..batch import Batch
    from .conformance import Trial


def check_narrow(trial: Trial, logits: Tensor, batch: Batch, out: Tensor, count: int) -> None:
    """``narrow`` on a window of the ``count`` likeliest tokens, ``out`` being the plain call's result."""
    import numpy as np
    import torch

    from ..candidates import Candidates

    if hasattr(trial.part, "window") and not (isinstance(size := trial.part.window(batch), int) and size >= 0):
        trial.fail(f"window() is an int, 0 for no idea; given: {size!r}")
    given = Candidates.of(logits, count)
    before = given.values.copy()
    with np.errstate(all="ignore"):
        narrowed = trial.part.narrow(given, batch)
    window = f"on a window of {count}, "
    if not np.array_equal(given.values, before):
        trial.fail(f"{window}narrow wrote into the candidates")
    same = narrowed.ids.shape == given.ids.shape and np.array_equal(np.sort(narrowed.ids), np.sort(given.ids))
    if narrowed.values.shape != before.shape or not same:
        trial.fail(f"{window}narrow changed which tokens are candidates")
    values, ids = torch.from_numpy(narrowed.values), torch.from_numpy(narrowed.ids)
    fits, complete = torch.from_numpy(narrowed.fits)[:, 0], torch.from_numpy(narrowed.complete)[:, 0]
    differ = trial.compare(values, out.gather(1, ids))
    trial.fail_rows(fits & differ, f"{window}narrow said that the window fits, and differs from the plain call")
    outside = (out.scatter(1, ids, -torch.inf) > -torch.inf).any(-1)
    trial.fail_rows(
        complete & fits & outside, f"{window}narrow said complete, and the plain call keeps a token outside"
    )
    everything = narrowed.everything()
    full = everything.gather(1, ids)
    away = ((values > -torch.inf) & ~torch.isclose(full, values, rtol=1e-5, atol=1e-5)).any(-1)
    trial.fail_rows(away & fits, f"{window}everything() differs from the candidates that narrow kept")
    removed = ((everything > -torch.inf) & (out == -torch.inf)).scatter(1, ids, False).any(-1)
    unsaid = fits & ~complete & removed
    trial.fail_rows(unsaid, f"{window}narrow said fits, not complete, and the plain call removes a token outside")


def check_choose(trial: Trial, logits: Tensor, batch: Batch, count: int, plain: Callable[[Tensor], Tensor]) -> None:
    """With only the ``count`` likeliest tokens left, a window on them must give the choice of the ``plain`` call."""
    import numpy as np
    import torch

    from ..candidates import Candidates

    candidates = Candidates.of(logits, count)
    ids = torch.from_numpy(candidates.ids)
    expected = plain(torch.full_like(logits, -torch.inf).scatter(1, ids, torch.from_numpy(candidates.values)))
    with np.errstate(all="ignore"):
        index = trial.part.choose(candidates._replace(complete=np.ones_like(candidates.complete)), batch)
    if index.shape != expected.shape or bool(((index < 0) | (index >= count)).any()):
        trial.fail(f"choose on a window of {count} gave no place in it for each row")
    chosen = ids[torch.arange(len(ids)), torch.from_numpy(index)]
    trial.fail_rows(chosen != expected, f"choose on a window of {count} took another token than the plain call")
