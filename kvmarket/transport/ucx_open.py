"""Loading ucxx and making a UCX context: what ucxx and UCX do to a process at that moment is mended here."""

from __future__ import annotations

import logging
import os
from typing import Any

from kvmarket.errors import MissingExtraError, TransportUnavailableError

logger = logging.getLogger(__name__)

FRAGMENTS = "UCX_RNDV_FRAG_MEM_TYPE"


def load_ucxx() -> Any:
    """Import ucxx's core module, or raise `MissingExtraError` / `TransportUnavailableError`.

    ucxx prints an error line on standard output for each connection that breaks, which here is a normal event with a
    report of its own: unless the user chose a level, only fatal ones are left. At its import it also sets where staging
    fragments lie, which every later look at the environment would take for the user's choice: that is undone. And it
    turns off a cache that UCX reads when it is loaded, which is too late and gives a warning: here it is in time.
    """
    os.environ.setdefault("UCXX_LOG_LEVEL", "fatal")
    os.environ.setdefault("UCX_MEMTYPE_CACHE", "n")
    fragments = os.environ.get(FRAGMENTS)
    try:
        from ucxx._lib import libucxx
    except ModuleNotFoundError as error:
        raise MissingExtraError("ucxx", "ucx") from error
    except ImportError as error:
        raise TransportUnavailableError(f"ucxx is installed but cannot be loaded: {error}", scheme="ucx") from error
    if fragments is None:
        os.environ.pop(FRAGMENTS, None)
    return libucxx


def make_context(ucxx: Any, settings: dict[str, str]) -> Any:
    """Make the context; settings that this UCX does not know (of a module it lacks) leave `settings`, and the log."""
    features = (ucxx.Feature.WAKEUP, ucxx.Feature.AM, ucxx.Feature.RMA)
    try:
        return ucxx.UCXContext(settings, features)
    except Exception:  # noqa: BLE001 - ucxx has an exception per status; the attempts below tell
        for name in list(settings):
            try:
                ucxx.UCXContext({name: settings[name]}, features)
            except Exception as error:  # noqa: BLE001 - as above
                logger.debug("kvmarket: UCX does not take UCX_%s: %s", name, error)
                del settings[name]
        return ucxx.UCXContext(settings, features)
