"""Near names: what a message says besides the list when a name of a closed set is misspelled."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def did_you_mean(name: object, known: Iterable[str], *, cutoff: float = 0.6) -> str:
    """``"did you mean a or b? "`` where names of the set are near, else nothing; a list of all may follow.

    Args:
        name: what was given.
        known: the set.
        cutoff: least similarity, in [0, 1], of :func:`difflib.get_close_matches`; case does not count, and names that
            begin with the given one are always near.

    Example:
        >>> did_you_mean("jaquant", ["ste", "jacquant"])
        'did you mean jacquant? '
        >>> did_you_mean("adamw", ["sgd", "adamw_torch"])
        'did you mean adamw_torch? '
        >>> did_you_mean("xyz", ["ste", "jacquant"])
        ''
    """
    by_lower = {text.lower(): text for text in known}
    low = str(name).lower()
    longer = [key for key in by_lower if len(low) > 2 and key.startswith(low)]
    near = dict.fromkeys([*longer, *difflib.get_close_matches(low, by_lower, n=3, cutoff=cutoff)])
    return f"did you mean {' or '.join([by_lower[key] for key in near][:3])}? " if near else ""
