"""Published methods, each composed from the operators in one short file: pure functions over tensors.

They choose, and own nothing: models, masks, caches and positions are the caller's. Arguments of one name mean the same
in all of them:

    q, k       queries of the rows that score only [batch, query heads, rows, dim], all keys [batch, key heads, tokens,
               dim]; floating, as :func:`pyvtk.attention_scores` takes them
    visual     bool [batch, tokens]: the tokens that compete; text stays
    valid      bool [batch, tokens], False for padding, on whichever side; it goes. None: there is none
    num_keep   how many of the visual tokens stay; an int, or an int tensor [batch]
    capacity   slots per row of the result; None: as many as there are tokens. Where more stay, the best are kept, text
               first, and ``overflow`` says so
    align      the side on which the kept tokens stand, "left" or "right"
    group      process group over whose ranks the heads lie (tensor parallelism); None: all are here

Nothing waits for the device. Ties, NaN and overflow: :mod:`pyvtk.reference.select`. A wrong argument is an error of the
operator that it reaches, which the message names. ``python -m pyvtk methods`` lists them.
"""

from pyvtk.methods import divprune, fastv, feather, hired, pyramiddrop, snapkv, visionzip, yopo

__all__ = ["divprune", "fastv", "feather", "hired", "pyramiddrop", "snapkv", "visionzip", "yopo"]
